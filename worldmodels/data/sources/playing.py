"""What sources that play games themselves share; all randomness of episode k is a function of (seed, k)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from worldmodels.types import Episode, UserError

Row = tuple[int, float, bool, bool, bool]
"""Action, reward, terminated, truncated and whether a life was lost."""


def episode_rng(seed: int, number: int) -> np.random.Generator:
    """Random numbers of an episode."""
    # The number is not in word 0 of the counter, which numpy increments.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, number, 0, 0]))


def shares(game: str, mixture: Mapping[str, float] | None, known: Mapping[str, float]) -> dict[str, float]:
    """A mixture of behaviours as probabilities.

    Args:
        game: that they play.
        mixture: weight of each; None for `known`.
        known: those that there are, with their usual weights.

    Raises:
        UserError: a behaviour is unknown, or the weights are no weights.
    """
    chosen = {k: float(v) for k, v in (known if mixture is None else mixture).items() if v}
    if wrong := sorted(set(chosen) - set(known)):
        raise UserError(f"{game} cannot be played by {wrong[0]}: its behaviours are {', '.join(known)}")
    if not chosen or min(chosen.values()) < 0:
        raise UserError(f"mixture={dict(mixture or {})} must give a positive weight to one of {', '.join(known)}")
    return {k: v / sum(chosen.values()) for k, v in chosen.items()}


def until(steps: int, episodes: Iterator[Episode]) -> Iterator[Episode]:
    """As many of endless episodes as hold at least `steps` steps together."""
    while steps > 0:
        episode = next(episodes)
        steps -= len(episode)
        yield episode


def played(frames: Sequence[np.ndarray], rows: Sequence[Row], info: Mapping[str, Any]) -> Episode:
    """An episode of T rows and T + 1 frames; its `return` is added to `info`."""
    action, reward, terminated, truncated, life_loss = zip(*rows, strict=True)
    return Episode(
        obs=np.stack(frames[:-1]),
        action=np.array(action, np.uint8),
        reward=np.array(reward, np.float32),
        terminated=np.array(terminated),
        truncated=np.array(truncated),
        life_loss=np.array(life_loss),
        final_obs=frames[-1],
        info={**info, "return": float(sum(reward))},
    )

"""Plays games side by side to their ends and keeps them as episodes, with what a search found on the way.

Legend: N slots, T steps of an episode, A actions of the search, C colour channels, H and W pixels.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from worldmodels.envs.child import GameCrash
from worldmodels.evaluation.play import OWN_GAMES, channels_first, drawn_seed
from worldmodels.planning.planners import Planner
from worldmodels.planning.tree import SearchResult
from worldmodels.types import Episode, Policy, UserError


class Remembering:
    """A search that keeps what it found last.

    Args:
        search: a planner.
    """

    last: SearchResult

    def __init__(self, search: Planner) -> None:
        self.search = search

    def __call__(self, *roots: Any, **settings: Any) -> SearchResult:
        """Search."""
        self.last = self.search(*roots, **settings)
        return self.last


class Recorded(NamedTuple):
    """A game that was played.

    Args:
        episode: all of it.
        policy: (T, A) float32 that the search found, None where none acted.
        value: (T,) float32 of the roots, likewise.
    """

    episode: Episode
    policy: np.ndarray | None
    value: np.ndarray | None


def record(
    policy: Policy,
    env: Any,
    game: str,
    numbers: range,
    seed: int,
    device: str,
    about: Mapping[str, Any],
    search: Remembering | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> list[Recorded]:
    """Play one game in each slot, which with equal networks and machines are a function of (seed, numbers).

    Args:
        policy: sees frames (N, C, H, W) uint8 on `device`, and takes actions that are allowed.
        env: a vector environment as `open_games` makes it.
        game: its name.
        numbers: of the episodes, one a slot.
        seed: decides with the numbers what is drawn, other than in `play` with the same seed.
        device: where the policy is.
        about: what is noted in each episode's `info`.
        search: what the policy searches with, where it does.
        progress: called with the steps of this call so far.

    Returns:
        All games, in the order of their numbers. The last frame is left out where the game does not show it.

    Raises:
        UserError: the games' process fails, or the network gives a number that is not finite.
    """
    seeds = np.array([drawn_seed(seed, 2, number) for number in numbers])
    generator = torch.Generator(device).manual_seed(drawn_seed(seed, 3, numbers[0]))
    rows: list[list[tuple]] = [[] for _ in numbers]
    last: list[np.ndarray | None] = [None] * len(numbers)
    running = np.ones(len(numbers), bool)
    state = policy.start(len(numbers))
    try:
        frames, info = env.reset(seed=seeds)
        while running.any():
            observation, lives = channels_first(frames), info.get("lives")
            action, state = policy.act(observation.to(device), state, generator)
            chosen, seen = action.cpu().numpy(), _stored(observation)
            found = () if search is None else (search.last.action_weights, search.last.value)
            targets = [x.float().cpu().numpy() for x in found]
            frames, reward, terminated, truncated, info = env.step(chosen)
            final = info.get("final_obs")
            for k in np.flatnonzero(running):
                over = bool(terminated[k] or truncated[k])
                begun_anew = over and final is not None  # and so has the count of lives
                lost = bool(terminated[k]) if begun_anew else lives is not None and info["lives"][k] < lives[k]
                flags = bool(terminated[k]), bool(truncated[k] and not terminated[k]), bool(lost)
                rows[k].append((seen[k].copy(), chosen[k], reward[k], *flags, *(x[k] for x in targets)))
                running[k] = not over
                # an Atari game shows the frame before its last in place of it (envs/atari.py)
                if over and (begun_anew or game in OWN_GAMES):
                    last[k] = final[k] if begun_anew else _stored(channels_first(frames))[k]
            progress(sum(map(len, rows)))
    except GameCrash as error:
        raise UserError(
            f"the real game crashed in step {max(map(len, rows)) + 1} of episodes {numbers[0]} to {numbers[-1]} "
            f"({error}); the episodes before are kept, and the same command goes on from there"
        ) from error
    return [
        _whole(row, final, dict(about) | {"episode": number, "seed": seed})
        for row, final, number in zip(rows, last, numbers, strict=True)
    ]


def _stored(images: torch.Tensor) -> np.ndarray:
    """Frames (N, C, H, W) as a store has them, (N, H, W) or (N, H, W, 3)."""
    return images.movedim(1, -1).squeeze(-1).numpy() if images.shape[1] == 1 else images.movedim(1, -1).numpy()


def _whole(rows: list[tuple], final: np.ndarray | None, info: dict[str, Any]) -> Recorded:
    obs, action, reward, terminated, truncated, lost, *targets = zip(*rows, strict=True)
    policy, value = (np.stack(x) for x in targets) if targets else (None, None)
    return Recorded(
        Episode(
            obs=np.stack(obs),
            action=np.array(action, np.uint8),
            reward=np.array(reward, np.float32),
            terminated=np.array(terminated),
            truncated=np.array(truncated),
            life_loss=np.array(lost),
            final_obs=final,
            info=info | {"return": float(sum(reward))},
        ),
        policy,
        value,
    )

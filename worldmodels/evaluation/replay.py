"""Logged games played again in the emulator, to its state at any step, from which other things can happen.

A log keeps no emulator states. Where it was made by `worldmodels collect`, seed and actions of an episode bring the
same game back bit for bit. This is checked: by all rewards up to a state, and by the frame that belongs to it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodels.data.mixing import Mixture
from worldmodels.data.store import Store
from worldmodels.envs.atari import AtariEnv, Protocol
from worldmodels.evaluation.rollouts import track
from worldmodels.types import UserError


def replay_states(
    store: Store | Mixture, places: np.ndarray, rng: bool = True, progress: bool = True
) -> tuple[AtariEnv, list[tuple[Any, int]]]:
    """The emulator, and its state before each of `places` (N, 2), episode and step.

    Args:
        store: of play by `worldmodels collect`.
        places: sorted by episode, then by step, as `even_windows` gives them.
        rng: keep the emulator's random numbers with the states; without, going on from one differs every time
            wherever the protocol has sticky actions.
        progress: show a bar with the remaining time.

    Raises:
        UserError: the log does not say how its games began, they come out otherwise here, or frames are transformed.
    """
    store = _as_logged(store)
    env, states = AtariEnv(_protocol(store)), []
    actions, rewards = store.column("action"), store.column("reward")
    episodes, first = np.unique(places[:, 0], return_index=True)
    for part in track(np.split(places, first[1:]), "games played again", progress):
        episode = int(part[0, 0])
        info = store.episode_info(episode)["info"]
        if "env_seed" not in info:
            raise UserError(f"episode {episode} of {store.path} cannot be played again: it has no env_seed")
        frame, t, same = env.reset(info["env_seed"]), 0, True
        for step, seen in zip(part[:, 1].tolist(), store.read(part, 1).obs[:, 0].numpy(), strict=True):
            for row in range(store.offsets[episode] + t, store.offsets[episode] + step):
                outcome = env.step(int(actions[row]))
                frame, same = outcome.obs, same and outcome.reward == rewards[row]
            t = step
            if not same or not np.array_equal(_channels_first(frame), seen):
                raise UserError(
                    f"episode {episode} of {store.path} comes out otherwise than it was logged by step {t}: ale-py "
                    f"{store.card['versions'].get('ale_py')} played it, and the one installed plays it differently"
                )
            states.append(env.clone(rng))
    return env, states


def play_on(env: AtariEnv, state: tuple[Any, int], actions: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Play `actions` (T,) from a state.

    Returns:
        The frames after each action, (T, C, H, W) uint8, and (T,) bool, false after the game has ended, where the
        last frame is repeated.
    """
    env.restore(state)
    frames, alive, over = [], [], False
    for action in actions:
        alive.append(not over)
        if not over:
            outcome = env.step(int(action))
            over = outcome.terminated or outcome.truncated
            frames.append(torch.from_numpy(_channels_first(outcome.obs).copy()))
        else:
            frames.append(frames[-1])
    return torch.stack(frames), torch.tensor(alive)


def _as_logged(store: Store | Mixture) -> Store:
    """The store itself, which a mixture of one is where its frames stay as they are."""
    if isinstance(store, Store):
        return store
    if len(store.stores) > 1 or store.card["obs"] != store.stores[0].card["obs"]:
        raise UserError(
            f"the games of {store.path} cannot be played again: that takes a single store whose frames are as the "
            "emulator gave them, without data.transform"
        )
    return store.stores[0]


def _protocol(store: Store) -> Protocol:
    card = store.card
    if card["source"] != "atari_play":
        raise UserError(
            f"the games of {store.path} cannot be played again: only logs of Atari games made by `worldmodels collect` "
            "keep their seeds"
        )
    settings = {k: card[k] for k in ("game", "frame_skip", "sticky_prob", "noop_max", "time_limit")}
    protocol = Protocol(**settings, size=card["obs"]["height"], colour=card["obs"]["colour"])
    if wrong := [k for k, v in protocol.card().items() if card.get(k) != v]:
        raise UserError(f"the games of {store.path} cannot be played again: {wrong[0]} is {card.get(wrong[0])} there")
    return protocol


def _channels_first(frame: np.ndarray) -> np.ndarray:
    return frame.transpose(2, 0, 1) if frame.ndim == 3 else frame[None]

"""What every importer checks of a log that somebody else wrote: the game, the actions, the arrays."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from worldmodels.envs.atari import games
from worldmodels.types import ACTIONS, UserError

MAX_FRAMES = 2**22  # of one episode: 77 hours of play; a header that claims more is damaged or hostile


def bad(path: str | Path, problem: str, row: int | str | None = None) -> UserError:
    """What to raise where a log cannot be read: one sentence with the file, the row and the problem."""
    place = "" if row is None else f", row {row}"
    return UserError(f"cannot import {path}{place}: {problem}")


def game_of(name: str, where: str | Path) -> str:
    """ALE's snake_case name of a game, from any usual spelling: MsPacman, ALE/MsPacman-v5, mspacman, ms_pacman.

    Raises:
        UserError: ale-py has no such game.
    """
    plain = name.removeprefix("ALE/").partition("-")[0].partition("NoFrameskip")[0].replace("_", "").lower()
    for game in games():
        if game.replace("_", "") == plain:
            return game
    raise bad(where, f"{name!r} is no game of ale-py; name it with game=..., e.g. game=pong")


def one_game(given: str | None, found: Iterable[str], where: str | Path) -> str:
    """The game of a log: what the user says, or the only one that its names tell.

    Raises:
        UserError: it is not told at all, or the log holds two games, or another one than the user says.
    """
    names = sorted({game_of(name, where) for name in found} | ({given} if given else set()))
    if not names:
        raise bad(where, "its names do not tell the game; give it as game=..., e.g. game=pong")
    if len(names) > 1:
        raise bad(where, f"it holds {' and '.join(names)}, but a store holds one game; give the folder of one of them")
    return names[0]


@cache  # loading a ROM takes 0.1 s, and every part of a log asks
def minimal_actions(game: str) -> list[int]:
    """The actions that have an effect in `game`, in ALE's order, as indices into its 18-action set."""
    from ale_py import ALEInterface, LoggerMode

    from worldmodels.envs.atari import rom_path

    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale = ALEInterface()
    ale.loadROM(rom_path(game))
    return [action.value for action in ale.getMinimalActionSet()]


def to_full_set(action: np.ndarray, action_set: list[int], path: str | Path, first_row: int = 0) -> np.ndarray:
    """Logged action indices (T,) of any integer type as indices into ALE's 18-action set, (T,) uint8.

    Args:
        action: what was logged.
        action_set: the source's actions in logged order, as indices into the 18.
        path: where it was logged, for the message.
        first_row: number of the first row, for the message.

    Raises:
        UserError: an action is no whole number or out of range.
    """
    action = np.asarray(action)
    if action.dtype.kind not in "iu" or action.ndim != 1:
        raise bad(path, f"its actions are {action.dtype} {action.shape}, not whole numbers in one column")
    wrong = np.flatnonzero((action < 0) | (action >= len(action_set)))
    if len(wrong):
        allowed = f"0 to {len(action_set) - 1}" + ("" if len(action_set) == len(ACTIONS) else " in this game's own set")
        raise bad(path, f"action {int(action[wrong[0]])} is out of range; allowed are {allowed}", first_row + wrong[0])
    return np.asarray(action_set, np.uint8)[action]


def check_rewards(reward: np.ndarray, path: str | Path, first_row: int = 0) -> np.ndarray:
    """Logged rewards (T,) as float32.

    Raises:
        UserError: one is not finite, or they are no numbers in one column.
    """
    reward = np.asarray(reward)
    if reward.dtype.kind not in "iufb" or reward.ndim != 1:
        raise bad(path, f"its rewards are {reward.dtype} {reward.shape}, not numbers in one column")
    reward = reward.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(reward))
    if len(wrong):
        raise bad(path, f"reward {reward[wrong[0]]} is not finite", first_row + wrong[0])
    return reward

"""The files that Dopamine's logged replay buffer leaves of a run: a ring of rows, dumped once a cycle.

A run is a folder {Game}/{run}/replay_logs of checkpoints N = 0, 1, ..., one gzipped `np.save` array a file
(google-research/batch_rl, baselines/replay_memory/logged_replay_buffer.py):

    $store$_observation_ckpt.N.gz  (c, h, w) uint8, one frame a row, not a stack; c is the capacity of the ring
    $store$_action_ckpt.N.gz       (c,) int32, index into the game's minimal action set
    $store$_reward_ckpt.N.gz       (c,) float32, clipped to [-1, 1]
    $store$_terminal_ckpt.N.gz     (c,) uint8, 1 where the game or the time limit of 27,000 steps ended after the action
    add_count_ckpt.N.gz            () int64, number of rows ever added

What makes it more than a concatenation (google/dopamine, replay_memory/circular_replay_buffer.py):

- The ring is dumped when add_count % c is c - 1: slot c - 1 still holds the last row of the cycle before (garbage in
  the first cycle). In the order of time a checkpoint's share of the run is slot c - 1, then slots 0 to c - 2.
- Three rows of zeros stand before an episode's first row. They and that row are added at once; where the four
  straddle slot c - 1, that cycle is never dumped, and the numbering of the files does not tell. The next cycle begins
  with what is left of the padding, and a new episode.
- The dump at the end of a run has its cursor (below c) as add_count. Only the slots before it, and slot c - 1, are
  new since the checkpoint before.
- The frame after an episode's last action is never stored.
"""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, NamedTuple

import numpy as np

from worldmodels.data.sources.gzipped import Rows, opened, read_array, sentences
from worldmodels.data.sources.reading import (
    MAX_FRAMES,
    bad,
    check_rewards,
    game_of,
    minimal_actions,
    one_game,
    to_full_set,
)
from worldmodels.types import UserError

PADDING = 3  # rows of zeros before an episode
TIME_LIMIT = 27_000  # steps of an episode
MAX_SIDE = 256  # pixels; no Atari screen is higher than 250
_COLUMNS = {"action": np.int32, "reward": np.float32, "terminal": np.uint8}
_NAME = re.compile(r"(.*)/(?:add_count|\$store\$_(?:observation|action|reward|terminal))_ckpt\.(\d{1,6})\.gz")
_EVIDENCE = 20  # rows that must agree before the last dump counts as following on the one before


class Checkpoint(NamedTuple):
    """One dump. Slots 0 to `fresh` - 1 were filled in `cycle`; that of the dump at the end of a run is not known."""

    number: int
    cycle: int | None
    fresh: int


class Share(NamedTuple):
    """Rows in the order of time; row 0 of a checkpoint's share is slot capacity - 1, row i is slot i - 1.

    Args:
        action: (T,) uint8, index into ALE's 18-action set.
        reward: (T,) float32.
        terminal: (T,) bool.
    """

    action: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray

    def rows(self, start: int, stop: int) -> "Share":
        """A part of it."""
        return Share(*(column[start:stop] for column in self))

    def blank(self) -> np.ndarray:
        """(T,) bool: the row is padding, if its frame is black."""
        return ~np.any([column != 0 for column in self], 0)

    def end(self, start: int) -> tuple[int, bool]:
        """Past which row the episode that is open at row `start` goes no further, and whether it ends there."""
        first = start + int(self.terminal[start:].argmax())
        return (first + 1, True) if self.terminal[first] else (len(self.terminal), False)


@dataclass(frozen=True, slots=True)
class Run:
    """The dumps of one run; `at` is the index of a checkpoint in the list of those that are there.

    Args:
        fs: fsspec filesystem of the files.
        folder: where they are in it.
        game: ALE's name of the game.
        actions: its minimal set, as indices into ALE's 18.
        capacity: rows of the ring.
        frame: height and width.
        checkpoints: in the order of time.
    """

    fs: Any
    folder: str
    game: str
    actions: list[int]
    capacity: int
    frame: tuple[int, int]
    checkpoints: list[Checkpoint]

    def file(self, column: str, at: int) -> str:
        """Path of the file of a column."""
        return _file(self.folder, column, self.checkpoints[at].number)

    def frames(self, at: int) -> AbstractContextManager[Rows]:
        """The observations, by slot, opened."""
        return opened(self.fs, self.file("observation", at), np.uint8, (self.capacity, *self.frame))

    def head(self, at: int, n: int) -> np.ndarray:
        """The first `n` frames of a checkpoint's share, (n, height, width): the whole file is passed for the first."""
        out = np.empty((n, *self.frame), np.uint8)
        with self.frames(at) as frames:
            frames.into(out[1:])
            frames.skip_to(self.capacity - 1)
            frames.into(out[:1])
            frames.finish()
        return out

    def share(self, at: int) -> Share:
        """The columns of a checkpoint's share.

        Raises:
            UserError: an action or terminal flag is out of range, a reward is not clipped or no number.
        """
        checkpoint = self.checkpoints[at]
        checks = {"action": lambda x, *at: to_full_set(x, self.actions, *at), "reward": clipped, "terminal": _flags}
        columns = []
        for name, check in checks.items():
            by_slot, path = self._column(name, at), self.file(name, at)
            if checkpoint.cycle == 0:
                by_slot[-1] = 0  # garbage, never written
            last, fresh = by_slot[-1:], by_slot[: checkpoint.fresh]
            columns.append(np.concatenate([check(last, path, self.capacity - 1), check(fresh, path, 0)]))
        return Share(*columns)

    def link(self, at: int) -> str:
        """What a checkpoint's share follows on.

        Returns:
            "run": nothing, the run begins; "joined": the share of the checkpoint before; "new": a cycle that was never
            dumped, and the end of an episode; "unknown": rows that are not there, or perhaps the checkpoint before;
            "nothing" where there is no such checkpoint.
        """
        if at == len(self.checkpoints):
            return "nothing"
        number, cycle, fresh = self.checkpoints[at]
        if cycle == 0:
            return "run"
        if at == 0:
            return "new" if number == 0 else "unknown"
        before = self.checkpoints[at - 1]
        skipped = "new" if number == before.number + 1 else "unknown"
        if cycle is not None and before.cycle is not None:
            return "joined" if cycle == before.cycle + 1 else skipped
        # The end of a run: what it did not come to overwrite is the checkpoint before, if no cycle lies between.
        stale = slice(fresh, self.capacity - 1)
        if any((self._column(c, at)[stale] != self._column(c, at - 1)[stale]).any() for c in _COLUMNS):
            return skipped
        return "joined" if self.capacity - 1 - fresh >= _EVIDENCE else "unknown"

    def _column(self, name: str, at: int) -> np.ndarray:
        return read_array(self.fs, self.file(name, at), _COLUMNS[name], (self.capacity,))


def games_among(names: Iterable[str]) -> list[str]:
    """Those of the names of folders that are games."""

    def known(name: str) -> bool:
        try:
            return bool(game_of(name, ""))
        except UserError:
            return False

    return [name for name in names if known(name)]


def clipped(reward: np.ndarray, path: str, first_row: int) -> np.ndarray:
    """Logged rewards (T,) as float32.

    Raises:
        UserError: one is not within [-1, 1], or no number.
    """
    reward = check_rewards(reward, path, first_row)
    if len(wrong := np.flatnonzero(abs(reward) > 1)):
        raise bad(path, f"reward {reward[wrong[0]]} is not clipped to [-1, 1]", first_row + wrong[0])
    return reward


def end_flags(length: int, ended: bool, info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The flags terminated and truncated (T,) of an episode, where the log tells them not apart.

    Args:
        length: T.
        ended: the log says that the episode ended.
        info: of the episode; `truncation` is set to "assumed" where its length makes that the likely end.
    """
    end = (np.arange(length) == length - 1) & ended
    if ended and length == TIME_LIMIT and "start" not in info:
        info["truncation"] = "assumed"
        return np.zeros(length, bool), end
    return end, np.zeros(length, bool)


def find_run(path: str, game: str | None) -> Run:
    """The one run at or below `path`, a folder or a URL that fsspec reads.

    Args:
        path: of the folder replay_logs, or one above it. An http(s) URL cannot be listed: it must be that of the folder
            itself, with the checkpoints from 0 on.
        game: ALE's name of the game, where the path does not tell it.

    Raises:
        UserError: there is none, or more than one, or files are missing or contradict one another.
    """
    from fsspec.core import url_to_fs

    with sentences(path):
        if path.startswith(("http://", "https://")):
            from aiohttp import ClientTimeout  # by default a file must be read within five minutes

            patient = ClientTimeout(total=None, sock_connect=30, sock_read=60)
            fs, root = url_to_fs(path, client_kwargs={"timeout": patient})
            folder, numbers = _probed(fs, root.rstrip("/"))
        else:
            fs, root = url_to_fs(path)
            folder, numbers = _listed(fs, root.rstrip("/"))
    if not numbers:
        raise bad(path, "there is no add_count_ckpt.0.gz; give a run's folder replay_logs with all the files in it")
    counts = {n: int(read_array(fs, _file(folder, "add_count", n), np.int64, ())) for n in numbers}
    first = _file(folder, "observation", numbers[0])
    with opened(fs, first, np.uint8, (None, None, None)) as frames:
        capacity, height, width = frames.shape
    if not (PADDING + 1 < capacity <= MAX_FRAMES and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        allowed = f"{PADDING + 2} to {MAX_FRAMES} of at most {MAX_SIDE}x{MAX_SIDE}"
        raise bad(first, f"it says that it holds {capacity} frames of {height}x{width}; allowed are {allowed}")
    game = one_game(game, games_among(folder.split("/")[-3:]), path)
    checkpoints = _checkpoints(folder, counts, capacity)
    return Run(fs, folder, game, minimal_actions(game), capacity, (height, width), checkpoints)


def _checkpoints(folder: str, counts: dict[int, int], capacity: int) -> list[Checkpoint]:
    checkpoints: list[Checkpoint] = []
    last, before = max(counts), -1
    for number, added in counts.items():
        cycle, cursor = divmod(added, capacity)
        if number and added == capacity - 1 and number - 1 in counts and number == last:
            continue  # the run ended just where it had been dumped: the same rows once more
        if number == last and 0 <= added < capacity:
            checkpoints.append(Checkpoint(number, None if number else 0, added))
            continue
        if cursor != capacity - 1 or cycle < number or cycle <= before:
            problem = f"it is {added}, but a ring of {capacity} rows is dumped when its last slot comes next"
            raise bad(_file(folder, "add_count", number), f"{problem}, in a later cycle each time")
        checkpoints.append(Checkpoint(number, cycle, cursor))
        before = cycle
    return checkpoints


def _probed(fs: Any, folder: str) -> tuple[str, list[int]]:
    # A web server lists no folder. What it does not have is a 404 (or a 403, in Google's bucket); anything else that
    # goes wrong is not the end of the run.
    def there(number: int) -> bool:
        with sentences(path := _file(folder, "add_count", number)):
            try:
                fs.info(path)
            except FileNotFoundError as e:
                if getattr(e.__cause__, "status", None) in (403, 404):
                    return False
                raise
        return True

    return folder, list(takewhile(there, count()))


def _listed(fs: Any, root: str) -> tuple[str, list[int]]:
    files = set(fs.find(root, maxdepth=4))
    found: dict[str, set[int]] = {}
    for match in filter(None, map(_NAME.fullmatch, files)):
        found.setdefault(match[1], set()).add(int(match[2]))
    if len(found) > 1:
        some = " and ".join(sorted(found)[:2])
        raise bad(root, f"it holds {len(found)} runs, {some} among them; give the folder of one")
    if not found and any(path.endswith("/observation.gz") for path in files):
        problem = "files without add_count (as d4rl-atari names them) do not tell which rows are new"
        raise bad(root, f"{problem}; give a run's folder replay_logs as it was published")
    for folder, numbers in found.items():
        for number in sorted(numbers):
            for column in ("add_count", "observation", *_COLUMNS):
                if (path := _file(folder, column, number)) not in files:
                    raise bad(path, f"it is missing, but other files of checkpoint {number} are there; fetch it too")
        return folder, sorted(numbers)
    return root, []


def _file(folder: str, column: str, number: int) -> str:
    return f"{folder}/{'' if column == 'add_count' else '$store$_'}{column}_ckpt.{number}.gz"


def _flags(terminal: np.ndarray, path: str, first_row: int) -> np.ndarray:
    if len(wrong := np.flatnonzero(terminal > 1)):
        raise bad(path, f"terminal is {terminal[wrong[0]]}; allowed are 0 and 1", first_row + wrong[0])
    return terminal.astype(bool)

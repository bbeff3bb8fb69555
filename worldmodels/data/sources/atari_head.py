"""Atari-HEAD v4: people playing Atari games frame by frame, with their gaze (Zenodo record 3451402, CC-BY-4.0).

`path` is the unzipped folder of one game, with the data set's meta_data.csv in it or beside it. A trial is two files,
`{trial}_{subject}_{number}_{date}.tar.bz2` with a PNG a frame and `.txt` with a row a frame; the subfolder `highscore`
holds more. Any column of a row may be `null`. What is done with the traps of the format:

- Row t is the frame that was shown, the action taken on it (an index into the 18-action set) and the reward after it.
- A new `episode_id` begins a new episode; the one before ended by game over. Where it is null the episode goes on, so
  that in a trial without any `episode_id` game overs are not marked at all. A trial's last episode is open.
- A row whose action is null or out of range, or whose reward is null, is dropped and counted in `info["stripped"]`. It
  cuts the episode in two, as do frame numbers that leave some out: the first piece has `info["end"] = "gap"`.
- A trial that goes on from another (`load_trial`) has the same `info["chain"]`; a split should not part a chain.
- `info["frame_averaging"]` says whether the frames of a trial are means of two.
- Gaze is left out, as are scores and durations.
- Rows are taken for single frames of the console, none skipped: the record does not say so outright.

A trial is read in one pass. Nothing is unpacked to the disk, so that no member's path matters.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice, pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worldmodels.data.card import Card, make_card
from worldmodels.data.sources.atari_head_files import Log, decode, read_log, read_pictures, read_trials
from worldmodels.data.sources.reading import bad, one_game
from worldmodels.data.sources.recordings import MAX_BYTES, at_least, natural, same_frame
from worldmodels.types import Episode


class Piece(NamedTuple):
    """Rows `start` to `stop` of a trial: an episode, or what lies between two holes of one.

    Args:
        start: first row.
        stop: row after the last.
        end: terminal, gap or open.
        followed: whether the frame of row `stop` is the one after the last action, though the row itself was dropped.
        stripped: how many rows were dropped after it (before it, for a trial's first), by reason.
    """

    start: int
    stop: int
    end: str
    followed: bool
    stripped: dict[str, int]


def atari_head_card(path: str, game: str | None = None, size: int | None = None, skip: int = 1) -> Card:
    """The dataset card of the trials at `path`.

    Args:
        path: the folder of one game.
        game: ALE's name; None for what meta_data.csv says.
        size: as in `atari_head`.
        skip: as in `atari_head`.

    Raises:
        UserError: there are no trials, they are of two games, or meta_data.csv or the first trial cannot be read.
    """
    at_least(1, size=size, skip=skip)
    parts = atari_head_parts(path)
    height, width, _ = _frame(path)
    return make_card(
        "atari_head",
        one_game(game, {trial.game for trial in read_trials(path, parts)}, path),
        {
            "height": size or height,
            "width": size or width,
            "channels": 3,
            "resize": "area" if size else "none",
            "max_pool": skip > 1,
        },
        frame_skip=skip,
        policy={"type": "human"},
        licence="CC-BY-4.0",
        dataset={
            "name": "Atari-HEAD v4",
            "url": "https://zenodo.org/records/3451402",
            "citation": "Zhang et al., Atari-HEAD: Atari Human Eye-Tracking and Demonstration Dataset, AAAI 2020",
            "stripped": ["gaze_positions", "score", "duration(ms)"],
            "note": "rows are taken for single console frames, unchecked; lost lives are not marked, nor game overs in "
            "trials without episode_id; some trials show the mean of two frames (info.frame_averaging)",
        },
    )


def atari_head_parts(path: str, **settings: Any) -> list[str]:
    """The archives of the trials relative to `path`, in natural order, those of `highscore` last.

    Raises:
        UserError: there are none.
    """
    root = Path(path)
    archives = [file for folder in (root, root / "highscore") for file in folder.glob("[!.]*.tar.bz2")]
    if not archives:
        raise bad(path, "there is no trial (.tar.bz2 and .txt) in it; give the unzipped folder of one game")
    names = [str(file.relative_to(root)) for file in archives]
    return sorted(names, key=lambda name: ("/" in name, natural(name)))


def atari_head(
    path: str, part: str, game: str | None = None, size: int | None = None, skip: int = 1
) -> Iterator[Episode]:
    """The episodes of one trial, and the pieces of those that were cut.

    Args:
        path: as in `atari_head_card`.
        part: the trial's archive, relative to `path`.
        game: what only the card needs.
        size: frames are shrunk to `size` x `size` pixels by their area; None leaves them (0.1 MB each).
        skip: rows a step. The frame is the maximum over the last two rows before the action, as in play with a frame
            skip; the reward is the sum; the action is that of the step's first row, and other keys that the person
            pressed within the step are lost.

    Raises:
        UserError: a file of the trial is missing, damaged or hostile, or the two do not agree.
    """
    at_least(1, size=size, skip=skip)
    archive, frame = Path(path, part), _frame_cached(path, Path(path).stat().st_mtime_ns)
    (trial,) = read_trials(path, [part])
    log = read_log(archive.with_name(archive.name.replace(".tar.bz2", ".txt")))
    about = {"trial": trial.number, "subject": trial.subject, "chain": trial.chain}
    about |= {"frame_averaging": trial.frame_averaging, "highscore": part.startswith("highscore/")}
    shown = (size, size, 3) if size else frame
    pictures, done = enumerate(read_pictures(archive, log.frame)), 0
    for piece in pieces(log, archive):
        steps = -(-(piece.stop - piece.start) // skip)
        if steps * prod(shown) > MAX_BYTES:
            mend = "shrink them with source.size=84, or take source.skip=4"
            raise bad(archive, f"{steps} frames of {shown} are more than {MAX_BYTES} bytes; {mend}")
        obs, last, final = np.empty((steps, *shown), np.uint8), None, None
        todo, done = piece.stop + piece.followed - done, piece.stop + piece.followed
        for row, png in islice(pictures, todo):
            k = row - piece.start
            if k < 0 or k % skip not in (0, skip - 1):
                continue
            now = decode(png, archive, log.frame[row])
            same_frame(archive, now.shape, frame)
            if k % skip == 0:
                final = _shrunk(now if skip == 1 or last is None else np.maximum(last, now), size)
                if row < piece.stop:
                    obs[k // skip], final = final, None
            last = now
        yield _episode(log, piece, skip, obs, final, about)


def pieces(log: Log, where: Path) -> list[Piece]:
    """What to make of the rows of a trial, in their order.

    Raises:
        UserError: nothing is left of them.
    """
    dropped = [("rows_without_action", log.action < 0), ("rows_without_reward", np.isnan(log.reward))]
    kept = ~(dropped[0][1] | dropped[1][1])
    hole = np.diff(log.number) != 1  # between two rows
    new = (np.diff(log.episode) != 0) & (log.episode[:-1] >= 0)
    cuts = np.flatnonzero(hole | new | ~kept[:-1] | ~kept[1:]) + 1
    found: list[Piece] = []
    early: dict[str, int] = {}
    for start, stop in pairwise([0, *cuts.tolist(), len(kept)] if len(kept) else []):
        if kept[start]:
            gap = stop < len(kept) and bool(hole[stop - 1] or not new[stop - 1])
            end = "gap" if gap else "terminal" if stop < len(kept) else "open"
            found.append(Piece(start, stop, end, gap and not hole[stop - 1], early if not found else {}))
        else:
            reason = next(name for name, rows in dropped if rows[start])
            counts = found[-1].stripped if found else early
            counts[reason] = counts.get(reason, 0) + 1
    if not found:
        raise bad(where, "none of its rows has an action and a reward")
    return found


def _episode(
    log: Log, piece: Piece, skip: int, obs: np.ndarray, final: np.ndarray | None, about: dict[str, Any]
) -> Episode:
    rows = slice(piece.start, piece.stop)
    terminated, truncated, life_loss = np.zeros((3, len(obs)), bool)
    terminated[-1] = piece.end == "terminal"
    number = int(log.episode[piece.stop - 1])
    info = about | {"episode_id": None if number < 0 else number}
    info |= ({"end": "gap"} if piece.end == "gap" else {}) | ({"stripped": piece.stripped} if piece.stripped else {})
    reward = np.add.reduceat(log.reward[rows], np.arange(0, piece.stop - piece.start, skip)).astype(np.float32)
    action = log.action[rows][::skip].astype(np.uint8)
    return Episode(obs, action, reward, terminated, truncated, life_loss, final, info)


def _shrunk(frame: np.ndarray, size: int | None) -> np.ndarray:
    if not size:
        return frame
    import cv2

    return cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)


def _frame(path: str) -> tuple[int, ...]:
    """(H, W, 3) of the first frame of the first trial."""
    archive = Path(path, atari_head_parts(path)[0])
    log = read_log(archive.with_name(archive.name.replace(".tar.bz2", ".txt")))
    pieces(log, archive)
    return decode(next(read_pictures(archive, log.frame)), archive, log.frame[0]).shape


@lru_cache(1)
def _frame_cached(path: str, changed: int) -> tuple[int, ...]:
    return _frame(path)

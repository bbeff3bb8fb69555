"""DQN Replay Dataset: what Dopamine's DQN did as it learned, 50 million steps a run; dopamine.py explains the files."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from worldmodels.data.card import Card, make_card
from worldmodels.data.sources.dopamine import PADDING, TIME_LIMIT, Run, Share, end_flags, find_run
from worldmodels.data.sources.gzipped import Rows
from worldmodels.data.sources.reading import bad
from worldmodels.types import Episode


def dqn_replay_card(path: str, game: str | None = None) -> Card:
    """The dataset card of a run; arguments as for `dqn_replay`.

    Raises:
        UserError: there is no run, or more than one, or files are missing or malformed.
    """
    run = find_run(path, game)
    number = re.search(r"/(\d+)/replay_logs$", run.folder)
    return make_card(
        "dqn_replay",
        run.game,
        {
            "height": run.frame[0],
            "width": run.frame[1],
            "channels": 1,
            "colour": "ale_gray",
            "resize": "area",
            "max_pool": True,
        },
        action_set=run.actions,
        frame_skip=4,
        sticky_prob=0.25,
        reward={"clipped": True},
        time_limit=TIME_LIMIT,
        truncation_known=False,
        policy={"type": "dqn", "learning": True, "epsilon": "from 1 to 0.01 over the first 250,000 steps"},
        licence="not stated where it is published",
        dataset={
            "name": "DQN Replay Dataset",
            "url": "gs://atari-replay-datasets/dqn",
            "run": int(number[1]) if number else None,
            "citation": "Agarwal, Schuurmans and Norouzi: An Optimistic Perspective on Offline Reinforcement Learning, "
            "ICML 2020, arXiv:1907.04543",
        },
    )


def dqn_replay_parts(path: str, game: str | None = None) -> list[str]:
    """The checkpoints of a run in the order of time: "ckpt.0", "ckpt.1", ...; arguments as for `dqn_replay`.

    Raises:
        UserError: as `dqn_replay_card`.
    """
    return _names(find_run(path, game))


def dqn_replay(path: str, part: str, game: str | None = None) -> Iterator[Episode]:
    """The episodes whose first row lies in a checkpoint's share of the run.

    An episode that is open where the share ends is read on from the next checkpoint. The first of its rows there is
    the last of the file, so that every checkpoint but the first is decompressed twice in all: for its own episodes,
    and for the one that runs into it.

    Where nothing is known of the rows before a share (a single checkpoint from the middle of a run, or the one before
    is missing), its first episode may have begun earlier. It is kept, and its info has `start` "unknown".

    Args:
        path: the folder replay_logs, or one above it that holds no other; a path or a URL that fsspec reads. An http(s)
            URL cannot be listed: it must be that of the folder itself, with the checkpoints from 0 on.
        part: one of `dqn_replay_parts`.
        game: ALE's name of the game, where the path does not tell it.

    Yields:
        Episodes without final frame. `info` has the checkpoint, the slot of the first row and the rows of padding that
        were stripped. An episode of exactly 27,000 rows counts as truncated, as the log does not tell: its info has
        `truncation` "assumed".

    Raises:
        UserError: a file is missing or malformed, or a row is not as the format has it.
    """
    run = find_run(path, game)
    at = _names(run).index(part)
    link, share = run.link(at), run.share(at)
    row, padding = _first(run, at, link, share)
    info: dict[str, Any] = {"start": "unknown"} if link == "unknown" else {}
    with run.frames(at) as frames:
        while row < len(share.terminal):
            _check_padding(run, at, frames, share, row, padding)
            first = row + padding
            info |= {"checkpoint": run.checkpoints[at].number, "row": (first - 1) % run.capacity}
            yield _episode(run, at, frames, share, first, info | {"stripped": {"zero_rows": padding}})
            row, _ = share.end(first)
            padding, info = PADDING, {}
        if run.checkpoints[at].fresh == run.capacity - 1:
            frames.finish()


def _names(run: Run) -> list[str]:
    return [f"ckpt.{checkpoint.number}" for checkpoint in run.checkpoints]


def _first(run: Run, at: int, link: str, share: Share) -> tuple[int, int]:
    """The row of a share where its own episodes begin, and how many rows of padding come first."""
    if link == "run":
        return 1, PADDING
    if link == "joined":
        return 0 if run.share(at - 1).terminal[-1] else share.end(0)[0], PADDING
    start, most = (0, PADDING - 1) if link == "new" else (1, PADDING)
    most = min(most, max(0, len(share.terminal) - start - 1))  # no share ends with padding
    with run.frames(at) as frames:
        black = frames.read(min(PADDING, run.checkpoints[at].fresh)).max((1, 2), initial=0) == 0
    if start == 0:
        black = np.append(not run.head(at, 1).any(), black)
    blank = (black & share.rows(start, start + len(black)).blank())[:most]
    return start, int(np.logical_and.accumulate(blank).sum())


def _check_padding(run: Run, at: int, frames: Rows, share: Share, row: int, padding: int) -> None:
    """Pass over the rows of padding before an episode."""
    first = row + padding
    frames.skip_to(max(0, row - 1))
    black = not frames.read(max(0, first - max(1, row))).any()  # but for row 0, whose frame is the last of the file
    if first >= len(share.terminal) or not (black and share.rows(row, first).blank().all()):
        problem = f"{padding} rows of zeros must stand here before an episode, and its rows after them"
        raise bad(run.file("observation", at), problem, (row - 1) % run.capacity)


def _episode(run: Run, at: int, frames: Rows, share: Share, first: int, info: dict[str, Any]) -> Episode:
    """The episode that begins at row `first` of a share; its frames come next in `frames`."""
    stop, ended = share.end(first)
    pieces = [share.rows(first, stop)]
    while not ended and run.link(at + len(pieces)) == "joined":
        following = run.share(at + len(pieces))
        end, ended = following.end(0)
        pieces.append(following.rows(0, end))
    action, reward, _ = map(np.concatenate, zip(*pieces, strict=True))
    if len(action) > TIME_LIMIT:
        problem = f"an episode of {len(action)} rows or more begins here, but the longest have {TIME_LIMIT}"
        raise bad(run.file("terminal", at), problem, info["row"])

    obs = np.empty((len(action), *run.frame), np.uint8)
    filled = stop - first
    if first == 0:
        obs[:1] = run.head(at, 1)
    frames.into(obs[int(first == 0) : filled])
    for k, piece in enumerate(pieces[1:], 1):
        n = len(piece.action)
        obs[filled : filled + n] = run.head(at + k, n)
        filled += n

    if not ended and at + len(pieces) < len(run.checkpoints):
        info["end"] = "gap"
    flags = end_flags(len(action), ended, info)
    return Episode(obs, action, reward, *flags, np.zeros(len(action), bool), None, info)

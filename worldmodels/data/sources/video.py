"""Recordings as videos, one episode a file, each with an action file of the same name beside it.

`play.mp4` (or .mkv, .avi, .webm) goes with `play.csv`, whose first line names its columns,
`action[,reward][,terminated][,truncated][,life_loss]`, or with `play.npz`, which holds arrays of these names. Row t is
the action taken on seeing frame t (frame `skip` * t, where a video shows several frames an action), so that there are
as many frames as actions, or one more: the frame after the last action. Times are of no account: a row is a frame.
Without rewards they are zero; without flags an episode is open.

FFmpeg is told the container by the file's name, reads through an open file, and is held to a frame size: a playlist in
disguise, which could name other files, is no video here.
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data.card import Card
from worldmodels.data.sources.npz import load
from worldmodels.data.sources.reading import MAX_FRAMES, bad
from worldmodels.data.sources.recordings import (
    ARRAYS,
    MAX_BYTES,
    at_least,
    file_of,
    files,
    recording,
    recording_card,
    same_frame,
)
from worldmodels.types import Episode, UserError

CONTAINERS = {".mp4": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi"}
COLUMNS = ARRAYS[1:]
MAX_PIXELS = 2**24  # of one frame; 4096x2160 has half of it
_LOSSLESS = ("ffv1", "ffvhuff", "huffyuv", "png", "rawvideo", "utvideo")  # H.264 may be, but its header does not tell
_EXACT = "gray rgb24 bgr24 rgb0 bgr0 0rgb 0bgr rgba bgra argb abgr gbrp gbrap pal8".split()  # to 8-bit RGB or grey
_FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1}


def video_card(path: str, game: str | None = None, size: int | None = None, skip: int = 1, **about: Any) -> Card:
    """The dataset card of the videos at `path`.

    Args:
        path: a folder of videos and action files, or one video.
        game: ALE's name, where no card.json tells it.
        size: as in `video`.
        skip: as in `video`.
        about: other fields of the card, see `recording_card`.

    Raises:
        UserError: there is no video, the first cannot be opened, or the game is not told.
    """
    at_least(1, size=size, skip=skip)
    first = files(path, tuple(CONTAINERS))[0]
    told = load_actions(_action_file(first))
    frame, lossless = _first(first, size)
    if size and about.get("resize") is None:
        about["resize"] = "area"
    card = recording_card("video", path, frame, game, "truncated" in told, **about)
    if not lossless:
        card["lossy"] = "video"
    if "reward" not in told:
        card["dataset"]["reward"] = "not logged, all zero"
    return card


def video_parts(path: str, **about: Any) -> list[str]:
    """The names of the videos at `path`, in natural order."""
    return [file.name for file in files(path, tuple(CONTAINERS))]


def video(path: str, part: str, size: int | None = None, skip: int = 1, **about: Any) -> Iterator[Episode]:
    """The episode of one video; beside it, one decoded frame is in memory at a time.

    Args:
        path: as in `video_card`.
        part: name of the video.
        size: frames are shrunk to `size` x `size` pixels by their area; None leaves them.
        skip: frames of the video an action; the first of them is what the action was taken on.
        about: what only the card needs.

    Raises:
        UserError: the video is damaged or hostile, its action file is missing or damaged, or the two do not agree.
    """
    at_least(1, size=size, skip=skip)
    file = file_of(path, part)
    actions = _action_file(file)
    arrays = load_actions(actions)
    steps = len(arrays["action"])
    with _opened(file) as (container, stream):
        frame = _frame(file, stream, size)
        same_frame(file, frame, _first_cached(path, Path(path).stat().st_mtime_ns, size))
        if (steps + 1) * prod(frame) > MAX_BYTES:
            raise bad(
                file, f"{steps} frames of {frame} are more than {MAX_BYTES} bytes; shrink them with source.size=84"
            )
        shown = stream.codec_context.width, stream.codec_context.height
        obs, count = np.empty((steps + 1, *frame), np.uint8), 0
        for picture in container.decode(stream):
            if count > steps * skip:
                raise bad(file, f"it has more frames than the {steps} actions of {actions.name} allow, {skip} each")
            if picture.is_corrupt or (picture.width, picture.height) != shown:
                raise bad(file, "it is damaged here, or changes its size", count)
            if count % skip == 0:
                obs[count // skip] = _pixels(picture, frame, size)
            count += 1
    rows = -(-count // skip)
    if rows < steps:
        raise bad(file, f"it has {count} frames, too few for the {steps} actions of {actions.name}, {skip} each")
    yield recording(actions, {"reward": np.zeros(steps)} | arrays | {"obs": obs[:rows]})


def load_actions(file: Path) -> dict[str, np.ndarray]:
    """The columns of an action file, .csv or .npz, by name.

    Raises:
        UserError: it is damaged, or has no actions.
    """
    arrays = load(file, COLUMNS) if file.suffix == ".npz" else _csv(file)
    if "action" not in arrays or arrays["action"].ndim != 1:
        raise bad(file, f"it has no column action; allowed are {', '.join(COLUMNS)}")
    return arrays


def _action_file(video: Path) -> Path:
    beside = [file for file in (video.with_suffix(".csv"), video.with_suffix(".npz")) if file.is_file()]
    if len(beside) != 1:
        raise bad(video, f"beside it there must be {video.stem}.csv or {video.stem}.npz with its actions, and not both")
    return beside[0]


def _csv(file: Path) -> dict[str, np.ndarray]:
    if file.stat().st_size > 64 * MAX_FRAMES:
        raise bad(file, f"it is too long for {MAX_FRAMES} rows")
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:  # a spreadsheet puts a mark before the text
            lines = csv.reader(f)
            names = [name.strip() for name in next(lines, [])]
            if unknown := [name for name in names if name not in COLUMNS or names.count(name) > 1]:
                raise bad(file, f"its first line names {unknown[0]!r}; allowed once each are {', '.join(COLUMNS)}")
            rows: list[list[np.generic]] = []
            for line in filter(None, lines):
                if len(line) != len(names):
                    raise bad(file, f"it has {len(line)} values for the columns {', '.join(names)}", len(rows))
                rows.append([_value(name, text, file, len(rows)) for name, text in zip(names, line, strict=True)])
    except (csv.Error, UnicodeDecodeError) as e:
        raise bad(file, f"it is no text of comma-separated values ({e})") from e
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    kinds = {"action": np.int64, "reward": np.float64}
    return {name: np.array(values, kinds.get(name, bool)) for name, values in zip(names, columns, strict=True)}


def _value(name: str, text: str, file: Path, row: int) -> np.generic:
    try:
        if name == "reward":
            return np.float64(text)
        return np.int64(int(text) if name == "action" else _FLAGS[text.strip().lower()])
    except (ValueError, OverflowError, KeyError) as e:
        allowed = {"action": "0 to 17", "reward": "numbers"}.get(name, "0, 1, false and true")
        raise bad(file, f"{name} is {text[:40]!r}; allowed are {allowed}", row) from e


def _first(file: Path, size: int | None) -> tuple[tuple[int, ...], bool]:
    """Shape of the frames of a video, and whether they are as they were."""
    with _opened(file) as (_, stream):
        codec = stream.codec_context
        return _frame(file, stream, size), codec.name in _LOSSLESS and codec.pix_fmt in _EXACT


@lru_cache(1)
def _first_cached(path: str, changed: int, size: int | None) -> tuple[int, ...]:
    return _first(files(path, tuple(CONTAINERS))[0], size)[0]


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    import av

    limit = {"max_pixels": str(MAX_PIXELS)}
    probing: Any = [limit] * 8  # streams; FFmpeg decodes some frames to find out what is in a file
    damage = av.FFmpegError, OSError, EOFError, ValueError, LookupError, MemoryError
    try:
        kind = CONTAINERS[file.suffix.lower()]
        with open(file, "rb") as f, av.open(f, format=kind, stream_options=probing) as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise bad(file, "it holds no video that can be decoded")
            stream = container.streams.video[0]
            stream.codec_context.options = limit | {"err_detect": "explode"}
            stream.codec_context.thread_count = 1  # importing reads several files at a time
            yield container, stream
    except UserError:
        raise
    except damage as e:
        raise bad(file, f"it is no whole video ({e})") from e


def _frame(file: Path, stream: Any, size: int | None) -> tuple[int, ...]:
    codec = stream.codec_context
    if not 0 < codec.width * codec.height <= MAX_PIXELS or not codec.pix_fmt:
        raise bad(file, f"its frames have no size that can be read; allowed are up to {MAX_PIXELS} pixels")
    height, width = (size, size) if size else (codec.height, codec.width)
    return (height, width) if codec.pix_fmt.startswith("gray") else (height, width, 3)


def _pixels(picture: Any, frame: tuple[int, ...], size: int | None) -> np.ndarray:
    pixels = picture.to_ndarray(format="gray" if len(frame) == 2 else "rgb24")
    if size:
        import cv2

        pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
    return pixels

"""LeRobot datasets of version 3: Parquet tables and MP4 videos, each of which holds many episodes.

As LeRobot writes them (huggingface/lerobot, docs/source/lerobot-dataset-v3.mdx; src/lerobot/datasets/utils.py,
dataset_writer.py, dataset_metadata.py):

    ROOT/meta/info.json                             codebase_version, fps, total_episodes, features
    ROOT/meta/episodes/chunk-000/file-000.parquet   a row an episode: its length, which files hold its rows and its
                                                    frames, and at which second of the video it begins
    ROOT/data/chunk-000/file-000.parquet            a row a step: episode_index, frame_index, timestamp in seconds from
                                                    the episode's first frame, the action and what else was logged
    ROOT/videos/CAMERA/chunk-000/file-000.mp4       the frames of a camera, found by their time

A row is the frame seen, the action taken on it, and `next.reward` and `next.done` after it; the frame after the last
action is not kept. Rewards and ends are not standardised, so that the names of their columns are settings.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worldmodels.data.card import Card
from worldmodels.data.sources.reading import MAX_FRAMES, bad, minimal_actions, to_full_set
from worldmodels.data.sources.recordings import MAX_BYTES, recording, recording_card
from worldmodels.data.sources.video import _frame, _opened
from worldmodels.types import ACTIONS, Episode, UserError

NAMES = {"camera": None, "action": "action", "reward": "next.reward", "done": "next.done", "truncated": None}
_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_DAMAGE = (OSError, ValueError, LookupError, AttributeError, RuntimeError, TypeError, ArithmeticError, MemoryError)


class _Info(NamedTuple):
    file: Path  # meta/info.json
    root: Path
    fps: float
    episodes: int
    names: dict[str, Any]  # by the keys of NAMES


def lerobot_card(
    path: str, game: str | None = None, names: Mapping[str, Any] | None = None, action_set: str = "full", **about: Any
) -> Card:
    """The dataset card of what `lerobot` yields.

    Args:
        path: folder of the dataset.
        game: ALE's name of the game.
        names: as in `lerobot`.
        action_set: as in `lerobot`.
        about: other fields of the card, which LeRobot does not tell, see `recording_card`.

    Raises:
        UserError: there is no dataset of version 3, it has no such columns, or the game is not told.
    """
    info = _info(path, names)
    row = _row(info, 0)
    _steps(info, row)
    height, width, _ = next(_frames(info, row, np.zeros(1))).shape
    card = recording_card("lerobot", path, (height, width, 3), game, bool(info.names["truncated"]), **about)
    return card | {
        "action_set": _action_set(action_set, card["game"], path),
        "lossy": "video",
        "dataset": {"format": "LeRobot v3", "fps": info.fps},
    }


def lerobot_parts(path: str, names: Mapping[str, Any] | None = None, **about: Any) -> list[str]:
    """The names of the episodes, in order.

    Raises:
        UserError: meta/episodes does not have all that info.json tells of.
    """
    info = _info(path, names)
    stored = [int(number) for file in _tables(info) for number in _read(file, ["episode_index"])["episode_index"]]
    if not stored or len(stored) != info.episodes or stored != list(range(len(stored))):
        problem = f"it tells of {info.episodes} episodes, but meta/episodes has {len(stored)}, or not in order"
        raise bad(info.file, f"{problem}; copy the whole dataset")
    return [f"episode_{number}" for number in stored]


def lerobot(
    path: str,
    part: str,
    game: str | None = None,
    names: Mapping[str, Any] | None = None,
    action_set: str = "full",
    **about: Any,
) -> Iterator[Episode]:
    """One episode, without the frame after its last action.

    Args:
        path: folder of the dataset.
        part: one of `lerobot_parts`.
        game: ALE's name of the game, which the minimal action set is of.
        names: what `NAMES` has: the `camera`, where there are several, and the columns of the `action`, of the `reward`
            after it, of `done`, true where the episode ended after it (None where nothing says so: all episodes are
            then open), and of `truncated`, true where that end was a cut and not the game's.
        action_set: "full" where actions are indices into ALE's 18, "minimal" where into those that the game heeds.
        about: what only the card needs.

    Raises:
        UserError: a file is missing, damaged, or does not hold what another says.
    """
    info = _info(path, names)
    row = _row(info, int(part.removeprefix("episode_")))
    file, table = _steps(info, row)
    logged = {name: table[column] for name, column in info.names.items() if column in table}
    steps = len(table["timestamp"])
    cut, done = (logged.get(name, np.zeros(steps, bool)) for name in ("truncated", "done"))
    arrays = {
        "action": to_full_set(logged["action"], _action_set(action_set, game, path), file),
        "reward": logged["reward"],
        "terminated": np.where(cut, 0, done),
        "truncated": cut,
    }
    frames = _frames(info, row, table["timestamp"])
    first = next(frames)
    if (size := steps * first.size) > MAX_BYTES:
        raise bad(file, f"its frames come to {size} bytes; at most {MAX_BYTES} are read as one episode", part)
    obs = np.empty((steps, *first.shape), np.uint8)
    obs[0] = first
    for t, frame in enumerate(frames, 1):
        obs[t] = frame
    yield recording(f"{file}, {part}", {**arrays, "obs": obs})


# What there is


def _info(path: str, names: Mapping[str, Any] | None) -> _Info:
    file = Path(path) / "meta" / "info.json"
    if not file.is_file():
        raise bad(path, "it has no meta/info.json; give the folder of a LeRobot dataset")
    chosen: dict[str, Any] = {**NAMES, **(names or {})}
    if chosen.keys() != NAMES.keys():
        raise bad(path, f"names.{max(chosen.keys() - NAMES.keys())} is unknown; there are {', '.join(NAMES)}")
    with _sentences(file):
        info = json.loads(file.read_bytes())
        version, fps = info.get("codebase_version"), float(info["fps"])
        if not str(version).startswith("v3."):
            raise bad(file, f"it is of version {version}; convert it with LeRobot's convert_dataset_v21_to_v30")
        if not 0 < fps <= 1000:
            raise bad(file, f"its fps is {fps}; more than 0 and at most 1000 are read")
        if (info.get("data_path", _DATA), info.get("video_path", _VIDEO)) != (_DATA, _VIDEO):
            raise bad(file, f"its paths are not the usual {_DATA} and {_VIDEO}")
        cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
        camera = cameras[0] if len(cameras) == 1 and not chosen["camera"] else chosen["camera"]
        if camera not in cameras or "/" in camera:
            found = f"its videos are {', '.join(cameras)}" if cameras else "it has no video"
            raise bad(file, f"the camera is {camera}, but {found}; choose one with source.names.camera=...")
        return _Info(file, file.parents[1], fps, int(info["total_episodes"]), chosen | {"camera": camera})


def _tables(info: _Info) -> list[Path]:
    return sorted(info.root.glob("meta/episodes/chunk-*/file-*.parquet"))


def _row(info: _Info, number: int) -> dict[str, Any]:
    """What meta/episodes tells of an episode."""
    video = [f"videos/{info.names['camera']}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    names = ["episode_index", "length", "data/chunk_index", "data/file_index", *video]
    for file in _tables(info):
        found = _read(file, names, number)
        if len(found["length"]) == 1:
            return {name.replace(f"videos/{info.names['camera']}", "video"): found[name][0] for name in names}
    raise bad(info.root / "meta/episodes", f"episode {number} is not there, or twice")


def _steps(info: _Info, row: dict[str, Any]) -> tuple[Path, dict[str, np.ndarray]]:
    """The columns of an episode by their own names, `timestamp` among them, and the file that holds them."""
    with _sentences(info.root / "meta/episodes"):
        file = info.root / _DATA.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    own = (info.names[key] for key in ("action", "reward", "done", "truncated"))
    table = _read(file, ["timestamp", "frame_index", *filter(None, own)], row["episode_index"])
    number, steps = int(row["episode_index"]), len(table["timestamp"])
    if steps != row["length"] or steps == 0 or not np.array_equal(table["frame_index"], np.arange(steps)):
        raise bad(file, f"episode {number} has {steps} rows of {row['length']}, or not in order; copy it anew")
    return file, table


def _action_set(action_set: str, game: str | None, path: str) -> list[int]:
    if action_set not in ("full", "minimal") or (action_set == "minimal" and game is None):
        raise bad(path, f"action_set={action_set} is unknown, or of no game; give full, or minimal and game=...")
    return list(range(len(ACTIONS))) if action_set == "full" else minimal_actions(str(game))


# Files


@contextmanager
def _sentences(where: Path) -> Iterator[None]:
    """What the libraries make of damaged bytes, as a sentence."""
    try:
        yield
    except UserError:
        raise
    except (*_DAMAGE, RecursionError) as e:
        why = " ".join(str(e).split())
        raise bad(where, f"it is not as LeRobot writes it ({type(e).__name__}: {why})") from e


def _read(file: Path, names: list[str], episode: int | None = None) -> dict[str, np.ndarray]:
    """Columns of a Parquet file, of all rows or of one episode's, an array (R,) each; little else is unpacked.

    Raises:
        UserError: the file is missing or damaged, has no such columns, or more rows than an episode can have.
    """
    try:
        pa, dataset, fs = (importlib.import_module(f"pyarrow{name}") for name in ("", ".dataset", ".fs"))
    except ModuleNotFoundError as e:
        raise UserError('reading LeRobot needs pyarrow; install it with: pip install "worldmodels[lerobot]"') from e
    if not file.is_file():
        raise bad(file, "it is missing")
    with _sentences(file):
        table = dataset.dataset([str(file)], format="parquet", filesystem=fs.LocalFileSystem())
        if missing := [name for name in names if name not in table.schema.names]:
            there = ", ".join(table.schema.names)
            raise bad(
                file, f"it has no column {missing[0]}; choose among {there} with source.names.reward=... or done=..."
            )
        rows = None if episode is None else dataset.field("episode_index") == episode
        scan = table.scanner(columns=[*set(names)], filter=rows, batch_size=2**16, use_threads=False)
        batches, count = [], 0
        for batch in scan.to_batches():
            batches.append(batch)
            if (count := count + len(batch)) > MAX_FRAMES:
                raise bad(file, f"an episode has more than {MAX_FRAMES} rows")
        found = pa.Table.from_batches(batches, scan.projected_schema)
        return {name: _array(found[name].combine_chunks(), file, name) for name in names}


def _array(column: Any, file: Path, name: str) -> np.ndarray:
    if hasattr(column, "flatten") and hasattr(column.type, "value_type"):  # a vector of one number
        rows, column = len(column), column.flatten()
        if len(column) != rows:
            raise bad(file, f"its {name} is a vector; a game has one number a row")
    if column.null_count:
        raise bad(file, f"its {name} has rows without a value")
    return column.to_numpy(zero_copy_only=False)


def _frames(info: _Info, row: dict[str, Any], times: np.ndarray) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8 of an episode at `times` (T,) in seconds from its beginning, one after the other.

    A frame belongs to a time that is less than a quarter of a frame's duration away. LeRobot joins videos without
    encoding them anew, so that times are rounded; and one that seeks lands on the key frame before.

    Raises:
        UserError: the video is missing or damaged, or has no frame for a time.
    """
    with _sentences(info.root / "meta/episodes"):
        index = {"chunk_index": row["video/chunk_index"], "file_index": row["video/file_index"]}
        file = info.root / _VIDEO.format(video_key=info.names["camera"], **index)
        wanted = np.asarray(row["video/from_timestamp"] + times, np.float64)
        if not (np.isfinite(wanted).all() and (np.diff(wanted) > 0).all() and wanted[0] >= 0 and wanted[-1] < 2**24):
            raise bad(info.root, f"the times of episode {row['episode_index']} do not rise from a second of its video")
    if not file.is_file():
        raise bad(file, "it is missing")
    near, t = 0.25 / info.fps, 0
    with _sentences(file), _opened(file) as (container, stream):
        height, width = _frame(file, stream, None)[:2]
        container.seek(int(wanted[0] / stream.time_base), stream=stream)
        for picture in container.decode(stream):
            if picture.time < wanted[t] - near:
                continue
            if picture.time > wanted[t] + near:
                break
            if (picture.height, picture.width) != (height, width):
                raise bad(file, "its frames change their size")
            yield picture.to_ndarray(format="rgb24")
            t += 1
            if t == len(wanted):
                return
    raise bad(file, f"it has no frame at {wanted[t]:.3f} s for episode {row['episode_index']}", t)

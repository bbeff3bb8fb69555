"""The three kinds of files of Atari-HEAD v4: the list of trials, the rows of a trial, and the archive of its frames."""

import csv
import io
import re
import struct
import tarfile
import warnings
import zlib
from bz2 import BZ2File
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from worldmodels.data.sources.reading import MAX_FRAMES, bad
from worldmodels.types import ACTIONS, UserError

HEADER = "frame_id,episode_id,score,duration(ms),unclipped_reward,action,gaze_positions"
MAX_MEMBER = 2**20  # bytes of one PNG, of a header of the archive, or of a line; a frame takes a few thousand
MAX_PIXELS = 2**20  # of a frame
_MAX_WAITING = 2**30  # bytes of PNGs that come before their turn
_TRIAL = re.compile(r"([0-9]{1,9})_([^_]+)_[0-9]+_.*\.tar\.bz2")
_DAMAGE = (tarfile.TarError, csv.Error, zlib.error, struct.error, OSError, EOFError, SyntaxError)
_DAMAGE += (ValueError, TypeError, LookupError, AttributeError, OverflowError)


class Trial(NamedTuple):
    """What a trial's file name and meta_data.csv say of it; `chain` is the trial that its chain began with."""

    number: int
    subject: str
    game: str
    chain: int
    frame_averaging: bool


class Log(NamedTuple):
    """The rows of a trial.

    Args:
        frame: (N,) names of the frames, which end in `_{number}`.
        number: (N,) int64.
        episode: (N,) int64, that of the row before where it is null, -1 where none was told yet.
        reward: (N,) float64, NaN where it is null.
        action: (N,) int64, -1 where it is null or no action of the 18.
    """

    frame: list[str]
    number: np.ndarray
    episode: np.ndarray
    reward: np.ndarray
    action: np.ndarray


def read_trials(path: str, parts: list[str]) -> list[Trial]:
    """What is known of the trials with these archives.

    Raises:
        UserError: meta_data.csv is missing, damaged, or does not list one of them.
    """
    beside = (Path(path), Path(path).resolve().parent)
    file = next((folder / "meta_data.csv" for folder in beside if (folder / "meta_data.csv").is_file()), None)
    if file is None:
        mend = "download it from https://zenodo.org/records/3451402; it says which trials go on from another"
        raise bad(path, f"there is no meta_data.csv in it or beside it: {mend}")
    listed: dict[int, tuple[str, int, bool]] = {}
    with sentences(file), open(file, newline="", encoding="utf-8-sig") as f:
        for row, line in enumerate(csv.DictReader(f)):
            if not any(line.values()):
                continue
            try:
                game, averaged = line["GameName"].removesuffix("_highscore"), line["frame_averaging"].strip().lower()
                before = int(_number(line["load_trial"]) or 0)
                listed[int(line["trial_id"])] = game, before, averaged in ("true", "1")
            except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
                needed = "GameName, trial_id, load_trial and frame_averaging"
                raise bad(file, f"it must have {needed}, with whole numbers in the middle two", row) from e
    trials = []
    for part in parts:
        name = _TRIAL.fullmatch(PurePosixPath(part).name)
        if not name or int(name[1]) not in listed:
            raise bad(
                Path(path, part), "it is not named after a trial of meta_data.csv, as in 52_RZ_239_Aug-10.tar.bz2"
            )
        trial = chain = int(name[1])
        for _ in listed:  # as many steps as there are trials at most: a damaged list may go round in circles
            chain = listed.get(chain, ("", 0, False))[1] or chain
        trials.append(Trial(trial, name[2], listed[trial][0], chain, listed[trial][2]))
    return trials


def read_log(file: Path) -> Log:
    """The rows of a trial's .txt, with the gaze left out.

    Raises:
        UserError: it is missing or damaged.
    """
    names, rows, episode = [], [], -1.0
    with sentences(file), open(file, encoding="utf-8") as f:
        if f.readline(MAX_MEMBER).strip() != HEADER:
            raise bad(file, f"its first line is not {HEADER}")
        for row, line in enumerate(iter(lambda: f.readline(MAX_MEMBER), "")):
            if not line.strip():
                continue
            cells = line.rstrip("\r\n").split(",", 6)  # not by a CSV reader: the gaze goes on for any number of values
            name = re.fullmatch(r".*_([0-9]{1,15})", cells[0])
            if row >= MAX_FRAMES or len(cells) < 7 or not name:
                raise bad(file, "it is no frame's name that ends in its number, and six more columns", row)
            try:
                told, reward, action = (_number(cells[k]) for k in (1, 4, 5))
                episode = episode if told is None else int(told)
            except ValueError as e:
                raise bad(file, "episode_id, unclipped_reward and action must be numbers or null", row) from e
            names.append(cells[0])
            action = action if action in range(len(ACTIONS)) else -1
            rows.append((int(name[1]), episode, np.nan if reward is None else reward, action))
    if len(set(names)) < len(names):
        raise bad(file, "it lists a frame twice")
    number, episodes, rewards, actions = np.array(rows, np.float64).reshape(-1, 4).T
    return Log(names, number.astype(np.int64), episodes.astype(np.int64), rewards, actions.astype(np.int64))


def _number(cell: str) -> float | None:
    if cell.strip() in ("", "null"):
        return None
    if not abs(value := float(cell)) < 1e9:
        raise ValueError(cell)
    return value


def read_pictures(file: Path, names: list[str]) -> Iterator[bytes]:
    """The PNGs of these frames, in this order, in one pass over the archive.

    Those that lie in the archive before their turn wait in memory, as PNGs.

    Raises:
        UserError: a frame is missing, or the archive is damaged or hostile.
    """
    wanted, waiting, turn, held = {name: k for k, name in enumerate(names)}, dict[int, bytes](), 0, 0
    with sentences(file), BZ2File(file) as f:
        for name, png in _members(f, MAX_MEMBER * (64 + len(names) // 8)):
            if (k := wanted.pop(name, None)) is None:  # no row of the log has it
                continue
            waiting[k] = png
            held += len(png)
            if held > _MAX_WAITING:
                raise bad(file, "its frames are too far from the order of the .txt beside it")
            while turn in waiting:
                held -= len(waiting[turn])
                yield waiting.pop(turn)
                turn += 1
            if turn == len(names):
                return
    raise bad(file, f"the frame {names[turn]} is not in it, but in the .txt beside it; download the two again")


def _members(f: Any, limit: int) -> Iterator[tuple[str, bytes]]:
    """Name without .png and content of each PNG of a tar file, of which no more than `limit` bytes are read."""
    with tarfile.open(fileobj=_Forward(f, limit), mode="r:") as tar:  # pyrefly: ignore
        while member := tar.next():
            tar.members.clear()  # or memory would grow with the archive
            path = PurePosixPath(member.name)
            if member.isreg() and path.suffix == ".png" and ".." not in path.parts and not path.is_absolute():
                tar.fileobj.seek(member.offset_data)  # pyrefly: ignore
                yield path.stem, tar.fileobj.read(member.size)  # pyrefly: ignore


class _Forward:
    """What tarfile may do with a stranger's archive: go forward, not for ever, and by small reads."""

    def __init__(self, f: Any, limit: int) -> None:
        self.tell, self._f, self._limit = f.tell, f, limit

    def seek(self, position: int) -> int:
        if not self.tell() <= position <= self._limit:
            raise tarfile.ReadError(f"a member's length is absurd: it would end at byte {position}")
        return self._f.seek(position)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_MEMBER:
            raise tarfile.ReadError(f"a member of {size} bytes is no frame; {MAX_MEMBER} are read at most")
        return self._f.read(size)


def decode(png: bytes, file: Path, name: str) -> np.ndarray:
    """A picture as (H, W, 3) uint8.

    Raises:
        UserError: it is none, or too large.
    """
    from PIL import Image

    with sentences(f"{file}, {name}.png"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unusual palettes
        width, height = struct.unpack(">II", png[16:24])
        if not 0 < width * height <= MAX_PIXELS:
            raise bad(file, f"{name}.png claims to be {height}x{width}, which is no screen of the console")
        with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
            return np.array(picture.convert("RGB"))


@contextmanager
def sentences(where: str | Path) -> Iterator[None]:
    """What the libraries make of damaged bytes, as a sentence."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGE as e:
        raise bad(where, f"it is missing or damaged ({type(e).__name__}: {str(e).partition(chr(10))[0]})") from e

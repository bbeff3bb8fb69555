"""Recordings in .npz files, one episode a file: what `worldmodels export format=npz` writes, and what people save.

A file holds `obs` (T or T+1, H, W[, 3]) uint8, `action` (T,) in ALE's 18-action set, `reward` (T,), and where they are
known `terminated`, `truncated` and `life_loss` (T,). An episode without flags is open: what came after is not known.
Files are read in natural order (ep_2 before ep_10). A dataset card may lie beside them as card.json.

The layout is NumPy's (numpy, doc/neps/nep-0001-npy-format.rst): a zip archive of .npy members. Nothing is unpickled,
and no memory is taken before the archive's directory and the member's header agree on its size.
"""

import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy

from worldmodels.data.card import Card
from worldmodels.data.sources.reading import bad
from worldmodels.data.sources.recordings import (
    ARRAYS,
    check_array,
    file_of,
    files,
    frame_of,
    recording,
    recording_card,
    same_frame,
)
from worldmodels.types import Episode, UserError

_DAMAGE = (BadZipFile, zlib.error, TokenError, SyntaxError, EOFError, OSError, RuntimeError)
_DAMAGE += (ValueError, TypeError, LookupError, AttributeError)  # a damaged header can be anything


def npz_card(path: str, game: str | None = None, **about: Any) -> Card:
    """The dataset card of the files at `path`.

    Args:
        path: a folder of .npz files, or one file.
        game: ALE's name, where no card.json tells it.
        about: other fields of the card, see `recording_card`.

    Raises:
        UserError: there are no files, the first cannot be read, or the game is not told.
    """
    first = files(path, (".npz",))[0]
    members = headers(first)
    return recording_card("npz", path, _frame(first, members), game, "truncated" in members, **about)


def npz_parts(path: str, **about: Any) -> list[str]:
    """The names of the files at `path`, in natural order."""
    return [file.name for file in files(path, (".npz",))]


def npz(path: str, part: str, **about: Any) -> Iterator[Episode]:
    """The episode of one file.

    Args:
        path: as in `npz_card`.
        part: name of the file.
        about: what only the card needs.

    Raises:
        UserError: the file is damaged or hostile, or what it holds is no episode like the others.
    """
    file = file_of(path, part)
    same_frame(file, _frame(file, headers(file)), _first_frame(path, Path(path).stat().st_mtime_ns))
    yield recording(file, load(file, ARRAYS))


def headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each of `ARRAYS` that the file holds, checked against the member's size; no array is read.

    Raises:
        UserError: the file is damaged or hostile.
    """
    with _opened(path) as archive:
        return {name: _header(archive, name, path) for name in ARRAYS if f"{name}.npy" in archive.NameToInfo}


def load(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that the file holds.

    Raises:
        UserError: the file is damaged or hostile.
    """
    arrays = {}
    with _opened(path) as archive:
        for name in names:
            if f"{name}.npy" in archive.NameToInfo:
                _header(archive, name, path)
                with archive.open(f"{name}.npy") as f:
                    arrays[name] = npy.read_array(f, allow_pickle=False)
    return arrays


@contextmanager
def _opened(path: Path) -> Iterator[ZipFile]:
    try:
        with ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            yield archive
    except UserError:
        raise
    except _DAMAGE as e:
        reason = str(e).partition("\n")[0]
        raise bad(path, f"it is no whole .npz file ({reason})") from e


def _header(archive: ZipFile, name: str, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise bad(path, f"{name} is compressed in another way than NumPy's; save it with np.savez_compressed")
    with archive.open(member) as f:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(f)]
        shape, _, dtype = read(f, max_header_size=512)  # numpy writes 118; deep nesting would exhaust the parser
        check_array(path, name, shape, dtype, member.compress_size)
        if prod(shape) * dtype.itemsize != member.file_size - f.tell():
            raise bad(path, f"{name} claims {dtype} {shape} but holds {member.file_size - f.tell()} bytes")
    return shape, dtype


def _frame(path: Path, members: dict[str, tuple[tuple[int, ...], np.dtype]]) -> tuple[int, ...]:
    if "obs" not in members:
        raise bad(path, f"it has no obs; an episode's arrays are {', '.join(ARRAYS)}")
    return frame_of(path, *members["obs"])


@lru_cache(1)
def _first_frame(path: str, changed: int) -> tuple[int, ...]:
    first = files(path, (".npz",))[0]
    return _frame(first, headers(first))

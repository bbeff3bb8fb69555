"""How Minari keeps one episode: a group of an HDF5 file, or an Arrow file (layout and sources: minari.py)."""

import importlib
import json
import mmap
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worldmodels.data.sources.hdf5 import _checked, _is_here
from worldmodels.data.sources.reading import MAX_FRAMES, bad
from worldmodels.data.sources.recordings import check_array, frame_of
from worldmodels.types import UserError

HDF5, ARROW = "main_data.hdf5", "part-0.arrow"
_NAMES = {"actions": "action", "rewards": "reward", "terminations": "terminated", "truncations": "truncated"}
_JPEGS = 256  # files read from the disk at a time
_DAMAGE = (OSError, ValueError, LookupError, AttributeError, RuntimeError, TypeError, MemoryError, struct.error)
_UINT8 = np.dtype(np.uint8)


class Stored(NamedTuple):
    """An open episode of T steps: T+1 frames of one shape (H, W) or (H, W, 3), and columns by the names of `Episode`.

    `rows` can be sliced to arrays of uint8, or to JPEG files.
    """

    where: Path
    rows: Any
    jpeg: bool
    shape: tuple[int, ...]
    columns: dict[str, np.ndarray]

    def frames(self) -> np.ndarray:
        """(T+1, H, W) or (T+1, H, W, 3) uint8.

        Raises:
            UserError: a frame is damaged, or of another size than the first.
        """
        if not self.jpeg:
            return np.asarray(self.rows[:]).reshape(len(self.rows), *self.shape)
        out = np.empty((len(self.rows), *self.shape), np.uint8)
        for start in range(0, len(out), _JPEGS):
            for row, data in enumerate(self.rows[start : start + _JPEGS], start):
                picture, shape = _jpeg(data, self.where, row)
                if shape != self.shape:
                    raise bad(self.where, f"its frame is {shape}, but the first is {self.shape}", row)
                try:
                    out[row] = picture
                except _DAMAGE as e:
                    raise bad(self.where, f"its frame is damaged ({e})", row) from e
        return out


@contextmanager
def opened(folder: Path, hdf5: bool, number: str, space: str | None, with_life_loss: bool) -> Iterator[Stored]:
    """Episode `number` of the dataset whose data lie in `folder`.

    Args:
        folder: with main_data.hdf5, or with a folder for each episode.
        hdf5: which of the two.
        number: of the episode.
        space: the observation space, JSON; only raw frames in an Arrow file need its shape.
        with_life_loss: read infos/life_loss of an HDF5 file, too.

    Raises:
        UserError: a file is missing, damaged or hostile, or holds something else than frames.
    """
    file = folder / (HDF5 if hdf5 else f"{number}/{ARROW}")
    where = file / f"episode_{number}" if hdf5 else file
    read = _hdf5(file, where, with_life_loss) if hdf5 else _arrow(file, space)
    with sentences(where), read as (rows, jpeg, columns):
        size = _jpeg(rows[0], where, 0)[1] if jpeg else rows.shape[1:]
        shape = frame_of(where, (len(rows), *size), _UINT8)
        check_array(where, "observations", (len(rows), *shape), _UINT8, file.stat().st_size)
        yield Stored(where, rows, jpeg, shape, columns)


@contextmanager
def sentences(where: str | Path) -> Iterator[None]:
    """What the libraries make of damaged bytes, as a sentence."""
    try:
        yield
    except UserError:
        raise
    except RecursionError as e:
        raise bad(where, "its JSON is nested too deeply") from e
    except _DAMAGE as e:
        why = " ".join(str(e).split())
        raise bad(where, f"it is not as Minari writes it ({type(e).__name__}: {why})") from e


def library(name: str) -> Any:
    """An optional library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise UserError(f'reading Minari needs {name}; install it with: pip install "worldmodels[minari]"') from e


@contextmanager
def _hdf5(file: Path, where: Path, with_life_loss: bool) -> Iterator[tuple[Any, bool, dict]]:
    h5py = library("h5py")

    def child(parent: Any, name: str) -> Any:
        if not _is_here(parent, name, where):
            raise bad(where, f"there is no {name}")
        return parent[name]

    with h5py.File(file) as f:
        group = child(f, where.name)
        rows = child(group, "observations")
        jpeg = isinstance(rows, h5py.Dataset) and h5py.check_vlen_dtype(rows.dtype) == _UINT8
        if jpeg:
            rows = _files(rows, file, where)
        elif _checked(rows, "observations", where).dtype != _UINT8 or rows.ndim not in (2, 3, 4):
            raise bad(where, f"its observations are {rows.dtype} {rows.shape}, not frames of uint8")
        columns = {ours: _checked(child(group, name), name, where)[:] for name, ours in _NAMES.items()}
        if with_life_loss:
            columns["life_loss"] = _checked(child(child(group, "infos"), "life_loss"), "life_loss", where)[1:]
        yield rows, jpeg or rows.ndim == 2, columns


def _files(rows: Any, file: Path, where: Path) -> list[memoryview]:
    """The rows of a dataset of variable length, none of them copied.

    They are found by the format itself (HDF5 file format specification, III.E, global heap), because the library (HDF5
    2.0) crashes where some of these bytes are damaged. A row is a length, the address of a heap, and a number there. A
    heap is "GCOL", at byte 8 its size, and from byte 16 on objects: number, six bytes, size, data padded to 8 bytes.
    """
    plain = not (rows.is_virtual or rows.external or rows.id.get_create_plist().get_nfilters())
    small = rows.ndim == 1 and rows.chunks and max(len(rows), *rows.chunks) <= MAX_FRAMES + 1
    if not plain or not small:
        raise bad(where, f"its observations are {rows.shape} JPEG files, not plainly one a row in this file")
    with open(file, "rb") as f:
        data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))

    @lru_cache(None)
    def heap(address: int) -> dict[int, memoryview]:
        magic, size = struct.unpack_from("<4s4xQ", data, address)
        if magic != b"GCOL":
            raise ValueError("a heap is damaged")
        objects, at = {}, address + 16
        while at + 16 <= address + size:
            number, length = struct.unpack_from("<H6xQ", data, at)
            if not number:  # the rest is free
                break
            objects[number] = data[at + 16 : at + 16 + length]
            at += 16 + (length + 7) // 8 * 8
        return objects

    found: list[memoryview] = []
    for start in range(0, len(rows), rows.chunks[0]):
        at, count = rows.id.get_chunk_info_by_coord((start,)).byte_offset, min(len(rows) - start, rows.chunks[0])
        chunk = struct.iter_unpack("<IQI", data[at : at + 16 * count])
        found += [heap(address)[number][:length] for length, address, number in chunk]
    return found


@contextmanager
def _arrow(file: Path, space: str | None) -> Iterator[tuple[Any, bool, dict]]:
    pa, ipc = library("pyarrow"), library("pyarrow.ipc")
    with pa.memory_map(str(file)) as source:
        source.seek(8)  # after the magic: from here to the footer the file is a stream
        schema, *messages = ipc.MessageReader.open_stream(source)
        if schema.type != "schema" or any(message.type != "record batch" for message in messages):
            raise bad(file, "it is not one table of Arrow")  # what follows crashes on messages of another type
        if any(_compressed(message.metadata.to_pybytes()) for message in messages):
            raise bad(file, "its record batches are compressed, which Minari does not do")
        schema = ipc.read_schema(schema)
        table = pa.Table.from_batches([ipc.read_record_batch(message, schema) for message in messages], schema)
    table.validate(full=True)
    if not 0 < len(table) <= MAX_FRAMES + 1:
        raise bad(file, f"it has {len(table)} rows; 2 to {MAX_FRAMES + 1} are read")
    rows = table["observations"].combine_chunks()
    kind, jpeg = rows.type, pa.types.is_binary(rows.type)
    if pa.types.is_fixed_size_list(kind) and kind.value_type == pa.uint8():
        rows = rows.flatten().to_numpy().reshape(len(table), *json.loads(space or "{}")["shape"])
    elif not jpeg:
        raise bad(file, f"its observations are {kind}, not frames of uint8")
    yield rows, jpeg, {ours: table[name].to_numpy()[:-1] for name, ours in _NAMES.items()}


def _compressed(metadata: bytes) -> bool:
    """Whether the buffers of a record batch are compressed, and so may unpack to any size.

    That is field 3 of the RecordBatch, which is field 2 of the Message (Apache Arrow, format/Message.fbs).
    """

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", metadata, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0]
        return offset and table + offset

    header = field(struct.unpack_from("<I", metadata)[0], 2)
    return bool(field(header + struct.unpack_from("<I", metadata, header)[0], 3))


def _jpeg(data: Any, where: Path, row: int) -> tuple[Any, tuple[int, ...]]:
    """A picture that is not unpacked yet, and the shape that it will have."""
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            picture = Image.open(BytesIO(memoryview(data)), formats=("JPEG",))
    except (*_DAMAGE, Image.DecompressionBombError) as e:
        raise bad(where, "its frame is no JPEG", row) from e
    colours = {"L": (), "RGB": (3,)}.get(picture.mode)
    if colours is None:
        raise bad(where, f"its frame is a JPEG of mode {picture.mode}, neither grey nor RGB", row)
    return picture, (picture.height, picture.width, *colours)

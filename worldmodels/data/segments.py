"""Immutable Zarr v3 segments: zarr-python makes their metadata and can read them, all goes in and out by our hands.

A segment is the group `000123.zarr` with the rows of its episodes one after the other: `obs` (N, H, W[, 3]) uint8 in
one shard with 16 frames a chunk; `action`, `reward` and `flags` (N,) uncompressed, so that a window of them is one
pread; and `final_obs` (F, H, W[, 3]) for those episodes that have one. Its attributes hold the episode table.

A shard is its chunks one after the other, then the index (offset and size of each, uint64), then the index's crc32c
(zarr-specs, docs/v3/codecs/sharding-indexed). Behind every chunk stands its crc32c (docs/v3/codecs/crc32c): that of the
packed bytes costs nothing to check, where zstd's own, of the frames, takes as long as unpacking them. Segments of
earlier versions have zstd's. Writing a shard here takes memory for 16 frames, where zarr-python wants the whole shard
at once, and a fraction of the time.
"""

import os
import time
import uuid
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from zstandard import ZstdCompressor, ZstdDecompressor, ZstdError

from worldmodels import __version__
from worldmodels.data.checksums import BLANK, KEY, file_table, marked_json
from worldmodels.data.disk import damaged, read_json, remove, sync
from worldmodels.data.groups import add_plain, group_in_memory, write_files
from worldmodels.types import Episode

CHUNK = 16  # frames; neighbours repeat so much that zstd needs no filter, and a short window decodes little else
TERMINATED, TRUNCATED, LIFE_LOSS, FIRST = 1, 2, 4, 8  # bits of the column `flags`
COLUMNS = {"action": "|u1", "reward": "<f4", "flags": "|u1"}
_EMPTY = 2**64 - 1  # offset of a chunk that a writer left out because it is all zero; zarr-python may


def columns(episode: Episode) -> dict[str, np.ndarray]:
    """The scalar columns of an episode, (T,) each, as they are stored."""
    flags = TERMINATED * episode.terminated + TRUNCATED * episode.truncated + LIFE_LOSS * episode.life_loss
    flags = flags.astype(np.uint8)
    flags[0] |= FIRST
    return {"action": episode.action.astype(np.uint8), "reward": episode.reward.astype(np.float32), "flags": flags}


TABLE = {
    "id": "ids",
    "length": "lengths",
    "end": "ends",
    "return": "returns",
    "has_final": "has_final",
    "info": "infos",
}
"""What is known of an episode, and the segment's attribute that lists it, one entry an episode."""


def describe(name: str, episode: Episode) -> dict[str, Any]:
    """What is known of an episode. Its end is `open` where its log simply stops, `gap` where the log has a hole."""
    if episode.terminated[-1] or episode.truncated[-1]:
        end = "terminal" if episode.terminated[-1] else "truncated"
    else:
        end = "gap" if episode.info.get("end") == "gap" else "open"
    return {
        "id": name,
        "length": len(episode),
        "end": end,
        "return": float(episode.reward.sum(dtype=np.float64)),
        "has_final": episode.final_obs is not None,
        "info": dict(episode.info),
    }


class SegmentWriter:
    """Writes a segment episode by episode, in memory that does not grow with its frames.

    It lies at `path`, under a name that no reader looks at, and is whole and durable after `finish`. Used as a context
    manager it is removed when the block ends with an error.

    Args:
        folder: where to make it.
        source: name of the source.
        attributes: further plain data to keep with the segment.
    """

    def __init__(self, folder: Path, source: str, **attributes: Any) -> None:
        self.path, self.rows = folder / f"{uuid.uuid4().hex}.tmp", 0
        made = {"version": 1, "source": source, "writer": f"worldmodels {__version__}", "sealed_at": int(time.time())}
        self._attributes = made | attributes
        self._entries: list[dict[str, Any]] = []
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self._shards = {"obs": _ShardWriter(self.path / "obs", CHUNK)}
        self._shards["final_obs"] = _ShardWriter(self.path / "final_obs", 1)

    def append(self, name: str, episode: Episode) -> None:
        """Add an episode, with its id."""
        self._shards["obs"].append(episode.obs)
        if episode.final_obs is not None:
            self._shards["final_obs"].append(episode.final_obs[None])
        for column, values in columns(episode).items():
            self._columns[column].append(values)
        self._entries.append(describe(name, episode))
        self.rows += len(episode)

    def finish(self) -> None:
        """Write all that is still to be written."""
        group, files = group_in_memory()
        for name, shard in self._shards.items():
            shard.finish(group, name)
        for name, parts in self._columns.items():
            add_plain(group, name, np.concatenate(parts))
        del files["zarr.json"]  # it is still without its attributes
        write_files(self.path, files)
        table = {column: [entry[name] for entry in self._entries] for name, column in TABLE.items()}
        group.update_attributes({KEY: BLANK, **self._attributes, **table, "files": file_table(self.path)})
        with open(self.path / "zarr.json", "wb") as f:
            f.write(marked_json(files["zarr.json"].to_bytes()))
        sync(self.path)

    def __enter__(self) -> "SegmentWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            for shard in self._shards.values():
                with suppress(OSError):  # a full disk refuses what is still in the buffer
                    shard.close()
            remove(self.path)


class _ShardWriter:
    """Appends frames to the only shard of a Zarr array (N, H, W[, 3]) uint8, which has no file before its first one."""

    def __init__(self, path: Path, chunk: int) -> None:
        self._path, self._chunk = path, chunk
        self._count = self._at = 0  # frames, bytes
        self._index: list[tuple[int, int]] = []
        self._zstd = ZstdCompressor(level=1)

    def append(self, frames: np.ndarray) -> None:
        """Add frames (n, H, W[, 3])."""
        if not self._count:
            self._pending = np.zeros((self._chunk, *frames.shape[1:]), np.uint8)
            path = plain_file(self._path.parent, self._path.name, frames.ndim)
            path.parent.mkdir(parents=True)
            self._file = open(path, "wb")  # noqa: SIM115 (closed with the segment)
        while len(frames):
            place = self._count % self._chunk
            taken = min(self._chunk - place, len(frames))
            self._pending[place : place + taken] = frames[:taken]
            self._count, frames = self._count + taken, frames[taken:]
            if place + taken == self._chunk:
                self._write()

    def _write(self) -> None:
        data = _with_crc(self._zstd.compress(self._pending.data))
        self._file.write(data)
        self._index.append((self._at, len(data)))
        self._at += len(data)

    def finish(self, group: Any, name: str) -> None:
        """Write the rest of the shard, and the array's metadata; nothing where there was no frame."""
        from zarr.codecs import Crc32cCodec, ZstdCodec

        if not self._count:
            return
        if left := self._count % self._chunk:
            self._pending[left:] = 0  # the fill value
            self._write()
        self._file.write(_with_crc(np.array(self._index, "<u8").tobytes()))
        self.close()
        frame = self._pending.shape[1:]
        group.create_array(
            name,
            shape=(self._count, *frame),
            dtype="uint8",
            chunks=(self._chunk, *frame),
            shards=(-(-self._count // self._chunk) * self._chunk, *frame),
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
            filters=None,
        )

    def close(self) -> None:
        """Let go of the file."""
        if self._count:
            self._file.close()


def plain_file(group: Path, name: str, ndim: int = 1) -> Path:
    """Where Zarr keeps the only chunk of an `ndim`-dimensional array."""
    return group.joinpath(name, "c", *["0"] * ndim)


def read_column(group: Path, name: str, rows: int) -> np.ndarray:
    """All rows of `action`, `reward` or `flags` of a segment that has so many, (N,).

    Raises:
        UserError: the segment is damaged.
    """
    path, dtype = plain_file(group, name), np.dtype(COLUMNS[name])
    try:
        data = path.read_bytes()
    except FileNotFoundError as e:
        raise damaged(path, "it is missing") from e
    if len(data) != rows * dtype.itemsize:
        raise damaged(path, f"it is of {len(data)} bytes, not {rows * dtype.itemsize}")
    return np.frombuffer(data, dtype)


def read_attributes(path: Path) -> dict[str, Any]:
    """The episode table of a segment.

    Raises:
        UserError: the segment is damaged.
    """
    try:
        return read_json(path / "zarr.json")["attributes"]
    except (FileNotFoundError, KeyError) as e:
        raise damaged(path, "its zarr.json is missing or not ours") from e


class SegmentReader:
    """Reads windows of one segment. Threads and forked processes may share it: it holds no position and no buffer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._plain = {name: _open(plain_file(path, name)) for name in COLUMNS}
        self._obs = FrameReader(path / "obs")

    @cached_property
    def _final_obs(self) -> "FrameReader":
        return FrameReader(self._path / "final_obs")

    def frames(self, start: int, out: np.ndarray, decoder: "Decoder") -> None:
        """Rows `start` to `start + len(out)` of `obs`, as `FrameReader.read`."""
        self._obs.read(start, out, decoder)

    def final(self, number: int, out: np.ndarray, decoder: "Decoder") -> None:
        """Last frame number `number` into `out` (1, H, W[, C])."""
        self._final_obs.read(number, out, decoder)

    def column(self, name: str, start: int, out: np.ndarray, decoder: "Decoder") -> None:
        """Rows `start` to `start + len(out)` of `action`, `reward` or `flags` into `out`, of the column's own type.

        Raises:
            UserError: there are fewer rows.
        """
        if os.preadv(self._plain[name], [out.data], start * out.itemsize) != out.nbytes:
            raise damaged(plain_file(self._path, name), "it is too short")

    def __del__(self) -> None:
        for fd in getattr(self, "_plain", {}).values():
            os.close(fd)


class FrameReader:
    """Reads runs of frames from the shard of a Zarr array (N, H, W[, C]): one pread of the chunks, then zstd."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            meta = read_json(path / "zarr.json")
            shape, shard = meta["shape"], meta["codecs"][0]["configuration"]
            self._shape = tuple(shard["chunk_shape"])
            self._crc = shard["codecs"][-1]["name"] == "crc32c"
        except (FileNotFoundError, LookupError, TypeError) as e:  # the first would look as if the writer had sealed
            raise damaged(path, "its zarr.json is missing or not ours") from e
        self._chunk = self._shape[0]
        self._fd = _open(path.joinpath("c", *["0"] * len(shape)))
        size = os.fstat(self._fd).st_size
        n = 16 * -(-shape[0] // self._chunk)
        tail = os.pread(self._fd, n + 4, max(0, size - n - 4))
        if len(tail) != n + 4 or not _intact(tail):
            raise damaged(path, "its index does not match its checksum")
        self._index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)

        used = self._index[self._index[:, 0] != _EMPTY]
        if (used > size).any() or (used.sum(1) > size).any():
            raise damaged(path, "its index points behind its end")

    def read(self, start: int, out: np.ndarray, decoder: "Decoder") -> None:
        """Frames `start` to `start + len(out)` into `out` (n, H, W[, C]) uint8, of whatever strides.

        Raises:
            UserError: the bytes do not match their checksum.
        """
        stop = start + len(out)
        first, last = start // self._chunk, -(-stop // self._chunk)
        index = self._index[first:last].tolist()
        base = min(offset for offset, _ in index)
        end = max((offset + size for offset, size in index if offset != _EMPTY), default=base)
        data = os.pread(self._fd, end - base, base) if end > base else b""
        at = first * self._chunk
        for offset, size in index:
            a, b = max(start, at), min(stop, at + self._chunk)
            if offset == _EMPTY:
                out[a - start : b - start] = 0
            else:
                packed = data[offset - base : offset - base + size]
                if self._crc and not _intact(packed):
                    raise damaged(self._path, "a chunk does not match its checksum")
                try:
                    chunk = decoder.decode(packed[:-4] if self._crc else packed, self._shape)
                except ZstdError as e:
                    raise damaged(self._path, e) from e
                out[a - start : b - start] = chunk[a - at : b - at]
            at += self._chunk

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class Decoder:
    """Decompresses chunks, one after the other into the same memory. Threads need one each."""

    def __init__(self) -> None:
        self._zstd = ZstdDecompressor()
        self._chunks: dict[tuple[int, ...], np.ndarray] = {}

    def finish(self) -> None:
        """Called when all is asked for; there is nothing left to do here."""

    def decode(self, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        """A chunk of `shape`, uint8, until the next call.

        Raises:
            ZstdError: the data are damaged, or not of that size.
        """
        chunk = self._chunks.get(shape)
        if chunk is None:
            chunk = self._chunks[shape] = np.empty(shape, np.uint8)
        # Unlike `decompress` this neither allocates what a header claims nor gives its memory back after every chunk.
        reader = self._zstd.stream_reader(data)
        if reader.readinto(chunk) != chunk.nbytes or reader.read(1):  # the second goes on to its end
            raise ZstdError("a chunk is not of its size")
        return chunk


def _with_crc(data: bytes) -> bytes:
    return data + crc32c(data).to_bytes(4, "little")


def _intact(data: bytes) -> bool:
    """Whether the last four bytes are the crc32c of those before them."""
    return crc32c(data[:-4]) == int.from_bytes(data[-4:], "little")


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError as e:
        raise damaged(path, "it is missing") from e

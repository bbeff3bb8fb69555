"""Immutable Zarr v3 segments: zarr-python writes them, a few lines of pread and zstd read them.

A segment is the group `000123.zarr` with the rows of its episodes one after the other: `obs` (N, H, W[, 3]) uint8 in
one shard with 16 frames a chunk; `action`, `reward` and `flags` (N,) uncompressed, so that a window of them is one
pread; and `final_obs` (F, H, W[, 3]) for those episodes that have one. Its attributes hold the episode table.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numcodecs import zstd

from worldmodels import __version__
from worldmodels.data.disk import atomic, damaged, read_json
from worldmodels.types import Episode

CHUNK = 16  # frames; neighbours repeat so much that zstd needs no filter, and a short window decodes little else
TERMINATED, TRUNCATED, LIFE_LOSS, FIRST = 1, 2, 4, 8  # bits of the column `flags`
COLUMNS = {"action": "|u1", "reward": "<f4", "flags": "|u1"}
_EMPTY = 2**64 - 1  # offset of a chunk that the writer left out because it is all zero


def columns(episode: Episode) -> dict[str, np.ndarray]:
    """The scalar columns of an episode, (T,) each, as they are stored."""
    flags = TERMINATED * episode.terminated + TRUNCATED * episode.truncated + LIFE_LOSS * episode.life_loss
    flags = flags.astype(np.uint8)
    flags[0] |= FIRST
    return {"action": episode.action.astype(np.uint8), "reward": episode.reward.astype(np.float32), "flags": flags}


def write_segment(path: Path, source: str, ids: Sequence[str], episodes: Iterable[Episode], rows: int) -> None:
    """Write one segment, which is visible only when it is whole.

    Args:
        path: `.../000123.zarr`, which must not exist.
        source: name of the source.
        ids: id of each episode.
        episodes: the episodes, at least one; their frames are held in memory once.
        rows: of all episodes together.
    """
    from zarr import create_group  # half a second, and readers do without it

    frames, table, start = np.empty(0, np.uint8), [], 0
    for e in episodes:
        frames = frames if start else np.empty((rows, *e.obs.shape[1:]), np.uint8)
        frames[start : start + len(e)] = e.obs
        start += len(e)
        table.append(replace(e, obs=np.empty(0, np.uint8)))
    with atomic(path) as tmp:
        group = create_group(tmp, zarr_format=3)
        _write_frames(group, "obs", frames, CHUNK)
        if finals := [e.final_obs for e in table if e.final_obs is not None]:
            _write_frames(group, "final_obs", np.stack(finals), 1)
        for name in COLUMNS:
            write_plain(group, name, np.concatenate([columns(e)[name] for e in table]))
        files = {str(f.relative_to(tmp)): f.read_bytes() for f in sorted(tmp.glob("*/**/*")) if f.is_file()}
        checks = {name: [len(data), crc32c(data)] for name, data in files.items()}
        made = {"version": 1, "source": source, "writer": f"worldmodels {__version__}", "sealed_at": int(time.time())}
        group.update_attributes({**made, **episode_table(ids, table), "files": checks})


def episode_table(ids: Sequence[str], episodes: Sequence[Episode]) -> dict[str, Any]:
    """What a segment's attributes say of its episodes, one list entry an episode."""
    return {
        "ids": list(ids),
        "lengths": [len(e) for e in episodes],
        "ends": ["terminal" if e.terminated[-1] else "truncated" if e.truncated[-1] else "open" for e in episodes],
        "returns": [float(e.reward.sum(dtype=np.float64)) for e in episodes],
        "has_final": [e.final_obs is not None for e in episodes],
        "infos": [dict(e.info) for e in episodes],
    }


def _write_frames(group: Any, name: str, frames: np.ndarray, chunk: int) -> None:
    from zarr.codecs import ZstdCodec

    array = group.create_array(
        name,
        shape=frames.shape,
        dtype="uint8",
        chunks=(chunk, *frames.shape[1:]),
        shards=(-len(frames) // chunk * -chunk, *frames.shape[1:]),
        compressors=ZstdCodec(level=1, checksum=True),
        filters=None,
        config={"write_empty_chunks": True},
    )
    array[:] = frames


def write_plain(group: Any, name: str, values: np.ndarray) -> None:
    """Write an array (N, ...) uncompressed and in one chunk: the file is the array's bytes."""
    group.create_array(
        name, data=values, chunks=values.shape, compressors=None, filters=None, config={"write_empty_chunks": True}
    )


def plain_file(group: Path, name: str, ndim: int = 1) -> Path:
    """Where Zarr keeps the only chunk of an `ndim`-dimensional array."""
    return group.joinpath(name, "c", *["0"] * ndim)


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
        self.obs = FrameReader(path / "obs")
        self.final_obs = FrameReader(path / "final_obs") if (path / "final_obs").exists() else None

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of `action`, `reward` or `flags`."""
        dtype = np.dtype(COLUMNS[name])
        data = os.pread(self._plain[name], (stop - start) * dtype.itemsize, start * dtype.itemsize)
        if len(data) != (stop - start) * dtype.itemsize:
            raise damaged(plain_file(self._path, name), "it is too short")
        return np.frombuffer(data, dtype)

    def __del__(self) -> None:
        for fd in getattr(self, "_plain", {}).values():
            os.close(fd)


class FrameReader:
    """Reads runs of frames from the shard of a Zarr array (N, H, W[, C]): one pread of the chunks, then zstd."""

    def __init__(self, path: Path) -> None:
        meta = read_json(path / "zarr.json")
        self._path = path
        self._chunk = meta["codecs"][0]["configuration"]["chunk_shape"][0]
        self._shape = tuple(meta["shape"][1:])
        self._fd = _open(path.joinpath("c", *["0"] * len(meta["shape"])))
        size = os.fstat(self._fd).st_size
        n = 16 * -(-meta["shape"][0] // self._chunk)  # the index: offset and size of each chunk, then a checksum
        tail = os.pread(self._fd, n + 4, max(0, size - n - 4))
        if len(tail) != n + 4 or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise damaged(path, "its index does not match its checksum")
        self._index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Frames `start` to `stop` into `out` (stop - start, H, W[, C]) uint8, contiguous.

        Raises:
            UserError: the bytes do not match their checksum.
        """
        first, last = start // self._chunk, -(-stop // self._chunk)
        index = [(int(o), int(n)) for o, n in self._index[first:last]]
        base = min(o for o, _ in index)
        end = max((o + n for o, n in index if o != _EMPTY), default=base)
        data = memoryview(os.pread(self._fd, end - base, base) if end > base else b"")
        scratch = np.empty((self._chunk, *self._shape), np.uint8)
        for i, (offset, size) in enumerate(index, first):
            a, b = max(start, i * self._chunk), min(stop, (i + 1) * self._chunk)
            target = out[a - start : b - start]
            if offset == _EMPTY:
                target[:] = 0
                continue
            whole = b - a == self._chunk
            try:
                zstd.decompress(data[offset - base : offset - base + size], target if whole else scratch)
            except (RuntimeError, ValueError) as e:
                raise damaged(self._path, e) from e
            if not whole:
                target[:] = scratch[a - i * self._chunk : b - i * self._chunk]

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError as e:
        raise damaged(path, "it is missing") from e

"""Segments: plain Zarr that every reader reads alike, and nothing left behind where one cannot be written."""

import errno
import json
import math
import os
import shutil
import threading

import numpy as np
import pytest
import zarr
from google_crc32c import value as crc32c
from zarr.codecs import Crc32cCodec, ZstdCodec

from tests.unit.stores import SEGMENTS, by_tensorstore, episode, filled, flip
from worldmodels.data.disk import read_json
from worldmodels.data.segments import (
    COLUMNS,
    Decoder,
    FrameReader,
    SegmentReader,
    SegmentWriter,
    columns,
    read_attributes,
)
from worldmodels.data.store import Store
from worldmodels.types import Episode, UserError


def test_segments_are_plain_zarr_with_checksums(tmp_path):
    filled(tmp_path / "s", seal_at=(11,))
    group = zarr.open_group(tmp_path / "s" / SEGMENTS / "000000.zarr", mode="r")
    rows = group["action"].shape[0]
    assert group["obs"].chunks == (16, 8, 8, 3) and group["obs"].shards == (-(-rows // 16) * 16, 8, 8, 3)
    codec = json.loads((tmp_path / "s" / SEGMENTS / "000000.zarr/obs/zarr.json").read_text())["codecs"][0]
    zstd, crc = codec["configuration"]["codecs"][-2:]
    assert zstd == {"name": "zstd", "configuration": {"level": 1, "checksum": False}} and crc["name"] == "crc32c"
    assert set(group.attrs["files"]) >= {"obs/c/0/0/0/0", "action/c/0", "reward/c/0", "flags/c/0"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("lengths", [[1], [15], [16], [17, 1], [5, 50, 16, 1, 40], [160]])
@pytest.mark.parametrize("finals", ["none", "some", "all"])
def test_a_segment_is_the_same_to_every_reader(tmp_path, channels, lengths, finals):
    has_final = {"none": lambda i: False, "some": lambda i: i % 2 == 0, "all": lambda i: True}[finals]
    episodes = [episode(i, n, channels, final=has_final(i)) for i, n in enumerate(lengths)]
    with SegmentWriter(tmp_path, "toy", colour="blue") as writer:
        for i, e in enumerate(episodes):
            writer.append(f"e{i}", e)
        writer.finish()
    assert writer.rows == sum(lengths)
    want = {"obs": np.concatenate([e.obs for e in episodes])}
    if last := [e.final_obs for e in episodes if e.final_obs is not None]:
        want["final_obs"] = np.stack(last)
    for name, dtype in COLUMNS.items():
        want[name] = np.concatenate([columns(e)[name] for e in episodes])
        assert want[name].dtype == dtype
    group = zarr.open_group(writer.path, mode="r")
    assert set(group.array_keys()) == set(want)
    for name, values in want.items():
        np.testing.assert_array_equal(group[name][:], values, err_msg=name)
        np.testing.assert_array_equal(by_tensorstore(writer.path / name), values, err_msg=name)
    reader, decoder = SegmentReader(writer.path), Decoder()
    for start in {0, 3 % writer.rows, writer.rows - 1}:
        for name, dtype in COLUMNS.items():
            out = np.empty(writer.rows - start, dtype)
            reader.column(name, start, out, decoder)
            np.testing.assert_array_equal(out, want[name][start:], err_msg=name)
        out = np.empty_like(want["obs"][start:])
        reader.frames(start, out, decoder)
        np.testing.assert_array_equal(out, want["obs"][start:])
    for k, frame in enumerate(last):
        out = np.empty((1, *frame.shape), np.uint8)
        reader.final(k, out, decoder)
        np.testing.assert_array_equal(out[0], frame)
    attributes = read_attributes(writer.path)
    assert attributes["lengths"] == lengths and attributes["ids"] == [f"e{i}" for i in range(len(lengths))]
    assert attributes["has_final"] == [has_final(i) for i in range(len(lengths))] and attributes["colour"] == "blue"
    for name, (size, check) in attributes["files"].items():
        data = (writer.path / name).read_bytes()
        assert (size, check) == (len(data), crc32c(data)), name
    assert set(attributes["files"]) == {
        p.relative_to(writer.path).as_posix() for p in writer.path.glob("*/**/*") if p.is_file()
    }


def test_a_shard_is_the_one_that_zarr_python_writes(tmp_path):
    """And where that leaves out black chunks, our reader knows."""
    frames = episode(0, 70, channels=1).obs
    frames[16:48] = 0
    none = np.zeros(70, bool)
    with SegmentWriter(tmp_path, "toy") as writer:
        writer.append("e", Episode(frames, none.view(np.uint8), none.astype(np.float32), none, none, none))
        writer.finish()
    ours = writer.path / "obs"
    for full in (True, False):
        store = tmp_path / f"theirs{full}"
        kind = {"chunks": (16, 8, 8), "shards": (80, 8, 8), "compressors": [ZstdCodec(level=1), Crc32cCodec()]}
        theirs = zarr.create_array(store, shape=(70, 8, 8), dtype="uint8", **kind, config={"write_empty_chunks": full})
        theirs[:] = frames
        size = (store / "c/0/0/0").stat().st_size
        assert size == (ours / "c/0/0/0").stat().st_size if full else size < (ours / "c/0/0/0").stat().st_size
        out = np.empty_like(frames)
        FrameReader(store).read(0, out, Decoder())
        np.testing.assert_array_equal(out, frames)
        assert {k: v for k, v in read_json(store / "zarr.json").items() if k != "attributes"} == {
            k: v for k, v in read_json(ours / "zarr.json").items() if k != "attributes"
        }


def test_segments_of_earlier_versions_are_read(tmp_path):
    """Their chunks have zstd's checksum, and no other."""
    frames, out = episode(0, 32, channels=1).obs, np.empty((32, 8, 8), np.uint8)
    kind = {"chunks": (16, 8, 8), "shards": (32, 8, 8), "compressors": ZstdCodec(level=1, checksum=True)}
    zarr.create_array(tmp_path, shape=frames.shape, dtype="uint8", **kind)[:] = frames
    FrameReader(tmp_path).read(0, out, Decoder())
    np.testing.assert_array_equal(out, frames)
    flip(tmp_path / "c/0/0/0", 500)
    with pytest.raises(UserError, match="is damaged"):
        FrameReader(tmp_path).read(0, out, Decoder())


def test_a_segment_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), SegmentWriter(tmp_path, "toy") as writer:
        writer.append("e", episode(0, 40))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_segment_that_a_full_disk_stops_leaves_nothing(tmp_path, monkeypatch):
    """Wherever it stops: nobody but the thread that removes the segment touches its folder."""
    count, at = 0, math.inf

    def counted(call):
        def before(*args, **kw):
            nonlocal count
            count += 1
            if count >= at or threading.current_thread() is not threading.main_thread():
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kw)

        return before

    for name in ("mkdir", "fsync", "replace", "link"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))

    def write():
        nonlocal count
        count = 0
        with SegmentWriter(tmp_path, "toy") as writer:
            writer.append("e", episode(0, 40, final=True))
            writer.finish()
        return writer.path

    shutil.rmtree(write())
    calls = count
    assert calls > 20
    for k in range(1, calls + 1):
        at = k
        with pytest.raises(OSError, match="No space left"):
            write()
        assert not list(tmp_path.iterdir()), k


@pytest.mark.parametrize("entry", [(2**63, 100), (2**40, 100), (0, 2**40), (2**64 - 2, 2**64 - 2)])
def test_an_index_that_points_outside_its_shard_is_noticed(tmp_path, entry):
    filled(tmp_path / "s", count=6)
    shard = tmp_path / "s" / SEGMENTS / "000000.zarr/obs/c/0/0/0/0"
    n = 16 * len(np.arange(0, zarr.open_group(shard.parents[5], mode="r")["obs"].shape[0], 16))
    data = shard.read_bytes()
    index = np.frombuffer(data[-n - 4 : -4], "<u8").copy()
    index[:2] = entry
    shard.write_bytes(data[: -n - 4] + index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little"))
    with pytest.raises(UserError, match="its index points behind its end"):
        Store.open(tmp_path / "s").episode(0)

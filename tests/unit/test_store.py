import errno
import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from google_crc32c import value as crc32c
from zarr.codecs import Crc32cCodec, ZstdCodec

from tests.unit.stores import assert_holds, assert_same, card, episode, filled
from worldmodels.data import store as store_module
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
from worldmodels.types import Episode, Segment, UserError

SEGMENTS = Path("segments/toy")


# What goes in comes out


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_is_exact_staged_sealed_and_reopened(tmp_path, channels):
    store, episodes = filled(tmp_path / "s", channels=channels)
    assert len(list((tmp_path / "s" / SEGMENTS).glob("*.zarr"))) == 2
    assert len(list((tmp_path / "s/staging/toy").glob("*.npz"))) == 2
    assert_holds(store, episodes)
    with Store.create(tmp_path / "s", card(channels)) as writer:
        assert_holds(writer, episodes)
        writer.append(episode(12, channels=channels))
    assert not list((tmp_path / "s/staging/toy").iterdir()), "leaving the block seals"
    assert_holds(Store.open(tmp_path / "s"), [*episodes, episode(12, channels=channels)])


def test_black_frames_and_zero_rewards_are_kept(tmp_path):
    e = episode(0, 40, final=True)
    e.obs[:], e.reward[:], e.action[:], e.life_loss[:], e.final_obs[:] = 0, 0, 0, False, 0
    with Store.create(tmp_path / "s", card()) as store:
        store.append(e)
    assert_same(Store.open(tmp_path / "s").episode(0), e)


def test_a_full_staging_area_is_sealed(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SEGMENT_FRAMES", 100)
    with Store.create(tmp_path / "s", card()) as store:
        for i in range(7):
            store.append(episode(i, 30))
    assert [zarr.open_group(p)["action"].shape for p in sorted((tmp_path / "s" / SEGMENTS).iterdir())] == [
        (120,),
        (90,),
    ]


def test_episode_table(tmp_path):
    store, episodes = filled(tmp_path / "s")
    for i, e in enumerate(episodes):
        info = store.episode_info(i)
        assert info["length"] == len(e) and info["info"] == {"number": i}
        assert info["end"] == ("terminal" if e.terminated[-1] else "truncated")
        assert info["return"] == pytest.approx(e.reward.sum())
    np.testing.assert_array_equal(store.column("reward"), np.concatenate([e.reward for e in episodes]))
    np.testing.assert_array_equal(store.column("action"), np.concatenate([e.action for e in episodes]))
    assert np.flatnonzero(store.column("flags") & 8).tolist() == store.offsets[:-1].tolist()
    assert store.offsets[-1] == sum(map(len, episodes))


# Our reader and zarr-python's


def reference(store, root, starts, length):
    """The windows by zarr-python and plain loops."""
    obs_shape = (store.card["obs"]["height"], store.card["obs"]["width"])
    channels = store.card["obs"]["channels"]
    episodes = []
    for path in sorted((root / SEGMENTS).glob("*.zarr")):
        g = zarr.open_group(path, mode="r")
        a, row, final = g.attrs, 0, 0
        for n, has_final in zip(a["lengths"], a["has_final"], strict=True):
            rows = {k: g[k][row : row + n] for k in ("obs", "action", "reward", "flags")}
            episodes.append((rows, g["final_obs"][final] if has_final else None))
            row, final = row + n, final + has_final
    b = len(starts)
    obs = np.zeros((b, length + 1, channels, *obs_shape), np.uint8)
    out = {k: np.zeros((b, length)) for k in ("action", "reward", "flags", "mask", "next_mask")}
    for k, (i, start) in enumerate(starts):
        rows, final = episodes[i]
        n = len(rows["action"])
        for t in range(length + 1):
            frame = rows["obs"][start + t] if 0 <= start + t < n else final if start + t == n and t else None
            if frame is not None:
                obs[k, t] = frame.reshape(*obs_shape, channels).transpose(2, 0, 1)
            if t < length and 0 <= start + t < n:
                for name in ("action", "reward", "flags"):
                    out[name][k, t] = rows[name][start + t]
                out["mask"][k, t] = True
                out["next_mask"][k, t] = start + t + 1 < n or final is not None
    flags = out.pop("flags").astype(int)
    bits = {"terminated": flags & 1 > 0, "truncated": flags & 2 > 0, "life_loss": flags & 4 > 0}
    return {"obs": obs, **out, **bits}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_reader_equals_zarr_python_on_every_window(tmp_path, channels, length):
    store, episodes = filled(tmp_path / "s", count=10, seal_at=(4, 9), channels=channels)
    starts = [(i, s) for i, e in enumerate(episodes) for s in range(-min(length, 4), len(e) + 2)]
    got, want = store.read(starts, length), reference(store, tmp_path / "s", starts, length)
    assert isinstance(got, Segment) and got.obs.is_contiguous()
    dtypes = {"obs": torch.uint8, "action": torch.int64, "reward": torch.float32}
    for name, values in want.items():
        tensor = got.side[name] if name == "life_loss" else getattr(got, name)
        np.testing.assert_array_equal(tensor.numpy(), values, err_msg=name)
        assert tensor.dtype == dtypes.get(name, torch.bool), name


def test_staged_windows_equal_sealed_ones(tmp_path):
    store, episodes = filled(tmp_path / "s", seal_at=())
    starts = [(i, s) for i, e in enumerate(episodes) for s in range(-3, len(e), 4)]
    staged = store.read(starts, 9)
    with Store.open(tmp_path / "s", write=True):
        pass  # seals
    assert not list((tmp_path / "s/staging/toy").iterdir())
    again, fresh = store.read(starts, 9), Store.open(tmp_path / "s").read(starts, 9)
    for name in Segment.__dataclass_fields__:
        if name != "side":
            assert torch.equal(getattr(staged, name), getattr(again, name)), f"{name} of a reader that saw it staged"
            assert torch.equal(getattr(staged, name), getattr(fresh, name)), name


def test_no_such_episode(tmp_path):
    store, _ = filled(tmp_path / "s", count=2)
    for i in (-1, 2):
        with pytest.raises(IndexError, match=f"episode {i} of a store with 2"):
            store.read([(i, 0)], 3)


def test_segments_are_plain_zarr_with_checksums(tmp_path):
    filled(tmp_path / "s", seal_at=(11,))
    group = zarr.open_group(tmp_path / "s" / SEGMENTS / "000000.zarr", mode="r")
    rows = group["action"].shape[0]
    assert group["obs"].chunks == (16, 8, 8, 3) and group["obs"].shards == (-(-rows // 16) * 16, 8, 8, 3)
    codec = json.loads((tmp_path / "s" / SEGMENTS / "000000.zarr/obs/zarr.json").read_text())["codecs"][0]
    zstd, crc = codec["configuration"]["codecs"][-2:]
    assert zstd == {"name": "zstd", "configuration": {"level": 1, "checksum": False}} and crc["name"] == "crc32c"
    assert set(group.attrs["files"]) >= {"obs/c/0/0/0/0", "action/c/0", "reward/c/0", "flags/c/0"}


def by_tensorstore(array):
    kind = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array}/"}}
    return tensorstore.open(kind, read=True).result().read().result()


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


def test_a_segment_that_a_full_disk_does_not_let_in_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store.create(tmp_path / "s", card()) as store:
        store.append(episode(0))
        with monkeypatch.context() as patch, pytest.raises(UserError, match="is full"):
            patch.setattr(os, "rename", full)
            store.seal()
        assert not list(tmp_path.rglob("*.tmp*"))
        assert_holds(store, [episode(0)])
    assert_holds(Store.open(tmp_path / "s"), [episode(0)])


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


def test_more_segments_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_reader", lru_cache(2)(store_module._reader.__wrapped__))
    store, episodes = filled(tmp_path / "s", count=20, seal_at=range(20), length=5)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        windows = store.read([(i, 0) for i in range(20)], 5)
        for i, e in enumerate(episodes):
            np.testing.assert_array_equal(windows.obs[i, :5].numpy().transpose(0, 2, 3, 1), e.obs)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 5


# Crashes


def test_leftovers_of_a_crash_are_tidied(tmp_path):
    root = tmp_path / "s"
    _, episodes = filled(root, seal_at=())
    staged = tmp_path / "copies"
    shutil.copytree(root / "staging/toy", staged)
    with Store.open(root, write=True):
        pass
    for name in ("000000003.npz", "000000011.npz"):  # died after the segment's rename
        shutil.copy(staged / name, root / "staging/toy" / name)
    (root / "staging/toy/000000012.npz.tmp77").write_bytes(b"half")
    (root / SEGMENTS / "000001.zarr.tmp77/obs").mkdir(parents=True)
    (root / "sources/toy.json.tmp77").write_text("{")
    assert_holds(Store.open(root), episodes)
    with Store.open(root, write=True) as store:
        assert_holds(store, episodes)
        assert not list(root.rglob("*.tmp*")) and not list((root / "staging/toy").iterdir())
        store.append(episode(12))
    assert_holds(Store.open(root), [*episodes, episode(12)])


def test_killed_while_being_made(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/store.json.tmp77").write_text("{")
    with pytest.raises(UserError, match="there is no store at"):
        Store.open(tmp_path / "new")
    Store.create(tmp_path / "new", card()).close()
    assert not list((tmp_path / "new").glob("*.tmp*"))
    Store.create(tmp_path / "s", card()).close()
    (tmp_path / "s/sources/toy.json").unlink()
    with pytest.raises(UserError, match="holds no episodes"):
        Store.open(tmp_path / "s")
    with Store.create(tmp_path / "s", card()) as store:
        store.append(episode(0))
    assert_holds(Store.open(tmp_path / "s"), [episode(0)])


def in_process(code, *args):
    """What a program prints that may import the package and these tests' helpers."""
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}"}
    run = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout


# Disks and people


def limited(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_disk_full_keeps_what_is_stored(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    store = Store.create(tmp_path / "s", card())
    for i in range(3):
        store.append(episode(i, 20))  # about 4 kB each
    try:
        limited(8_000)
        with pytest.raises(UserError, match="disk of .* is full; nothing stored is lost"):
            store.append(episode(3, 60))
        with pytest.raises(UserError, match="disk of .* is full; nothing stored is lost"):
            store.seal()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert not list((tmp_path / "s").rglob("*.tmp*"))
    assert_holds(Store.open(tmp_path / "s"), [episode(i, 20) for i in range(3)])
    store.append(episode(3, 60))
    store.seal()
    assert_holds(store, [*(episode(i, 20) for i in range(3)), episode(3, 60)])


@pytest.mark.parametrize("calls", range(1, 30, 4))
def test_every_fsync_may_fail(tmp_path, monkeypatch, calls):
    store = Store.create(tmp_path / "s", card())
    store.append(episode(0))
    left, real = [calls], os.fsync

    def failing(fd):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", failing)
        with pytest.raises(UserError, match="is full"):
            store.append(episode(1))
            store.seal()
            store.append(episode(2))
    store.close()
    with Store.open(tmp_path / "s", write=True) as again:
        count = len(again.lengths)
        assert count >= 1
        assert_holds(again, [episode(i) for i in range(count)])


NO_RIGHTS = """
import os, sys
os.chdir(sys.argv[1])
from stores import card
from worldmodels.data.store import Store
from worldmodels.types import UserError
Store.open("s")  # imports all it needs: the interpreter may be in a folder of root's
import fcntl, numpy.random
if os.getuid() == 0:  # root may do anything
    os.setuid(65534)
for attempt in (lambda: Store.create("closed/s", card()), lambda: Store.open("s", write=True)):
    try:
        attempt()
    except UserError as e:
        print(e)
store = Store.open("s")
print(len(store.lengths), {k: v.tolist() for k, v in store.splits.items()})
"""


def test_no_permission():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        root = Path(folder)
        filled(root / "s", count=3)
        (root / "closed").mkdir()
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        first, second, splits = in_process(NO_RIGHTS, folder).splitlines()
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
        assert "no permission to use closed/s" in first and "no permission to use s/sources/toy.lock" in second
        assert not (root / "s/splits").exists()
        assert splits == "3 " + str({k: v.tolist() for k, v in Store.open(root / "s").splits.items()})


def test_one_writer_and_many_readers(tmp_path):
    first = Store.create(tmp_path / "s", card())
    first.append(episode(0))
    with pytest.raises(UserError, match="another process is writing"):
        Store.open(tmp_path / "s", write=True)
    reader = Store.open(tmp_path / "s")
    first.append(episode(1))
    assert_holds(reader, [episode(0)])
    first.seal()
    assert_same(reader.episode(0), episode(0))
    reader.refresh()
    assert_holds(reader, [episode(0), episode(1)])
    with pytest.raises(ValueError, match="opened for reading"):
        reader.append(episode(2))
    first.close()
    Store.open(tmp_path / "s", write=True).close()


def test_stores_that_cannot_be_opened(tmp_path):
    def refused(match, path=tmp_path / "s", make=Store.open):
        with pytest.raises(UserError, match=match) as e:
            make(path)
        assert "\n" not in str(e.value)

    refused("there is no store at .*; make it with `worldmodels collect")
    (tmp_path / "file").write_text("x")
    refused("is not a store", tmp_path / "file")
    refused("is a file where a folder is needed", tmp_path / "file", lambda p: Store.create(p, card()))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("x")
    refused("is not a store: it has no store.json", tmp_path / "thesis")
    refused(r"holds other things \(chapter.tex\)", tmp_path / "thesis", lambda p: Store.create(p, card()))
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    Store.create(tmp_path / "s", card()).close()
    refused("holds no episodes; fill it with `worldmodels collect")
    header = tmp_path / "s/store.json"
    old = json.loads(header.read_text())
    header.write_text(json.dumps(old | {"version": 7, "min_reader": 6}))
    refused("written by a newer version .* format is 7, this version reads up to 2.*; update worldmodels")
    refused("written by a newer version", make=lambda p: Store.create(p, card()))
    header.write_text(json.dumps({"format": "zip"}))
    refused("store.json is of another program")
    header.write_text("{")
    refused("store.json is damaged")


def test_a_newer_store_that_still_suits_old_readers_opens(tmp_path):
    _, episodes = filled(tmp_path / "s", count=2)
    header = tmp_path / "s/store.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"version": 3}))
    assert_holds(Store.open(tmp_path / "s"), episodes)


def test_adding_what_does_not_fit_is_refused(tmp_path):
    _, episodes = filled(tmp_path / "s", count=2)
    for other, match in [
        (card(side=9), "obs.height=8 but what is to be added to it has 9: give another store"),
        (card(1), "obs.channels=3 .* has 1"),
        (card() | {"game": "pong"}, "game='catch' .* has 'pong'"),
        (card() | {"source": "mario"}, "is of source toy, not mario"),
    ]:
        with pytest.raises(UserError, match=match):
            Store.create(tmp_path / "s", other)
    assert_holds(Store.open(tmp_path / "s"), episodes)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("place", [100, -10])  # in a chunk; in the index
def test_flipped_bit_is_noticed(tmp_path, place):
    filled(tmp_path / "s", count=6)
    flip(tmp_path / "s" / SEGMENTS / "000000.zarr/obs/c/0/0/0/0", place)
    store = Store.open(tmp_path / "s")
    with pytest.raises(UserError, match="000000.zarr/obs is damaged"):
        for i in range(6):
            store.episode(i)


def test_lost_or_hostile_files_are_one_sentence(tmp_path):
    filled(tmp_path / "s", seal_at=(5,))
    (tmp_path / "s" / SEGMENTS / "000000.zarr/reward/c/0").write_bytes(b"")
    with pytest.raises(UserError, match="reward/c/0 is damaged"):
        Store.open(tmp_path / "s").read([(1, 0)], 4)
    (tmp_path / "s" / SEGMENTS / "000000.zarr/obs/zarr.json").unlink()
    with pytest.raises(UserError, match="000000.zarr/obs is damaged"):  # and not asked for again without end
        Store.open(tmp_path / "s").read([(2, 0)], 4)
    staged = tmp_path / "s/staging/toy/000000007.npz"
    mark = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    np.savez(staged, action=np.array([Evil()], object), allow_pickle=True)
    assert pickle.dumps(Evil())
    with pytest.raises(UserError, match="000000007.npz is damaged"):
        Store.open(tmp_path / "s")
    assert not mark.exists()
    shutil.rmtree(tmp_path / "s" / SEGMENTS / "000000.zarr")
    (tmp_path / "s" / SEGMENTS / "000000.zarr").mkdir()
    with pytest.raises(UserError, match="000000.zarr is damaged"):
        Store.open(tmp_path / "s")


# Splits and side columns


def test_splits_are_drawn_once_by_episode(tmp_path):
    store, _ = filled(tmp_path / "a", count=20, seal_at=())
    first = store.splits
    assert [len(first[k]) for k in ("train", "validation", "test")] == [16, 2, 2]
    assert sorted(np.concatenate(list(first.values()))) == list(range(20))
    with Store.open(tmp_path / "a", write=True) as writer:
        writer.append(episode(20))
    later = Store.open(tmp_path / "a").splits
    assert later["train"].tolist() == [*first["train"], 20]
    assert all(np.array_equal(later[k], first[k]) for k in ("validation", "test"))
    same, _ = filled(tmp_path / "b", count=20)
    assert all(np.array_equal(same.splits[k], first[k]) for k in first), "the same seed gives the same split"
    other = Store.create(tmp_path / "c", card(seed=1))
    for i in range(20):
        other.append(episode(i))
    assert not all(np.array_equal(other.splits[k], first[k]) for k in first)


@pytest.mark.parametrize("count, sizes", [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (30, (24, 3, 3))])
def test_few_episodes(tmp_path, count, sizes):
    store, _ = filled(tmp_path / "s", count=count, length=2)
    assert tuple(len(store.splits[k]) for k in ("train", "validation", "test")) == sizes
    assert all(v.dtype == np.int64 for v in store.splits.values())


def test_side_columns(tmp_path):
    store, _ = filled(tmp_path / "s", seal_at=(5, 11))
    n = int(store.offsets[-1])
    rows = np.random.default_rng(0).permutation(n)[: n // 2]
    latent = np.random.default_rng(1).normal(size=(n // 2, 3)).astype(np.float16)
    store.write_side("latent", "a", rows, latent)
    got = store.side("latent", "a")
    assert got.shape == (n, 3) and got.dtype == np.float16
    np.testing.assert_array_equal(got[rows].data, latent)
    assert got.mask.all(axis=1).sum() == n - n // 2 and not got.mask[rows].any()
    store.write_side("latent", "b", np.arange(n), np.zeros(n, np.uint8))
    assert store.side("latent").dtype == np.uint8, "the newest version by default"
    with Store.open(tmp_path / "s", write=True) as writer:
        writer.append(episode(12))
    assert store.side("latent", "a").shape == (n, 3)
    grown = Store.open(tmp_path / "s").side("latent", "b")
    assert grown.shape == (n + len(episode(12)),) and grown.mask[n:].all() and not grown.mask[:n].any()
    for name, version, r, values, match in [
        ("latent", "a", rows, latent, "never overwritten"),
        ("latent", "c", rows, latent[1:], "rows"),
        ("latent", "c", [n + 10**6], [1.0], "seal the store first"),
        ("latent", "c", [0], np.array(["x"]), "<U1"),
    ]:
        with pytest.raises(UserError, match=match):
            store.write_side(name, version, r, values)
    with pytest.raises(UserError, match=r"no side column .*/latent/z; its versions are: \['a', 'b'\]"):
        store.side("latent", "z")
    part = tmp_path / "s/side/latent/a/toy/000001.zarr"
    for file, harm in ((part / "values/c/0/0", lambda p: p.write_bytes(b"abc")), (part / "covered/c/0", Path.unlink)):
        harm(file)
        with pytest.raises(UserError, match="latent/a/toy/000001.zarr is damaged"):
            store.side("latent", "a")

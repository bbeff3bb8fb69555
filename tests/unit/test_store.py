"""What a store gives back, to whom it opens, and what it keeps beside the frames; test_store_faults.py has the rest."""

import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from tests.unit.stores import SEGMENTS, assert_holds, assert_same, card, episode, filled
from worldmodels.data import episodes as episodes_module
from worldmodels.data import store as store_module
from worldmodels.data.store import Store
from worldmodels.types import Segment, UserError

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


def test_more_segments_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(episodes_module, "_reader", lru_cache(2)(episodes_module._reader.__wrapped__))
    store, episodes = filled(tmp_path / "s", count=20, seal_at=range(20), length=5)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        windows = store.read([(i, 0) for i in range(20)], 5)
        for i, e in enumerate(episodes):
            np.testing.assert_array_equal(windows.obs[i, :5].numpy().transpose(0, 2, 3, 1), e.obs)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 5


# Opening and adding


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

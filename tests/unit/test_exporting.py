"""What an export holds: read back by NumPy and by the real Minari, and imported again."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.stores import assert_same, card, episode
from worldmodels.data.exporting import export
from worldmodels.data.sources.atari_play import atari_card, atari_play
from worldmodels.data.sources.minari import minari, minari_card, minari_parts
from worldmodels.data.sources.npz import npz, npz_card, npz_parts
from worldmodels.data.store import Store
from worldmodels.types import UserError


def fill(path, episodes, **fields):
    with Store.create(path, card(**fields)) as store:
        for e in episodes:
            store.append(e)
    return Store.open(path)


@pytest.fixture
def load(monkeypatch):
    """The real library on an export."""

    def load(out, name):
        import minari

        monkeypatch.setenv("MINARI_DATASETS_PATH", str(out / "minari"))
        return minari.load_dataset(name)

    return load


@pytest.fixture(scope="module")
def pong(tmp_path_factory):
    """Three episodes of real Pong, cut after 40 steps."""
    path, settings = tmp_path_factory.mktemp("stores") / "pong", {"game": "pong", "time_limit": 40, "size": 32}
    with Store.create(path, atari_card(3, **settings)) as store:
        for e in atari_play(120, 3, **settings):
            store.append(e)
    return Store.open(path)


def assert_same_play(a, b):
    """But for what only the store knows."""
    assert_same(replace(a, info={}), replace(b, info={}))


def test_minari_is_read_by_the_real_library_and_imported_again(pong, tmp_path, load):
    figures = export(pong, tmp_path, "minari")
    assert (figures["episodes"], figures["steps"], figures["transitions_left_out"]) == (3, 120, 0)
    dataset = load(tmp_path, figures["dataset_id"])
    assert (dataset.total_episodes, dataset.total_steps) == (3, 120)
    assert (dataset.action_space.n, dataset.observation_space.shape) == (18, (32, 32, 3))
    parts = minari_parts(str(tmp_path))
    for i, (read, part) in enumerate(zip(dataset, parts, strict=True)):
        e = pong.episode(i)
        np.testing.assert_array_equal(read.observations, np.concatenate([e.obs, e.final_obs[None]]))
        np.testing.assert_array_equal(read.actions, e.action)
        np.testing.assert_array_equal(read.rewards, e.reward)
        np.testing.assert_array_equal(read.terminations, e.terminated)
        np.testing.assert_array_equal(read.truncations, e.truncated)
        (again,) = minari(str(tmp_path), part)
        assert_same_play(again, e)
    assert minari_card(str(tmp_path)) == pong.card | {"source": "minari"}


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_plain_numpy_and_imported_again(tmp_path, channels):
    lost = np.arange(7) == 2
    episodes = [replace(episode(0, 7, channels), life_loss=np.zeros(7, bool)), episode(1, 7, channels)]
    episodes.append(replace(episode(2, 7, channels), life_loss=lost, final_obs=None))
    store = fill(tmp_path / "store", episodes, channels=channels)
    figures = export(store, tmp_path / "out", "npz")
    assert (figures["episodes"], figures["steps"]) == (3, 21)
    files = sorted((tmp_path / "out").glob("*.npz"))
    assert [file.name for file in files] == [f"{i:09d}.npz" for i in range(3)]
    assert figures["bytes"] > sum(file.stat().st_size for file in files)
    for file, e in zip(files, episodes, strict=True):
        with np.load(file, allow_pickle=False) as f:
            names = {"obs", "action", "reward", "terminated", "truncated"} | (
                {"life_loss"} if e.life_loss.any() else set()
            )
            assert set(f.files) == names
            assert (f["obs"].dtype, f["reward"].dtype, f["truncated"].dtype) == (np.uint8, np.float32, bool)
            assert len(f["obs"]) == 7 + (e.final_obs is not None)
            np.testing.assert_array_equal(f["action"], e.action)
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == store.card
    for part, e in zip(npz_parts(str(tmp_path / "out")), episodes, strict=True):
        (again,) = npz(str(tmp_path / "out"), part)
        assert_same_play(again, e)
    assert npz_card(str(tmp_path / "out")) == store.card | {"source": "npz"}


def test_minari_without_last_frames_loses_the_last_transition_and_says_so(tmp_path, load):
    ends = {0: "terminated", 1: "truncated"}
    episodes = [episode(i, 6, final=False) for i in ends]
    none = np.zeros(6, bool)
    episodes += [replace(episode(2, 6, final=False), terminated=none, truncated=none)]  # open
    episodes += [episode(3, 1, final=False), episode(4, 6, final=True)]
    figures = export(fill(tmp_path / "store", episodes), tmp_path / "out", "minari")
    assert (figures["episodes"], figures["steps"]) == (4, 5 + 5 + 5 + 6)
    assert (figures["transitions_left_out"], figures["episodes_left_out"]) == (4, 1)
    dataset = load(tmp_path / "out", figures["dataset_id"])
    assert dataset.storage.metadata["transitions_left_out"] == 4
    for i in range(3):
        read = dataset[i]
        np.testing.assert_array_equal(read.observations, episodes[i].obs)
        np.testing.assert_array_equal(read.rewards, episodes[i].reward[:-1])
        assert not read.terminations.any()
        assert read.truncations.tolist() == [False] * 4 + [i in ends]
    (whole,) = minari(str(tmp_path / "out"), "episode_3")
    assert_same_play(whole, episodes[4])


@pytest.mark.parametrize("form", ["npz", "minari"])
def test_an_interrupted_export_ends_as_one_without_interruption(tmp_path, form):
    store = fill(tmp_path / "store", [episode(i, 9, final=True) for i in range(4)])
    seen = []

    def stop(steps):
        seen.append(steps)
        if len(seen) == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(store, out, form, stop)
    assert seen == [9, 18, 27]
    left = {p.name: p.stat().st_mtime_ns for p in out.glob("*.npz")}
    assert len(left) == (3 if form == "npz" else 0)
    assert not (out / "minari").exists()
    (out / "minari.tmp77").mkdir()  # as SIGKILL leaves it
    (out / "000000003.npz.tmp77").touch()
    figures = export(store, out, form)
    assert figures["episodes"] == 4
    assert not list(out.glob("*.tmp*"))
    assert all((out / name).stat().st_mtime_ns == time for name, time in left.items()), "what is whole stays"
    parts, read = (npz_parts, npz) if form == "npz" else (minari_parts, minari)
    for i, part in enumerate(parts(str(out))):
        (again,) = read(str(out), part)
        assert_same_play(again, episode(i, 9, final=True))


@pytest.mark.parametrize("form", ["npz", "minari"])
def test_a_store_that_has_grown_is_exported_again(tmp_path, form):
    store = fill(tmp_path / "store", [episode(0, final=True)])
    assert export(store, tmp_path / "out", form)["episodes"] == 1
    store = fill(tmp_path / "store", [episode(1, final=True)])
    assert export(store, tmp_path / "out", form)["episodes"] == 2
    assert len((npz_parts if form == "npz" else minari_parts)(str(tmp_path / "out"))) == 2


def test_what_is_refused_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    store, out = fill(tmp_path / "store", [episode(1)]), tmp_path / "out"
    with pytest.raises(UserError, match="format=avi is unknown; there are npz, minari"):
        export(store, out, "avi")
    assert not out.exists()
    with pytest.raises(UserError, match="holds other things .*; give an empty folder"):
        export(store, tmp_path / "store", "npz")
    export(store, out, "npz")
    before = sorted(out.iterdir())
    other = fill(tmp_path / "other", [episode(2)])
    for what, form in ((other, "npz"), (store, "minari")):
        with pytest.raises(UserError, match="holds an export of another store or format"):
            export(what, out, form)
    assert sorted(out.iterdir()) == before
    for name in ("minari", "h5py"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf'needs {name}; install it with: pip install "worldmodels\[minari\]"'):
                export(store, tmp_path / "new", "minari")

"""Recordings in HDF5 files, written by h5py itself."""

import random
import tracemalloc

import h5py
import numpy as np
import pytest

from tests.unit.stores import assert_same, episode
from tests.unit.test_npz import arrays
from worldmodels.data.sources.hdf5 import hdf5, hdf5_card, hdf5_parts
from worldmodels.types import UserError

PLURAL = {
    "obs": "observations",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminations",
    "truncated": "truncations",
}


def put(group, columns, names=None, without=(), **storage):
    for name, values in columns.items():
        if name not in without:
            group.create_dataset((names or {}).get(name, name), data=values, **storage)


def write(folder, without=(), name="play.h5", **other):
    """One file with the single episode 0 of 9 rows in group ep_0, and other arrays in place of its own."""
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / name, "w") as file:
        put(file.create_group("ep_0"), arrays(episode(0, 9)) | other, without=without)
    return str(folder)


def refused(path, match, part="play.h5/ep_0", **settings):
    with pytest.raises(UserError, match=match) as error:
        hdf5_card(path, game="pong", **settings)
        list(hdf5(path, part, **settings))
    assert "play.h5" in str(error.value) and "\n" not in str(error.value)


def got(path, **settings):
    return [e for part in hdf5_parts(path, **settings) for e in hdf5(path, part, **settings)]


def wanted(k, *args, **kw):
    e = episode(k, *args, **kw)
    e.info.clear()
    return e


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("storage", [{}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}])
def test_round_trip(tmp_path, channels, storage):
    with h5py.File(tmp_path / "play.hdf5", "w") as file:
        for k in range(12):
            put(file.create_group(f"ep_{k}"), arrays(episode(k, channels=channels)), **storage)
        file["about"] = "no episode"
        file.create_group("settings")["fps"] = 60
    path = str(tmp_path)
    assert hdf5_parts(path) == [f"play.hdf5/ep_{k}" for k in range(12)]
    for k, e in enumerate(got(path)):
        assert_same(e, wanted(k, channels=channels))
    card = hdf5_card(path, game="ms_pacman", frame_skip=2)
    assert (card["source"], card["game"], card["frame_skip"]) == ("hdf5", "ms_pacman", 2)
    assert card["obs"] | {"height": 8, "width": 8, "channels": channels} == card["obs"] and card["truncation_known"]


def test_plural_names_several_files_and_an_episode_at_the_root(tmp_path):
    for k, name in enumerate(["b2.h5", "b10.h5", "a.h5"]):
        with h5py.File(tmp_path / name, "w") as file:
            put(file, arrays(episode(k)), PLURAL, without=("life_loss",))
    path = str(tmp_path)
    assert hdf5_parts(path) == ["a.h5", "b2.h5", "b10.h5"]
    for e, k in zip(got(path), (2, 0, 1), strict=True):
        np.testing.assert_array_equal(e.obs, episode(k).obs)
        np.testing.assert_array_equal(e.terminated, episode(k).terminated)
        assert not e.life_loss.any()
    assert [len(e) for e in got(str(tmp_path / "b10.h5"))] == [len(episode(1))]


def test_names_of_ones_own(tmp_path):
    with h5py.File(tmp_path / "play.h5", "w") as file:
        put(file.create_group("0"), arrays(episode(1, final=False)), {"obs": "screen", "terminated": "over"})
    refused(str(tmp_path), "no dataset obs or observations", "play.h5/0")
    names = {"obs": "screen", "terminated": "over", "action": None}
    (e,) = got(str(tmp_path), names=names)
    assert_same(e, wanted(1, final=False))
    assert hdf5_card(str(tmp_path), game="pong", names=names)["obs"]["height"] == 8
    path = str(tmp_path / "play.h5")
    refused(path, "no name of a dataset", names={"obs": "/etc/x"})
    refused(path, "no name of a dataset", names={"obs": ".."})
    refused(path, "names.video=x", names={"video": "x"})
    with pytest.raises(UserError, match="source.padding=-1 must be a whole number of at least 0"):
        hdf5_card(path, game="pong", names=names, padding=-1)


def test_jowa(tmp_path):
    """Three zero rows before each episode; terminals only; numbered groups."""
    names = PLURAL | {"terminated": "terminals"}
    with h5py.File(tmp_path / "Pong.h5", "w") as file:
        for k in (0, 2, 10):
            padded = {n: np.concatenate([0 * v[:3], v]) for n, v in arrays(episode(k, 20, 1, final=False)).items()}
            put(file.create_group(str(k)), padded, names, without=("truncated", "life_loss"))
    path = str(tmp_path / "Pong.h5")
    assert hdf5_parts(path) == ["Pong.h5/0", "Pong.h5/2", "Pong.h5/10"]
    for e, k in zip(got(path, padding=3), (0, 2, 10), strict=True):
        np.testing.assert_array_equal(e.obs, episode(k, 20, 1).obs)
        np.testing.assert_array_equal(e.reward, episode(k, 20, 1).reward)
        assert e.info == {"stripped": {"zero_rows": 3}}
    assert [len(e) for e in got(path)] == [23, 23, 23]
    assert [(len(e), dict(e.info)) for e in got(path, padding=4)] == [(23, {})] * 3  # the fourth row is not zero
    assert not hdf5_card(path, game="pong", padding=3, clipped=True)["truncation_known"]


@pytest.mark.parametrize(
    "change, match",
    [
        ({"without": ("action",)}, "no dataset action or actions"),
        ({"action": np.zeros(0, int), "without": ("obs",), "observations": np.zeros((1, 8, 8), np.uint8)}, "no rows"),
        ({"obs": np.zeros((9, 8, 8), np.float32)}, "obs is float32"),
        ({"obs": np.zeros((9, 3, 8, 8), np.uint8)}, "colour last"),
        ({"action": np.full(9, 18)}, "row 0: action 18"),
        ({"reward": np.array([0, np.inf, 0, 0, 0, 0, 0, 0, 0])}, "row 1: reward inf"),
        ({"terminated": np.ones(9, bool)}, "row 0: terminated is set before the last row"),
        ({"action": np.zeros(7, int)}, "7 actions need"),
        ({"reward": h5py.Empty("f8")}, "reward is no dataset"),
        ({"reward": 5.0}, "rewards are float64"),
        ({"reward": np.array([b"x"] * 9, "S1")}, "not an array of numbers"),
        ({"reward": np.array(["x"] * 9, h5py.string_dtype())}, "never loaded"),
        ({"reward": np.zeros(9, [("a", "f8")])}, "not an array of numbers"),
    ],
)
def test_what_is_no_episode(tmp_path, change, match):
    refused(write(tmp_path, **change), match)


def test_jpeg_rows_of_minari_are_told_apart(tmp_path):
    frames = np.empty(9, object)
    frames[:] = [np.zeros(k + 1, np.uint8) for k in range(9)]
    path = write(tmp_path, without=("obs",))
    with h5py.File(tmp_path / "play.h5", "a") as file:
        file["ep_0"].create_dataset("obs", data=frames, dtype=h5py.vlen_dtype(np.uint8))
    refused(path, "never loaded")


def test_groups_of_two_sizes(tmp_path):
    path = write(tmp_path)
    with h5py.File(tmp_path / "play.h5", "a") as file:
        put(file.create_group("ep_1"), arrays(episode(1, side=4)))
    with pytest.raises(UserError, match=r"play.h5/ep_1: its frames are \(4, 4, 3\)"):
        got(path)


def test_a_file_without_episodes(tmp_path):
    with h5py.File(tmp_path / "play.h5", "w") as file:
        file.create_group("x")["y"] = 1
    refused(str(tmp_path), "no group with obs, action, reward")
    with pytest.raises(UserError, match=r"no \.hdf5 or \.h5 file"):
        hdf5_parts(str(tmp_path / "none"))


def elsewhere(folder):
    """A file outside of the recording, whose bytes must not be read."""
    with h5py.File(folder / "secret.bin", "w") as file:
        put(file.create_group("ep_0"), arrays(episode(7, 9)))
    return folder / "secret.bin"


def hostile(kind, folder):
    path, secret = write(folder), elsewhere(folder)
    with h5py.File(folder / "play.h5", "a") as file:
        group = file["ep_0"]
        if kind == "link to a file":
            del file["ep_0"]
            file["ep_0"] = h5py.ExternalLink(secret, "ep_0")
            return path
        del group["obs"]
        if kind == "link":
            group["obs"] = h5py.ExternalLink(secret, "ep_0/obs")
        elif kind == "soft link":
            group["obs"] = h5py.SoftLink("/ep_0/reward")
        elif kind == "storage":
            group.create_dataset("obs", (9, 8, 8), "u1", external=[(secret, 0, 9 * 8 * 8)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((9, 8, 8, 3), "u1")
            layout[:] = h5py.VirtualSource(secret, "ep_0/obs", (9, 8, 8, 3))
            group.create_virtual_dataset("obs", layout)
        elif kind == "filter":
            plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plan.set_chunk((9, 8, 8))
            plan.set_filter(307, h5py.h5z.FLAG_OPTIONAL)
            space = h5py.h5s.create_simple((9, 8, 8))
            h5py.h5d.create(group.id, b"obs", h5py.h5t.STD_U8LE, space, plan).write(
                space, space, np.zeros((9, 8, 8), "u1")
            )
        elif kind == "chunk":
            group.create_dataset("obs", (9, 8, 8), "u1", chunks=(65, 1024, 1024), maxshape=(None, None, None))
        elif kind == "unwritten":
            group.create_dataset("obs", (9, 8, 8), "u1", chunks=(3, 8, 8))[:6] = 1
        elif kind == "never written":
            group.create_dataset("obs", (9, 8, 8), "u1")
        elif kind == "rows":
            group.create_dataset("obs", (10**12, 8, 8), "u1", chunks=(16, 8, 8))
        elif kind == "size":
            group.create_dataset("obs", (4_000_000, 84, 84), "u1", chunks=(16, 84, 84))
        elif kind == "bomb":
            group.create_dataset("obs", (100_000, 84, 84), "u1", chunks=(16, 84, 84), compression="gzip")[0] = 1
    return path


@pytest.mark.parametrize(
    "kind, match",
    [
        ("link to a file", "ep_0 is a link"),
        ("link", "obs is a link"),
        ("soft link", "obs is a link"),
        ("storage", "lies in another file"),
        ("virtual", "lies in another file"),
        ("filter", "filter 307"),
        ("chunk", "a chunk has at most"),
        ("unwritten", "not all rows"),
        ("never written", "not all rows"),
        ("rows", "1000000000000 rows"),
        ("size", "at most 4294967296"),
        ("bomb", "no recording shrinks"),
    ],
)
def test_hostile_files(tmp_path, kind, match):
    path = hostile(kind, tmp_path)
    tracemalloc.start()
    refused(path, match)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_an_external_link_is_not_even_opened(tmp_path):
    """Opening the pipe would wait for ever."""
    import os

    path = write(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "play.h5", "a") as file:
        del file["ep_0/obs"]
        file["ep_0/obs"] = h5py.ExternalLink(tmp_path / "pipe", "x")
    refused(path, "obs is a link")


def test_mutated_bytes_never_end_in_a_traceback(tmp_path):
    path, rng = write(tmp_path), random.Random(0)
    file, refusals = tmp_path / "play.h5", 0
    whole = file.read_bytes()
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            hdf5_card(path, game="pong")
            got(path)
        except UserError as error:
            assert "play.h5" in str(error)
            refusals += 1
    assert refusals > 100

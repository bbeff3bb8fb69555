"""Recordings in .npz files, written by NumPy itself."""

import json
import random
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.unit.stores import assert_same, episode
from worldmodels.data.card import make_card
from worldmodels.data.sources.npz import npz, npz_card, npz_parts
from worldmodels.data.sources.recordings import natural
from worldmodels.types import UserError


def arrays(e):
    obs = e.obs if e.final_obs is None else np.concatenate([e.obs, e.final_obs[None]])
    return {
        "obs": obs,
        "action": e.action.astype(np.int64),
        "reward": e.reward.astype(np.float64),
        "terminated": e.terminated,
        "truncated": e.truncated,
        "life_loss": e.life_loss,
    }


def write(
    folder, number=0, name="ep_0.npz", save=np.savez_compressed, without=(), length=9, channels=3, side=8, **other
):
    """Episode `number` as a file, with other arrays in place of its own."""
    folder.mkdir(exist_ok=True)
    columns = arrays(episode(number, length, channels, side)) | other
    save(folder / name, **{k: v for k, v in columns.items() if k not in without})
    return str(folder)


def refused(path, match, name="ep_0.npz", **settings):
    with pytest.raises(UserError, match=match) as error:
        npz_card(path, **{"game": "pong"} | settings)
        list(npz(path, name))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip(tmp_path, save, channels):
    for k in range(12):
        write(tmp_path, k, f"ep_{k}.npz", save, length=None, channels=channels)
    parts = npz_parts(str(tmp_path))
    assert parts == [f"ep_{k}.npz" for k in range(12)]
    for k, part in enumerate(parts):
        (got,) = npz(str(tmp_path), part)
        want = episode(k, channels=channels)
        want.info.clear()
        assert_same(got, want)
    card = npz_card(str(tmp_path), game="pong", frame_skip=1, clipped=True, sticky_prob=0.25)
    assert (card["source"], card["game"], card["frame_skip"], card["sticky_prob"]) == ("npz", "pong", 1, 0.25)
    assert card["obs"] | {"height": 8, "width": 8, "channels": channels} == card["obs"]
    assert card["obs"]["colour"] == ("rgb" if channels == 3 else "ale_gray")
    assert card["reward"] == {"clipped": True} and card["action_set"] == list(range(18))


def test_one_file_is_a_log_too(tmp_path):
    write(tmp_path, name="a.npz"), write(tmp_path, 1, name="b.npz")
    path = str(tmp_path / "b.npz")
    assert npz_parts(path) == ["b.npz"]
    assert npz_card(path, game="pong")["obs"]["height"] == 8
    np.testing.assert_array_equal(next(npz(path, "b.npz")).obs, episode(1, 9).obs)


def test_spellings_of_the_same_arrays(tmp_path):
    e = episode(1, 5, channels=1)
    path = write(
        tmp_path,
        1,
        length=5,
        channels=1,
        obs=np.asfortranarray(e.obs[..., None]),  # as after an expand_dims; Fortran order
        action=e.action.astype(">i4"),
        truncated=np.array([0, 0, 0, 0, 1], np.uint8),
        without=("terminated", "life_loss"),
    )
    (got,) = npz(path, "ep_0.npz")
    np.testing.assert_array_equal(got.obs, e.obs)
    np.testing.assert_array_equal(got.action, e.action)
    assert got.final_obs is None and got.truncated.tolist() == [False] * 4 + [True]
    assert not got.terminated.any() and not got.life_loss.any() and got.truncated.dtype == bool


def test_without_flags_an_episode_is_open_and_the_card_says_what_is_not_known(tmp_path):
    path = write(tmp_path, without=("terminated", "truncated"))
    (got,) = npz(path, "ep_0.npz")
    assert not got.terminated.any() and not got.truncated.any()
    assert not npz_card(path, game="pong")["truncation_known"]
    assert npz_card(write(tmp_path / "whole"), game="pong")["truncation_known"]


def test_card_json(tmp_path):
    path = write(tmp_path)
    size = {"height": 8, "width": 8, "channels": 3}
    told = make_card("atari_play", "pong", size, frame_skip=2, sticky_prob=0.25, licence="mine", seed=3)
    (tmp_path / "card.json").write_text(json.dumps(told))
    assert npz_card(path) == told | {"source": "npz"}
    assert npz_parts(path) == ["ep_0.npz"]
    card = npz_card(path, game="pong", frame_skip=4, max_pool=False, licence="CC0-1.0")
    assert (card["frame_skip"], card["obs"]["max_pool"], card["licence"], card["seed"]) == (4, False, "CC0-1.0", 3)
    refused(path, "it is of pong, not breakout", "card.json", game="breakout")
    write(tmp_path, side=4)
    refused(path, "'height': 8", "card.json")
    for broken in ('{"obs": 5}', "[1]", "{", "[" * 100_000, "é" * 2**20):
        (tmp_path / "card.json").write_text(broken)
        refused(path, "no dataset card", "card.json")
    (tmp_path / "card.json").write_text('{"obs": {}, "reward": {}}')
    refused(path, "lacks the field 'source'", "card.json")


def test_the_card_refuses_what_cannot_be(tmp_path):
    path = write(tmp_path)
    with pytest.raises(UserError, match="give it as game="):
        npz_card(path)
    with pytest.raises(UserError, match="sticky_prob=2"):
        npz_card(path, game="pong", sticky_prob=2)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"without": ("obs",)}, "no obs"),
        ({"without": ("reward",)}, "no reward; needed are obs, action, reward"),
        ({"length": 1, "action": np.zeros(0, int)}, "no rows"),
        ({"obs": np.zeros((9, 8, 8, 3))}, "obs is float64"),
        ({"obs": np.zeros((9, 3, 8, 8), np.uint8)}, "colour last"),
        ({"obs": np.zeros((9, 0, 8), np.uint8)}, "obs is uint8"),
        ({"obs": np.zeros((11, 8, 8), np.uint8)}, "9 actions need 9 frames or one more, but obs has 11"),
        ({"action": np.zeros(9)}, "actions are float64"),
        ({"action": np.array([0, 0, 18, 0, 0, 0, 0, 0, 0])}, "row 2: action 18"),
        ({"action": np.array([0, -1, 0, 0, 0, 0, 0, 0, 0])}, "row 1: action -1"),
        ({"reward": np.array([0, 0, 0, 0, np.nan, 0, 0, 0, 0])}, "row 4: reward nan"),
        ({"reward": np.full(9, 1e300)}, "row 0: reward inf"),
        ({"reward": np.zeros((9, 1))}, "rewards are float64"),
        ({"reward": np.zeros(8)}, "9 actions but 8 rows of reward"),
        ({"reward": np.array(["a"] * 9)}, "not an array of numbers"),
        ({"reward": np.array([{}] * 9)}, "Python objects"),
        ({"terminated": np.array([0, 0, 1, 0, 0, 0, 0, 0, 1], bool)}, "row 2: terminated is set before the last"),
        ({"truncated": np.full(9, 2)}, "truncated is int64"),
        ({"life_loss": np.zeros(9)}, "life_loss is float64"),
        ({"life_loss": np.zeros(3, bool)}, "3 rows of life_loss"),
    ],
)
def test_what_is_no_episode(tmp_path, change, match):
    refused(write(tmp_path, **change), match)


def test_files_of_two_sizes(tmp_path):
    path = write(tmp_path)
    write(tmp_path, 1, "ep_1.npz", side=4)
    with pytest.raises(UserError, match=r"ep_1.npz: its frames are \(4, 4, 3\) but .* \(8, 8, 3\)"):
        list(npz(path, "ep_1.npz"))


@pytest.mark.parametrize("name", ["nothing", "other.txt"])
def test_no_files(tmp_path, name):
    (tmp_path / "other.txt").write_text("")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"there is no \.npz file"):
            npz_parts(str(path))


def header(shape, dtype="|u1"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def hostile(folder, obs, **kw):
    """A file whose member `obs` is these bytes."""
    path = write(folder, without=("obs",))
    with zipfile.ZipFile(folder / "ep_0.npz", "a", **kw) as archive:
        archive.writestr("obs.npy", obs)
    return path


@pytest.mark.parametrize(
    "obs, match",
    [
        (header("(9, 8, 8, 3)"), "holds 0 bytes"),
        (header("(9, 8, 8, 3)") + bytes(9 * 8 * 8 * 3 + 1), "holds 1729 bytes"),
        (header("(1000000000000, 84, 84)"), "1000000000000 rows"),
        (header("(4000000, 84, 84)"), "at most 4294967296"),
        (header("(40000, 84, 84)"), "no recording shrinks"),
        (header("(-9, 8, 8)"), "not an array of numbers"),
        (header("(9, 8, 8)", "|O"), "never loaded"),
        (header("((9,),)"), "shape is not valid"),
        (header("(9, 8, " + "(" * 300), "no whole .npz"),
        (header("-" * 9000), "no whole .npz"),
        (b"\x93NUMPY\x03\x00", "no whole .npz"),
        (b"", "no whole .npz"),
    ],
)
def test_headers_are_not_believed(tmp_path, obs, match):
    path = hostile(tmp_path, obs)
    tracemalloc.start()
    refused(path, match)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_zip_bomb(tmp_path):
    path = hostile(tmp_path, header("(10000, 84, 84)") + bytes(10_000 * 84 * 84), compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "ep_0.npz").stat().st_size < 2**20
    tracemalloc.start()
    refused(path, "no recording shrinks")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    hostile(tmp_path, header("(9, 8, 8)") + bytes(9 * 8 * 8), compression=zipfile.ZIP_LZMA)
    refused(path, "np.savez_compressed")


@pytest.mark.parametrize("length", [0, 3, 100, -30])
def test_a_file_cut_short(tmp_path, length):
    path = write(tmp_path)
    (tmp_path / "ep_0.npz").write_bytes((tmp_path / "ep_0.npz").read_bytes()[:length])
    refused(path, "no whole .npz file")


def test_mutated_bytes_never_end_in_a_traceback(tmp_path):
    path, rng = write(tmp_path), random.Random(0)
    file = tmp_path / "ep_0.npz"
    whole, refusals = file.read_bytes(), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            npz_card(path, game="pong")
            list(npz(path, "ep_0.npz"))
        except UserError as error:
            assert "ep_0.npz" in str(error)
            refusals += 1
    assert refusals > 300


def test_natural_order():
    names = ["ep_10", "ep_9", "ep_09", "ep_1b", "ep_1a2", "ep_1a10", "2", "10", "a", "9" * 6000]
    assert sorted(names, key=natural) == [
        "2",
        "10",
        "9" * 6000,
        "a",
        "ep_1a2",
        "ep_1a10",
        "ep_1b",
        "ep_09",
        "ep_9",
        "ep_10",
    ]

"""Episodes as DIAMOND writes them, with torch.save."""

import collections
import io
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from tests.fixtures.make_diamond import as_saved, channels_first, columns, path_of, save, write
from tests.unit.stores import episode
from worldmodels.data.sources.diamond import diamond, diamond_card, diamond_parts
from worldmodels.types import Episode, UserError

PONG = [0, 1, 3, 4, 11, 12]


def play(number, length=None, end="terminated", side=8):
    """An episode in Pong's actions that ends as it says, and where it ends has a final frame."""
    e = episode(number, length, side=side, final=end != "open")
    ended = np.zeros(len(e), bool)
    ended[-1] = True
    never = np.zeros(len(e), bool)
    flags = {"terminated": (ended, never), "truncated": (never, ended), "open": (never, never)}[end]
    return Episode(e.obs, np.array(PONG, np.uint8)[e.action % 6], e.reward, *flags, never, e.final_obs)


def refused(path, match, part="train/000/00/0/0.pt", **settings):
    with pytest.raises(UserError, match=match) as error:
        diamond_card(str(path), **{"game": "pong"} | settings)
        list(diamond(str(path), part, **{"game": "pong"} | settings))
    assert "\n" not in str(error.value)


def test_round_trip(tmp_path):
    train = [play(k, end=["terminated", "truncated", "open"][k % 3]) for k in range(12)]
    test = [play(k) for k in range(100, 102)]
    write(tmp_path / "train", train, PONG), write(tmp_path / "test", test, PONG)
    path = str(tmp_path)
    parts = diamond_parts(path)
    assert parts[:2] + parts[-3:] == [
        "train/000/00/0/0.pt",
        "train/000/00/1/1.pt",
        "train/000/10/1/11.pt",
        "test/000/00/0/0.pt",
        "test/000/00/1/1.pt",
    ]
    for part, want in zip(parts, train + test, strict=True):
        (got,) = diamond(path, part, game="pong")
        np.testing.assert_array_equal(got.obs, as_saved(want.obs))
        for name in ("action", "reward", "terminated", "truncated", "life_loss"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
            assert getattr(got, name).dtype == getattr(want, name).dtype
        if want.final_obs is None:
            assert got.final_obs is None
        else:
            np.testing.assert_array_equal(got.final_obs, want.final_obs)  # to the byte, unlike obs
        assert got.info == {"split": part.split("/")[0], "episode": int(part.split("/")[-1][:-3])}


def test_the_levels_that_are_lost():
    levels = np.arange(256, dtype=np.uint8)
    assert (as_saved(levels).numpy() < levels).sum() == 63


def test_paths(tmp_path):
    assert str(path_of(1234)) == "200/30/4/1234.pt"
    for number in range(1112):
        file = tmp_path / "train" / path_of(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    parts = diamond_parts(str(tmp_path))
    assert len(parts) == 1112 and parts[1111] == f"train/{path_of(1111)}" and parts[999] == "train/900/90/9/999.pt"
    (tmp_path / parts[500]).unlink()
    refused(tmp_path, "train: episode 500 is missing")
    (tmp_path / "train/000/00/0/500.pt").touch()
    refused(tmp_path, "episode 500 is not at train/500/00/0/500.pt")


def test_card(tmp_path):
    write(tmp_path / "train", [play(0)], PONG), write(tmp_path / "test", [play(1)], PONG)
    card = diamond_card(str(tmp_path), game="pong")
    assert (card["source"], card["game"], card["action_set"]) == ("diamond", "pong", PONG)
    assert card["obs"] == {
        "height": 8,
        "width": 8,
        "channels": 3,
        "colour": "rgb",
        "resize": "area",
        "max_pool": True,
    }
    assert (card["sticky_prob"], card["frame_skip"], card["episodic_life"]) == (0, 4, True)
    assert not card["reward"]["clipped"] and card["dataset"]["splits"] == ["test", "train"]
    assert str(tmp_path) not in str(card)
    assert not diamond_card(str(tmp_path), game="pong", split="test")["episodic_life"]
    assert diamond_parts(str(tmp_path), split="test") == ["test/000/00/0/0.pt"]
    assert len(next(diamond(str(tmp_path), "test/000/00/0/0.pt", game="pong", split="test")))
    refused(tmp_path, "give it as game=", game=None)
    refused(tmp_path, "split=validation is unknown", split="validation")
    refused(tmp_path / "train", "it holds no episodes")


class Opens:
    """Runs code when it is unpickled without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_no_pickle_runs_code(tmp_path):
    write(tmp_path / "train", [play(0)], PONG)
    torch.save(Opens(tmp_path / "pwned"), tmp_path / "train" / "info.pt")
    assert len(list(diamond(str(tmp_path), "train/000/00/0/0.pt", game="pong"))) == 1
    save(tmp_path / "train", 0, columns(play(0), PONG) | {"info": Opens(tmp_path / "pwned")})
    refused(tmp_path, "0.pt: it is no whole episode")
    with open(tmp_path / "train/000/00/0/0.pt", "wb") as f:
        pickle.dump(Opens(tmp_path / "pwned"), f)
    refused(tmp_path, "0.pt: it is no whole episode")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"obs": torch.zeros(9, 3, 8, 8)}, "obs is torch.float32; DIAMOND writes torch.uint8"),
        ({"obs": torch.zeros(9, 8, 8, dtype=torch.uint8)}, r"allowed is \(T, 3, H, W\)"),
        ({"obs": torch.zeros(9, 8, 8, 3, dtype=torch.uint8)}, r"allowed is \(T, 3, H, W\)"),
        ({"obs": torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "act": torch.zeros(0, dtype=torch.int64)}, "no rows"),
        ({"obs": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "9 actions need 9 frames"),
        ({"act": torch.full((9,), 6)}, "row 0: action 6 is out of range; allowed are 0 to 5"),
        ({"act": torch.zeros(9)}, "act is torch.float32"),
        ({"act": [0] * 9}, "act is list"),
        ({"act": torch.zeros(9, dtype=torch.int64).to_sparse()}, "act is torch.int64"),
        ({"act": torch.zeros(1, dtype=torch.int64).expand(10**9)}, "more than the file holds"),
        ({"rew": torch.full((9,), torch.nan)}, "row 0: reward nan"),
        ({"rew": torch.zeros(8)}, "8 rows of reward"),
        ({"end": torch.ones(9, dtype=torch.uint8)}, "row 0: terminated is set before the last row"),
        ({"trunc": torch.full((9,), 2, dtype=torch.uint8)}, "truncated is uint8"),
        ({"info": {"final_observation": torch.zeros(3, 4, 4)}}, "final_observation is no frame"),
        ({"info": {"final_observation": torch.full((3, 8, 8), torch.nan)}}, "final_observation is no frame"),
        ({"info": torch.zeros(2)}, "it is no dict of an episode"),
        ({"obs": None}, "obs is NoneType"),
    ],
)
def test_what_is_no_episode(tmp_path, change, match):
    save(tmp_path / "train", 0, columns(play(0, 9), PONG) | change)
    refused(tmp_path, f"0.pt.*({match})")


def test_a_file_without_a_column(tmp_path):
    whole = columns(play(0, 9), PONG)
    del whole["trunc"]
    save(tmp_path / "train", 0, whole)
    refused(tmp_path, r"0.pt: it is no whole episode of DIAMOND \(KeyError: 'trunc'\)")
    save(tmp_path / "train", 0, torch.zeros(5))
    refused(tmp_path, "0.pt: it is no dict of an episode")


def test_frames_of_two_sizes(tmp_path):
    write(tmp_path / "train", [play(0), play(1, side=4)], PONG)
    refused(tmp_path, r"1.pt: its frames are \(4, 4, 3\)", "train/000/00/1/1.pt")


def rewritten(file, change):
    """The archive with its members changed by `change(name, data) -> data`, and compressed if it says so."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), *change(name, data))


def test_bombs(tmp_path):
    file = save(tmp_path / "train", 0, columns(play(0, 9), PONG))
    rewritten(file, lambda name, data: (data, zipfile.ZIP_DEFLATED))
    refused(tmp_path, "0.pt: its member '0/data.pkl' is not as torch.save writes it")
    save(tmp_path / "train", 0, columns(play(0, 9), PONG))
    rewritten(file, lambda name, data: (data + b"." * 2**20 if name.endswith(".pkl") else data,))
    refused(tmp_path, "0.pt: its member '0/data.pkl'")


class Huge:
    """A tensor of 10**12 rows over a storage of 9, as a pickle may claim."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, ("its storage", 0, (10**12,), (1,), False, collections.OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.ByteStorage, "0", "cpu", 9) if value == "its storage" else None


def test_a_storage_does_not_grow_to_what_the_pickle_claims(tmp_path):
    file = save(tmp_path / "train", 0, {"obs": torch.zeros(9, dtype=torch.uint8)})
    claim = io.BytesIO()
    Pickler(claim, 2).dump({"obs": Huge(), "info": {}})
    rewritten(file, lambda name, data: (claim.getvalue() if name.endswith("data.pkl") else data,))
    refused(tmp_path, "0.pt: it is no whole episode of DIAMOND .RuntimeError: Trying to resize storage")


def test_mutated_bytes_never_end_in_a_traceback(tmp_path):
    file, rng = save(tmp_path / "train", 0, columns(play(0, 3), PONG)), random.Random(0)
    whole, refusals = file.read_bytes(), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data[: rng.choice([len(data)] * 3 + [rng.randrange(len(data))])])
        try:
            list(diamond(str(tmp_path), "train/000/00/0/0.pt", game="pong"))
        except UserError as error:
            assert "0.pt" in str(error)
            refusals += 1
    assert refusals > 150


def test_a_tensor_that_was_on_a_gpu(tmp_path):
    """DIAMOND leaves the final observation on its device; the file then says so."""
    e = columns(play(0, 9), PONG)
    file = save(tmp_path / "train", 0, e)
    rewritten(file, lambda n, data: (data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"),))
    assert b"cuda:0" in file.read_bytes()
    (got,) = diamond(str(tmp_path), "train/000/00/0/0.pt", game="pong")
    np.testing.assert_array_equal(got.final_obs, play(0, 9).final_obs)
    np.testing.assert_array_equal(channels_first(got.obs), e["obs"].numpy())

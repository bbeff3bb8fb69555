import gzip
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures import make_rl_unplugged as make
from tests.fixtures.make_dqn_replay import random_episodes, real_play
from tests.unit.stores import FIELDS
from worldmodels.data.card import check_episode
from worldmodels.data.sources.reading import minimal_actions
from worldmodels.data.sources.rl_unplugged import rl_unplugged, rl_unplugged_card, rl_unplugged_parts
from worldmodels.types import UserError

PONG = [0, 1, 3, 4, 11, 12]
BY_LIBRARY = Path(make.__file__).with_name("rl_unplugged_pong.tfrecord.gz")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "atari_episodes_ordered" / "Pong"


def episodes(*lengths, seed=0):
    return list(random_episodes(np.random.default_rng(seed), lengths, PONG))


def write(folder, found, name="run_1-00000-of-00050", packed=True, **changes):
    """A shard; `changes` to the features of all its episodes, None to leave one out."""
    features = [make.fields(e, PONG, i) | changes for i, e in enumerate(found)]
    features = [{k: v for k, v in f.items() if v is not None} for f in features]
    return make.write_shard(folder / name, [make.example(f, packed) for f in features])


def read(path, **settings):
    return [e for part in rl_unplugged_parts(str(path), **settings) for e in rl_unplugged(str(path), part, **settings)]


def assert_same(found, sources):
    for a, b in zip(found, sources, strict=True):
        for name in FIELDS[:-1]:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
            assert getattr(a, name).dtype == getattr(b, name).dtype
        assert a.final_obs is None
        json.dumps(a.info)


def bomb(width, height):
    """A PNG that claims a size, with the checksum that belongs to it."""
    png = make.png(np.zeros((2, 4), np.uint8))
    size = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + size + zlib.crc32(size).to_bytes(4, "big") + png[33:]


FRAME = make.png(np.zeros((2, 4), np.uint8))
COLOURED = make.png(np.zeros((2, 4, 3), np.uint8))
JUNK = FRAME[:33] + struct.pack(">I", 4) + b"IDATjunk" + zlib.crc32(b"IDATjunk").to_bytes(4, "big") + FRAME[-12:]


def test_a_file_of_another_writer(folder):
    folder.mkdir(parents=True)
    (folder / "run_1-00000-of-00050").write_bytes(BY_LIBRARY.read_bytes())
    found = read(folder)
    assert_same(found, make.sample())
    assert found[0].terminated[-1] and not found[1].terminated.any()
    assert [e.info for e in found] == [{"run": 1, "checkpoint": 0, "episode": i} for i in range(2)]
    assert found[0].reward[-1] != 0  # the last point of the game, which TensorFlow Datasets calls invalid


@pytest.mark.parametrize("packed", [True, False])
def test_real_play_comes_back_bit_for_bit(tmp_path, packed):
    folder, actions = tmp_path / "Breakout", minimal_actions("breakout")
    played = list(real_play("breakout", 300))
    shard = [make.example(make.fields(e, actions, i), packed) for i, e in enumerate(played)]
    make.write_shard(folder / "run_2-00049-of-00050", shard)
    found = read(folder)
    assert_same(found, played)
    card = rl_unplugged_card(str(folder))
    for e in found:
        check_episode(card, e, "it")
    obs = {"height": 84, "width": 84, "channels": 1, "colour": "ale_gray", "resize": "area", "max_pool": True}
    assert card["obs"] == obs and card["game"] == "breakout" and card["action_set"] == actions
    assert card["reward"] == {"clipped": True} and card["sticky_prob"] == 0.25 and card["time_limit"] == 27_000
    assert card["truncation_known"] is False and card["lossy"] is None and card["dataset"]["runs"] == [2]
    assert str(tmp_path) not in json.dumps(card)


def test_shards_are_parts_in_order(folder):
    first, second, other = episodes(5, 6), episodes(7, seed=1), episodes(8, seed=2)
    write(folder, other, "run_2-00000-of-00050")
    write(folder, second, "run_1-00010-of-00050")
    write(folder, first, "run_1-00009-of-00050")
    (folder / "notes.txt").write_text("not a shard")
    names = ["run_1-00009-of-00050", "run_1-00010-of-00050", "run_2-00000-of-00050"]
    assert rl_unplugged_parts(str(folder)) == names
    assert rl_unplugged_parts(str(folder.parent)) == [f"Pong/{name}" for name in names]
    assert_same(read(folder), first + second + other)
    assert_same(read(folder.parent), first + second + other)
    assert_same(read(folder / names[1]), second)
    assert [e.info["run"] for e in read(folder)] == [1, 1, 1, 2]
    assert rl_unplugged_card(str(folder))["dataset"]["runs"] == [1, 2]


def test_which_game(tmp_path):
    write(tmp_path / "mine", episodes(4))
    with pytest.raises(UserError, match="'mine' is no game"):
        rl_unplugged_card(str(tmp_path))
    assert rl_unplugged_card(str(tmp_path), game="pong")["game"] == "pong"
    write(tmp_path / "Breakout", episodes(4))
    with pytest.raises(UserError, match="it holds breakout and pong"):
        read(tmp_path, game="pong")


def test_how_an_episode_ends(folder):
    cut = replace(episodes(9)[0], terminated=np.zeros(9, bool))
    long = {"observations": [FRAME], "actions": [0], "clipped_rewards": [0.0], "discounts": [1.0]}
    long = {name: values * 27_000 for name, values in long.items()}
    long["discounts"][-1] = 0.0
    make.write_shard(folder / "run_1-00000-of-00050", [make.example(make.fields(cut, PONG, 0)), make.example(long)])
    found = read(folder)
    assert not found[0].terminated.any() and not found[0].truncated.any() and "end" not in found[0].info
    assert found[1].truncated.sum() == 1 and found[1].truncated[-1] and not found[1].terminated.any()
    assert found[1].info["truncation"] == "assumed"


def test_the_clipped_rewards_count(folder):
    write(folder, episodes(3), clipped_rewards=[1.0, 0.0, -1.0], unclipped_rewards=[200.0, 0.0, -5.0])
    (e,) = read(folder)
    assert e.reward.tolist() == [1, 0, -1] and e.info["unclipped_return"] == 195


def test_single_transitions_are_refused(tmp_path):
    for name in ("run_1-00000-of-00100", "run_1-00000-of-00001"):
        shard = make.write_shard(
            tmp_path / name / "atari" / "Pong" / name, [make.example({"o_t": [b"png"], "a_t": [1]})]
        )
        with pytest.raises(UserError, match=r"shuffled single transitions.*gs://rl_unplugged/atari_episodes_ordered"):
            rl_unplugged_card(str(shard.parent))


def test_nothing_to_import(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"there is no file run_R-NNNNN-of-NNNNN; fetch the episodes"):
            rl_unplugged_parts(str(path))
    make.write_shard(tmp_path / "Pong" / "run_1-00000-of-00050", [])
    assert read(tmp_path) == []
    with pytest.raises(UserError, match="its files hold no episode"):
        rl_unplugged_card(str(tmp_path))


def framed(size=None, data=b"", flip=()):
    record = bytearray(make.framed(data))
    if size is not None:
        record[:12] = struct.pack("<Q", size) + make.masked(struct.pack("<Q", size))
    for at in flip:
        record[at] ^= 1
    return gzip.compress(bytes(record))


DAMAGE = {
    "an absurd length": (framed(2**60), rf"record 0: it claims {2**60} bytes; allowed are {2**28}"),
    "too short": (framed(1000, b"abc"), "record 0: the file ends within it"),
    "a length": (framed(data=b"abc", flip=[2]), "record 0: no TFRecord begins here"),
    "a byte": (framed(data=b"abc", flip=[13]), "record 0: its bytes are damaged"),
    "a checksum": (framed(data=b"abc", flip=[16]), "record 0: its bytes are damaged"),
    "no message": (framed(data=b"\xff\xff\xff"), "record 0: it is no tf.Example"),
    "an empty message": (framed(data=b""), r"record 0: it lacks the feature observations \(list\); it has none"),
    "no record": (gzip.compress(b"short"), "record 0: no TFRecord begins here"),
    "not compressed": (make.framed(b"abc"), ": it cannot be read .Not a gzipped file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_records(folder, case):
    data, message = DAMAGE[case]
    folder.mkdir(parents=True)
    (folder / "run_1-00000-of-00050").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert str(error.value).startswith(f"cannot import {folder}/run_1-00000-of-00050") and "\n" not in str(error.value)


def test_a_truncated_shard_gives_what_comes_before(folder):
    source = episodes(20, 20, 20)
    shard = write(folder, source)
    shard.write_bytes(shard.read_bytes()[:-200])
    part, found = rl_unplugged(str(folder), shard.name), []
    with pytest.raises(UserError, match="truncated"):
        for e in part:
            found.append(e)
    assert_same(found, source[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": [0, 6, 1]}, "record 0, row 1: action 6 is out of range; allowed are 0 to 5"),
        ({"actions": [0, 1, -1]}, "record 0, row 2: action -1"),
        ({"actions": [0, 1]}, "record 0: it has 3 observations, 2 actions, 3 clipped_rewards, 3 discounts"),
        ({"actions": None}, r"record 0: it lacks the feature actions \(int64\); it has checkpoint_idx, "),
        ({"actions": [0.0, 1.0, 2.0]}, r"it lacks the feature actions \(int64\)"),
        ({"observations": [1, 2, 3]}, r"it lacks the feature observations \(list\)"),
        ({"clipped_rewards": [0.0, float("nan"), 0.0]}, "row 1: reward nan is not finite"),
        ({"clipped_rewards": [0.0, 0.0, 7.0]}, r"row 2: reward 7.0 is not clipped to \[-1, 1\]"),
        ({"discounts": [0.0, 1.0, 0.0]}, "row 0: discount 0; allowed are 0 to 1, and 0 in the last row alone"),
        ({"discounts": [1.0, float("nan"), 0.0]}, "row 1: discount nan"),
        ({"observations": [FRAME, FRAME, b"hello"]}, "row 2: its frame is no PNG file, or a damaged one"),
        ({"observations": [FRAME, FRAME[:-20], FRAME]}, "row 1: its frame is no PNG file, or a damaged one"),
        ({"observations": [bomb(50_000, 50_000)] * 3}, "row 0: its frame is a PNG of 50000x50000, 8 bits"),
        ({"observations": [bomb(0, 5)] * 3}, "row 0: its frame is a PNG of 0x5"),
        ({"observations": [FRAME, COLOURED, FRAME]}, "row 1: its frame is a PNG of 4x2, 8 bits, colour type 2"),
        ({"observations": [FRAME, bomb(5, 5), FRAME]}, "row 1: its frame (cannot be decoded|is not of the size)"),
        ({"observations": [FRAME, FRAME, JUNK]}, "row 2: its frame cannot be decoded"),
        (
            {"observations": [FRAME, make.png(np.zeros((3, 4), np.uint8)), FRAME]},
            "row 1: its frame is not of the size of the one before",
        ),
    ],
)
def test_malformed_episodes(folder, changes, message):
    shard = write(folder, episodes(3), **changes)
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert str(error.value).startswith(f"cannot import {shard}, record 0") and "\n" not in str(error.value)


def test_an_episode_without_rows(folder):
    nothing = dict.fromkeys(("actions", "clipped_rewards", "discounts"), [])
    write(folder, episodes(3), observations=[], **nothing)
    with pytest.raises(UserError, match="record 0: it lacks the feature observations"):
        read(folder)
    write(folder, episodes(3), actions=[])
    with pytest.raises(UserError, match="record 0: it has 3 observations, 0 actions"):
        read(folder)


def test_an_episode_beyond_the_time_limit(folder):
    e = episodes(3)[0]
    write(folder, [e], **{k: v * 9001 for k, v in make.fields(e, PONG, 0).items() if len(v) == 3})
    with pytest.raises(UserError, match="it has 27003 observations, .*; there must be equally many, 1 to 27000"):
        read(folder)

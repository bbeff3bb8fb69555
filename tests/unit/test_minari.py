"""Minari's datasets, written by Minari itself; and what becomes of those that are damaged or hostile."""

import json
import os
import random
import shutil
import sys
import tracemalloc
import warnings
from io import BytesIO

import h5py
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import ipc

from worldmodels.data.sources.minari import minari, minari_card, minari_parts
from worldmodels.types import UserError

PONG = np.array([0, 1, 3, 4, 11, 12])
FORMS = [(form, jpeg) for form in ("hdf5", "arrow") for jpeg in (True, False)]


def play(steps, seed=0, frame=(40, 36, 3), actions=6, noise=True):
    """An episode as Minari takes it; without noise all frames are equal, and so are the lengths of their JPEG files."""
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(seed)
    last = [False] * (steps - 1) + [True]
    return EpisodeBuffer(
        observations=rng.integers(0, 256, (steps + 1, *frame), np.uint8)
        if noise
        else np.full((steps + 1, *frame), 90, np.uint8),
        actions=rng.integers(0, actions, steps),
        rewards=rng.normal(size=steps).tolist(),
        terminations=last if seed % 2 else [False] * steps,
        truncations=[False] * steps if seed % 2 else last,
    )


def create(root, name, episodes, frame=(40, 36, 3), actions=6, **more):
    """A dataset in root/name, by the library's own function; and its folder."""
    import gymnasium as gym
    import minari as library

    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        with warnings.catch_warnings(action="ignore"):
            spaces = {"observation_space": gym.spaces.Box(0, 255, frame, np.uint8)}
            spaces |= {"action_space": gym.spaces.Discrete(actions)}
            library.create_dataset_from_buffers(name, episodes, **spaces, **more)
        return root / name, library.load_dataset(name)
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Each form, twelve episodes: {(form, jpeg): (folder, the dataset as the library reads it)}."""
    root = tmp_path_factory.mktemp("minari")
    episodes = [play(1 + i, i, noise=i != 3) for i in range(12)]
    return {
        (form, jpeg): create(
            root / f"{form}{jpeg}", "atari/pong/expert-v0", episodes, data_format=form, jpeg_encoding=jpeg
        )
        for form, jpeg in FORMS
    }


@pytest.fixture
def copy(written, tmp_path):
    """A dataset of its own to spoil, and the file that has its first episode."""

    def copy(form="hdf5", jpeg=True):
        folder = shutil.copytree(written[form, jpeg][0], tmp_path / f"{form}{jpeg}")
        return folder, folder / "data" / ("main_data.hdf5" if form == "hdf5" else "0/part-0.arrow")

    return copy


def read(path, part="episode_0", **settings):
    (episode,) = minari(str(path), part, **settings)
    return episode


def everything(path, **settings):
    minari_card(str(path), **settings)
    return [read(path, part, **settings) for part in minari_parts(str(path), **settings)]


def refused(path, match, file, **settings):
    with pytest.raises(UserError, match=match) as error:
        everything(path, **settings)
    assert file in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("form", "jpeg"), FORMS)
def test_equal_to_what_minari_reads(written, form, jpeg):
    folder, dataset = written[form, jpeg]
    parts = minari_parts(str(folder))
    assert parts == [f"episode_{i}" for i in range(12)]  # in numeric order
    for part, theirs in zip(parts, dataset, strict=True):
        ours = read(folder, part)
        np.testing.assert_array_equal(ours.obs, theirs.observations[:-1])
        np.testing.assert_array_equal(ours.final_obs, theirs.observations[-1])
        np.testing.assert_array_equal(ours.action, PONG[theirs.actions])
        np.testing.assert_array_equal(ours.reward, theirs.rewards.astype(np.float32))
        np.testing.assert_array_equal(ours.terminated, theirs.terminations)
        np.testing.assert_array_equal(ours.truncated, theirs.truncations)
        assert (ours.action.dtype, ours.reward.dtype) == (np.uint8, np.float32)
        assert not ours.life_loss.any()
    card = minari_card(str(folder))
    assert card["lossy"] == ("jpeg" if jpeg else None)
    assert (card["game"], card["action_set"]) == ("pong", PONG.tolist())
    assert (card["obs"]["height"], card["obs"]["width"], card["obs"]["channels"]) == (40, 36, 3)
    assert card["dataset"]["name"] == "atari/pong/expert-v0"
    assert str(folder) not in json.dumps(card)


def test_both_ways_of_keeping_jpeg_were_met(written):
    with h5py.File(written["hdf5", True][0] / "data" / "main_data.hdf5") as f:
        shapes = [f[f"episode_{i}/observations"].ndim for i in range(12)]
    assert shapes == [1, 1, 1, 2] + [1] * 8  # episode 3 has equal frames


@pytest.mark.parametrize("form", ["hdf5", "arrow"])
@pytest.mark.parametrize("frame", [(40, 36), (40, 36, 1)])
def test_grey_frames(tmp_path, form, frame):
    settings = {"data_format": form, "jpeg_encoding": len(frame) == 2}
    folder, dataset = create(
        tmp_path, "atari/mspacman/mine-v3", [play(4, frame=frame, actions=9)], frame, 9, **settings
    )
    e = read(folder)
    np.testing.assert_array_equal(e.obs, dataset[0].observations[:-1].reshape(4, 40, 36))
    assert e.final_obs.shape == (40, 36)
    assert minari_card(str(folder))["game"] == "ms_pacman"
    assert minari_card(str(folder))["obs"]["channels"] == 1


def test_the_card_of_the_environment_that_minari_notes(tmp_path):
    import ale_py
    import gymnasium as gym

    gym.register_envs(ale_py)
    env = gym.make("ALE/Breakout-v5", repeat_action_probability=0.1, max_episode_steps=500, full_action_space=True)
    episodes = [play(3, frame=(210, 160, 3), actions=18, noise=False)]
    author = {"author": "somebody", "algorithm_name": "CleanBA", "code_permalink": "https://example.org/x"}
    folder, _ = create(tmp_path, "mine/test-v0", episodes, (210, 160, 3), 18, env=env, **author)
    card = minari_card(str(tmp_path))  # from the folder above
    assert (card["game"], card["action_set"]) == ("breakout", list(range(18)))
    assert (card["sticky_prob"], card["frame_skip"], card["time_limit"], card["noop_max"]) == (0.1, 4, 500, 0)
    assert (card["obs"]["max_pool"], card["obs"]["resize"]) == (False, "none")
    assert (card["policy"], card["dataset"]["url"]) == ({"type": "CleanBA"}, "https://example.org/x")
    np.testing.assert_array_equal(read(folder).action, episodes[0].actions)

    prepared = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0)
    prepared = gym.wrappers.AtariPreprocessing(prepared, frame_skip=3, noop_max=7, terminal_on_life_loss=True)
    create(tmp_path / "b", "mine/other-v0", [play(3, frame=(84, 84))], (84, 84), 6, env=prepared)
    card = minari_card(str(tmp_path / "b"))
    assert (card["frame_skip"], card["noop_max"], card["episodic_life"], card["time_limit"]) == (3, 7, True, 36_000)
    assert card["obs"] == {
        "height": 84, "width": 84, "channels": 1, "colour": "ale_gray", "resize": "area", "max_pool": True,
    }  # fmt: skip


def test_which_dataset_and_which_game(written, tmp_path):
    folder = written["hdf5", True][0]
    assert minari_card(str(folder.parents[2]))["game"] == "pong"
    refused(folder.parents[3], "it holds 4 datasets", "give the folder of one dataset")
    refused(tmp_path, "there is no data/metadata.json", str(tmp_path))
    refused(folder, "it holds breakout and pong", "metadata.json", game="breakout")
    create(tmp_path, "mine/things-v0", [play(2)])
    refused(tmp_path, "do not tell the game", "metadata.json")
    assert minari_card(str(tmp_path), game="pong")["game"] == "pong"
    refused(tmp_path, "its action space has 6 actions, but breakout has 4", "metadata.json", game="breakout")


def change(folder, **fields):
    file = folder / "data" / "metadata.json"
    meta = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"data_format": "parquet"}, "its data_format is 'parquet'"),
        ({"total_episodes": 13}, "it tells of 13 episodes, but there is no episode_12"),
        ({"total_episodes": 10**15}, "there is no episode_12"),
        ({"total_episodes": "x"}, "its total_episodes is x"),
        ({"total_episodes": 0}, "nothing to import"),
        ({"action_space": '{"type": "Box", "shape": [2]}'}, "its actions are not Discrete"),
        ({"action_space": '{"type": "Discrete", "n": 6, "start": 1}'}, "its actions are not Discrete"),
        ({"action_space": "[" * 100_000}, "nested too deeply"),
        ({"action_space": 7}, "not as Minari writes it"),
        ({"env_spec": '{"kwargs": 5}'}, "not as Minari writes it"),
        ({"env_spec": '{"kwargs": {"frameskip": [2, 5]}}'}, r"its frame skip is \[2, 5\]"),
        ({"env_spec": '{"kwargs": {"repeat_action_probability": "x"}}'}, "sticky_prob='x'"),
        ({"env_spec": '{"additional_wrappers": [5]}'}, "not as Minari writes it"),
        ({"dataset_id": 7}, "not as Minari writes it"),
        ({"dataset_id": "atari/pung/expert-v0"}, "'pung' is no game"),
        ({"worldmodels_card": {"obs": 3}}, "not as Minari writes it|lacks the field"),
    ],
)
def test_metadata_that_cannot_be(copy, fields, match):
    folder, _ = copy()
    change(folder, **fields)
    with pytest.raises(UserError, match=match) as error:
        everything(folder)
    assert "\n" not in str(error.value)


def test_metadata_without_an_action_space_goes_by_the_environment(copy):
    folder, _ = copy()
    want = read(folder).action
    change(folder, action_space=None)
    np.testing.assert_array_equal(read(folder).action, want)
    change(folder, env_spec='{"kwargs": {"full_action_space": true}}')
    assert set(read(folder, "episode_11").action) <= set(range(6))


def rewrite(file, name, values, episode=0, **kind):
    with h5py.File(file, "r+") as f:
        group = f[f"episode_{episode}"]
        del group[name]
        if values is not None:
            group.create_dataset(name, data=values, **kind)


JPEG = BytesIO()
Image.new("RGB", (36, 40)).save(JPEG, "JPEG")
JPEG = np.frombuffer(JPEG.getvalue(), np.uint8)


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("rewards", None, "there is no rewards"),
        ("rewards", [np.nan], "reward nan is not finite"),
        ("rewards", [1.0, 2.0], "1 actions but 2 rows of reward"),
        ("rewards", ["a"], "rewards holds Python objects"),
        ("actions", [6], "row 0: action 6 is out of range; allowed are 0 to 5"),
        ("actions", [0.5], "whole numbers"),
        ("actions", [-1], "action -1 is out of range"),
        ("actions", [[1]], "whole numbers in one column"),
        ("actions", np.zeros(0, int), "0 actions need one frame more, but there are 2"),
        ("actions", [1, 1], "2 actions need one frame more, but there are 2"),
        ("terminations", [2.5], "terminated is float64"),
        ("observations", np.zeros((2, 40, 36, 3), np.float32), "float32 .*, not frames of uint8"),
        ("observations", np.zeros((2, 128), np.uint8), "row 0: its frame is no JPEG"),  # of the console's memory
        ("observations", np.zeros((2, 40, 36, 4), np.uint8), "obs is uint8"),  # stacked
        ("observations", np.zeros((2, 40, 36, 3, 1), np.uint8), "not frames of uint8"),
        ("observations", np.stack([JPEG, np.zeros_like(JPEG)]), "row 1: its frame is no JPEG"),
        ("observations", np.stack([JPEG, np.where(np.arange(len(JPEG)) < 300, JPEG, 0)]), "row 1: its frame is"),
    ],
)
def test_a_column_that_cannot_be(copy, name, values, match):
    folder, file = copy()
    rewrite(file, name, values)
    with pytest.raises(UserError, match=match) as error:
        read(folder)
    assert "main_data.hdf5" in str(error.value) and "\n" not in str(error.value)


def test_an_episode_without_steps(copy):
    folder, file = copy()
    for name in ("actions", "rewards", "terminations", "truncations"):
        rewrite(file, name, np.zeros(0, {"a": int, "r": float}.get(name[0], bool)))
    rewrite(file, "observations", np.zeros((1, 40, 36, 3), np.uint8))
    with pytest.raises(UserError, match="episode_0: the episode has no rows"):
        read(folder)


def test_an_episode_that_goes_on_after_its_end(copy):
    folder, file = copy()
    rewrite(file, "terminations", np.array([False, True, False, False, False]), episode=4)
    with pytest.raises(UserError, match=r"main_data.hdf5/episode_4.*before the last row"):
        read(folder, "episode_4")


def test_frames_of_two_sizes(copy):
    folder, file = copy()
    small = BytesIO()
    Image.new("RGB", (20, 20)).save(small, "JPEG")
    rows = np.array([JPEG, np.frombuffer(small.getvalue(), np.uint8)], object)
    rewrite(file, "observations", rows, dtype=h5py.vlen_dtype(np.uint8), chunks=True)
    with pytest.raises(UserError, match=r"row 1: its frame is \(20, 20, 3\), but the first is \(40, 36, 3\)"):
        read(folder)


def test_files_in_several_chunks(copy):
    """As in a long episode; the last chunk is not full."""
    folder, file = copy()
    want = read(folder, "episode_10")
    with h5py.File(file) as f:
        rows = f["episode_10/observations"][:]
    rewrite(file, "observations", rows, 10, dtype=h5py.vlen_dtype(np.uint8), chunks=(5,))
    np.testing.assert_array_equal(read(folder, "episode_10").obs, want.obs)
    rewrite(file, "observations", rows[:10], 10, dtype=h5py.vlen_dtype(np.uint8), chunks=(5,))
    with pytest.raises(UserError, match="11 actions need one frame more, but there are 10"):
        read(folder, "episode_10")


def test_a_dictionary_of_observations(copy):
    folder, file = copy()
    rewrite(file, "observations", None)
    with h5py.File(file, "r+") as f:
        f["episode_0/observations/image"] = np.zeros((2, 40, 36, 3), np.uint8)
    with pytest.raises(UserError, match="observations is no dataset"):
        read(folder)


def test_no_other_file_is_read(copy, tmp_path):
    """A file of a stranger may link to a secret of ours; none of HDF5's ways to do so is followed."""
    secret = tmp_path / "secret.hdf5"
    with h5py.File(secret, "w") as f:
        f["rewards"], f["obs"] = [7.0], np.full((2, 40, 36, 3), 200, np.uint8)
        f.create_group("episode_0")
    (tmp_path / "secret.bin").write_bytes(np.full((2, 40, 36, 3), 200, np.uint8).tobytes())
    links = {"external": h5py.ExternalLink(str(secret), "rewards"), "soft": h5py.SoftLink("/episode_1/rewards")}
    for link in links.values():
        folder, file = copy()
        rewrite(file, "rewards", None)
        with h5py.File(file, "r+") as f:
            f["episode_0/rewards"] = link
        with pytest.raises(UserError, match="rewards is a link"):
            read(folder)
        shutil.rmtree(folder)
    folder, file = copy()
    rewrite(file, "observations", None)
    layout = h5py.VirtualLayout((2, 40, 36, 3), np.uint8)
    layout[:] = h5py.VirtualSource(str(secret), "obs", (2, 40, 36, 3))
    with h5py.File(file, "r+") as f:
        f["episode_0"].create_virtual_dataset("observations", layout)
    with pytest.raises(UserError, match="observations lies in another file"):
        read(folder)
    rewrite(file, "observations", None)
    with h5py.File(file, "r+") as f:
        outside = [(str(tmp_path / "secret.bin"), 0, h5py.h5f.UNLIMITED)]
        f["episode_0"].create_dataset("observations", (2, 40, 36, 3), np.uint8, external=outside)
    with pytest.raises(UserError, match="observations lies in another file"):
        read(folder)
    with h5py.File(file, "r+") as f:
        del f["episode_0"]
        f["episode_0"] = h5py.ExternalLink(str(secret), "episode_0")
    with pytest.raises(UserError, match="episode_0 is a link"):
        read(folder)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda f: f.create_dataset("observations", (2, 2**20, 2**20, 3), np.uint8, chunks=(1, 64, 64, 3)), "claims"),
        (lambda f: f.create_dataset("observations", (2**40, 40, 36, 3), np.uint8, chunks=(1, 40, 36, 3)), "claims"),
        (lambda f: f.create_dataset("observations", (2**40,), h5py.vlen_dtype(np.uint8), chunks=(9,)), "JPEG files"),
        (
            lambda f: f.create_dataset("observations", (9, 3000, 3000, 3), np.uint8, chunks=True, compression=9),
            "claims",
        ),
    ],
)
def test_absurd_sizes_take_no_memory(copy, make, match):
    folder, file = copy()
    rewrite(file, "observations", None)
    with h5py.File(file, "r+") as f:
        make(f["episode_0"])
    tracemalloc.start()
    with pytest.raises(UserError, match=match):
        read(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_bytes_that_make_the_libraries_crash(copy):
    """HDF5 2.0 on a variable length of unknown kind, Arrow 26 on a first message that is no schema."""
    folder, file = copy()
    want = read(folder)
    kind = bytes.fromhex("19 000000 10000000 10000000 01000000")  # variable length, of which kind, bytes of a row
    data = file.read_bytes()
    assert data.count(kind) == 11
    file.write_bytes(data.replace(kind, kind[:1] + b"\x08" + kind[2:]))
    np.testing.assert_array_equal(read(folder).obs, want.obs)
    file.write_bytes(data.replace(b"GCOL", b"GCOR"))
    with pytest.raises(UserError, match="a heap is damaged"):
        read(folder)
    folder, file = copy("arrow")
    with pa.memory_map(str(file)) as source:
        source.seek(8)
        batch = [*ipc.MessageReader.open_stream(source)][1].serialize().to_pybytes()
    file.write_bytes(b"ARROW1\0\0" + batch + batch)
    with pytest.raises(UserError, match="not one table of Arrow"):
        read(folder)


def write_arrow(file, change):
    with ipc.open_file(file) as f:
        table = f.read_all()
    table = change(table)
    with ipc.new_file(str(file), table.schema) as f:
        f.write_table(table)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.drop_columns("rewards"), "rewards"),
        (lambda t: t.slice(0, 1), "no rows|one frame more"),
        (lambda t: t.slice(0, 0), "it has 0 rows"),
        (lambda t: t.set_column(0, "observations", pa.array([1.0, 2.0])), "its observations are double"),
        (lambda t: t.set_column(0, "observations", pa.array([JPEG.tobytes(), None])), "row 1: its frame is no JPEG"),
        (lambda t: t.set_column(1, "actions", pa.array([None, 1])), "whole numbers"),
        (lambda t: t.set_column(2, "rewards", pa.array(["a", "b"])), "rewards are object"),
    ],
)
def test_an_arrow_column_that_cannot_be(copy, change, match):
    folder, file = copy("arrow")
    write_arrow(file, change)
    with pytest.raises(UserError, match=match) as error:
        read(folder)
    assert "part-0.arrow" in str(error.value)


def test_an_arrow_bomb_is_not_unpacked(copy):
    folder, file = copy("arrow")
    with ipc.open_file(file) as f:
        table = f.read_all()
    table = table.set_column(0, "observations", pa.array([bytes(2**25), b""]))
    with ipc.new_file(str(file), table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as f:
        f.write_table(table)
    assert file.stat().st_size < 2**14
    before = pa.total_allocated_bytes()
    with pytest.raises(UserError, match="compressed, which Minari does not do"):
        read(folder)
    assert pa.total_allocated_bytes() - before < 2**20


@pytest.mark.parametrize(("form", "jpeg"), FORMS)
def test_missing_and_truncated(copy, form, jpeg):
    folder, file = copy(form, jpeg)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(folder, "not as Minari writes it", file.name)
    file.unlink()
    refused(folder, "not as Minari writes it|there is no episode_0", "metadata.json" if form == "arrow" else file.name)


def test_an_arrow_file_without_the_shape_of_its_frames(copy):
    folder, _ = copy("arrow", False)
    for space in (None, "[", '{"shape": "x"}', '{"shape": [7]}'):
        change(folder, observation_space=space)
        refused(folder, "not as Minari writes it", "part-0.arrow")


def test_without_the_libraries(written, monkeypatch):
    for name, form in (("h5py", "hdf5"), ("pyarrow", "arrow")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf'needs {name}; .*pip install "worldmodels\[minari\]"'):
                minari_card(str(written[form, True][0]))


@pytest.mark.parametrize(("form", "jpeg"), FORMS)
@pytest.mark.parametrize("seed", range(10))
def test_damaged_bytes_are_one_sentence(copy, form, jpeg, seed):
    folder, file = copy(form, jpeg)
    rng, data = random.Random(seed), bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 4, 32))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data)
    try:
        for part in ("episode_0", "episode_3"):
            read(folder, part)
    except UserError as e:
        assert "\n" not in str(e)

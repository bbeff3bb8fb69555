"""LeRobot datasets, written with pyarrow and PyAV; aligned by time, and refused where something does not fit."""

import json
import random
import shutil
import sys
from dataclasses import replace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fixtures.make_lerobot import CAMERA, USUAL, write_lerobot
from tests.unit.stores import assert_same, episode
from worldmodels.data.sources.lerobot import lerobot, lerobot_card, lerobot_parts
from worldmodels.types import UserError

LENGTHS = (7, 1, 20, 33, 5)
H264 = {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"g": "12", "bf": "2", "crf": "20"}}
DATA, META = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"


def want(i, length):
    """As episode `i` comes back: no last frame, and every end is a termination where nothing tells a cut."""
    e = episode(i, length, side=64, final=False)
    none = np.zeros(length, bool)
    return replace(e, terminated=e.terminated | e.truncated, truncated=none, life_loss=none, info={})


EPISODES = [want(i, n) for i, n in enumerate(LENGTHS)]


def smooth(length):
    """Frames that a lossy codec keeps apart: a bright bar at a place of its own in each."""
    obs = np.full((length, 64, 64, 3), 40, np.uint8)
    for t in range(length):
        obs[t, :, 2 * (t % 32) : 2 * (t % 32) + 2] = 240
    return replace(want(0, length), obs=obs)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_lerobot(tmp_path_factory.mktemp("lerobot"), EPISODES)


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def everything(path, **settings):
    """All that an import asks for, as it asks."""
    settings = {"game": "pong"} | settings
    lerobot_card(str(path), **settings)
    return [e for part in lerobot_parts(str(path), **settings) for e in lerobot(str(path), part, **settings)]


def refused(path, match, file="", **settings):
    with pytest.raises(UserError, match=match) as error:
        everything(path, **settings)
    assert file in str(error.value) and "\n" not in str(error.value)


def test_round_trip(written):
    for got, e in zip(everything(written, frame_skip=1), EPISODES, strict=True):
        assert_same(got, e)
    assert lerobot_parts(str(written)) == [f"episode_{i}" for i in range(5)]
    card = lerobot_card(str(written), game="pong", frame_skip=1, sticky_prob=0.25)
    assert (card["source"], card["game"], card["frame_skip"], card["sticky_prob"]) == ("lerobot", "pong", 1, 0.25)
    assert (card["obs"]["height"], card["obs"]["channels"], card["lossy"]) == (64, 3, "video")
    assert card["truncation_known"] is False
    assert str(written) not in json.dumps(card)


@pytest.mark.parametrize(("codec", "fps"), [(H264, 15), (H264, 60), (H264, 7), (USUAL, 15)])
def test_rows_of_a_lossy_video_stay_with_their_frames(tmp_path, codec, fps):
    """A window in the middle of a video, behind key frames and frames that were coded out of order."""
    episodes = [smooth(n) for n in (19, 32, 27)]
    for got, e in zip(everything(write_lerobot(tmp_path, episodes, fps, 3, codec)), episodes, strict=True):
        bars = got.obs[..., 0].mean(1).reshape(len(got), 32, 2).mean(-1).argmax(1)
        np.testing.assert_array_equal(bars, np.arange(len(e)) % 32)
        np.testing.assert_array_equal(got.action, e.action)


def test_a_video_with_frames_between_the_rows(tmp_path):
    """Filmed at 30 frames a second, acted 15 times a second: each row finds the frame of its time."""
    root = write_lerobot(tmp_path, EPISODES[:1])
    doubled = replace(EPISODES[0], obs=EPISODES[0].obs.repeat(2, 0))
    other = write_lerobot(tmp_path / "other", [doubled], fps=30)
    shutil.copy(other / VIDEO, root / VIDEO)
    np.testing.assert_array_equal(everything(root)[0].obs, EPISODES[0].obs)


def test_columns_of_other_names_and_minimal_actions(tmp_path):
    cuts = [np.arange(n) == n - 1 if i % 2 else np.zeros(n, bool) for i, n in enumerate(LENGTHS)]
    ours = {"score": [e.reward * 2 for e in EPISODES], "key": [e.action % 6 for e in EPISODES], "cut": cuts}
    ours["vector"] = [pa.array([[a % 6] for a in e.action.tolist()], pa.list_(pa.int64(), 1)) for e in EPISODES]
    root = write_lerobot(tmp_path, EPISODES, **ours)
    names = {"action": "key", "reward": "score", "truncated": "cut"}
    for i, (got, e) in enumerate(zip(everything(root, names=names, action_set="minimal"), EPISODES, strict=True)):
        np.testing.assert_array_equal(got.action, np.array([0, 1, 3, 4, 11, 12])[e.action % 6])
        np.testing.assert_array_equal(got.reward, e.reward * 2)
        np.testing.assert_array_equal(got.truncated, cuts[i])
        np.testing.assert_array_equal(got.terminated, e.terminated & ~cuts[i])
    card = lerobot_card(str(root), game="pong", names=names, action_set="minimal")
    assert (card["action_set"], card["truncation_known"]) == ([0, 1, 3, 4, 11, 12], True)
    vector = everything(root, names=names | {"action": "vector"}, action_set="minimal")
    np.testing.assert_array_equal(vector[0].action, np.array([0, 1, 3, 4, 11, 12])[EPISODES[0].action % 6])
    assert not any(e.terminated.any() or e.truncated.any() for e in everything(root, names={"done": None}))
    only_cuts = everything(root, names={"done": None, "truncated": "cut"})
    assert [e.truncated[-1] and not e.terminated.any() for e in only_cuts] == [False, True, False, True, False]


def test_settings_that_do_not_fit(written, tmp_path):
    there = "choose among action, next.reward, next.done, timestamp, .* with source.names.reward"
    refused(written, f"it has no column reward; {there}", DATA, names={"reward": "reward"})
    refused(written, "names.rewards is unknown; there are camera, action", names={"rewards": "x"})
    refused(written, f"the camera is wrist, but its videos are {CAMERA}", "info.json", names={"camera": "wrist"})
    refused(written, "give it as game=", game=None)
    refused(written, "action_set=few is unknown", action_set="few")
    refused(written, "out of range; allowed are 0 to 5", DATA, action_set="minimal")
    refused(written, "its actions are float32", DATA, names={"action": "timestamp"})
    refused(written, "terminated is float", names={"done": "timestamp"})
    refused(tmp_path, "it has no meta/info.json", str(tmp_path))


@pytest.mark.parametrize(
    ("info", "match"),
    [
        ({"codebase_version": "v2.1"}, "it is of version v2.1; convert it"),
        ({"fps": 0}, "its fps is 0"),
        ({"fps": float("nan")}, "its fps is nan"),
        ({"fps": "x"}, "not as LeRobot writes it"),
        ({"features": {}}, "the camera is None, but it has no video"),
        ({"features": {"a": {"dtype": "video"}, "b": {"dtype": "video"}}}, "its videos are a, b; choose one"),
        ({"features": {"../../x": {"dtype": "video"}}}, "the camera is ../../x"),
        ({"features": 7}, "not as LeRobot writes it"),
        ({"video_path": "{video_key.__class__}"}, "its paths are not the usual"),
        ({"data_path": "/etc/passwd"}, "its paths are not the usual"),
        ({"total_episodes": 6}, "it tells of 6 episodes, but meta/episodes has 5"),
        ({"total_episodes": 10**12}, "tells of 1000000000000 episodes"),
    ],
)
def test_an_info_that_cannot_be(copy, info, match):
    file = copy / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | info))
    refused(copy, match, "info.json")


def change(file, **columns):
    table = pq.read_table(file, partitioning=None)
    for name, make in columns.items():
        name = name.replace("__", "/").replace("_OF_", ".")
        values = make(table[name].to_pylist())
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table, file)


@pytest.mark.parametrize(
    ("name", "make", "match"),
    [
        ("length", lambda v: [9, *v[1:]], "episode 0 has 7 rows of 9"),
        ("episode_index", lambda v: [1, *v[1:]], "episode 0 is not there, or twice"),
        ("episode_index", lambda v: [*v[:3], 4, 3], "or not in order"),
        ("episode_index", lambda v: [None, *v[1:]], "without a value|not there"),
        ("data__chunk_index", lambda v: [-1, *v[1:]], "file-000.parquet: it is missing"),
        ("data__file_index", lambda v: ["../x", *map(str, v[1:])], "not as LeRobot writes it"),
        ("data__file_index", lambda v: [2, *v[1:]], "episode 0 has 0 rows of 7"),
        (f"videos__{CAMERA}__file_index", lambda v: [9, *v[1:]], "file-009.mp4: it is missing"),
        (f"videos__{CAMERA}__from_timestamp", lambda v: [1.0, *v[1:]], "no frame at 1.000 s|no frame at"),
        (f"videos__{CAMERA}__from_timestamp", lambda v: [0.034, *v[1:]], "no frame at 0.034 s for episode 0"),
        (f"videos__{CAMERA}__from_timestamp", lambda v: [float("nan"), *v[1:]], "the times of episode 0"),
        (f"videos__{CAMERA}__from_timestamp", lambda v: [1e300, *v[1:]], "the times of episode 0"),
    ],
)
def test_an_episode_table_that_cannot_be(copy, name, make, match):
    change(copy / META, **{name: make})
    refused(copy, match)


@pytest.mark.parametrize(
    ("name", "make", "match"),
    [
        ("frame_index", lambda v: [1, 0, *v[2:]], "or not in order"),
        ("episode_index", lambda v: [1, *v[1:]], "episode 0 has 6 rows of 7"),
        ("timestamp", lambda v: [v[1], v[0], *v[2:]], "the times of episode 0"),
        ("timestamp", lambda v: [v[0], v[1] + 0.02, *v[2:]], "row 1: it has no frame at 0.087 s"),
        ("next.reward", lambda v: [float("nan"), *v[1:]], "row 0: reward nan is not finite"),
        ("next.reward", lambda v: [None, *v[1:]], "its next.reward has rows without a value"),
        ("next.done", lambda v: [True, *v[1:]], "row 0.*before the last row"),
        ("action", lambda v: [18, *v[1:]], "action 18 is out of range"),
        ("action", lambda v: [[a, a] for a in v], "its action is a vector"),
        ("action", lambda v: [str(a) for a in v], "its actions are object"),
    ],
)
def test_a_data_table_that_cannot_be(copy, name, make, match):
    change(copy / DATA, **{name: make})
    refused(copy, match, DATA if "frame at" not in match and "times" not in match else "")


@pytest.mark.parametrize("file", [DATA, META, VIDEO])
def test_missing_and_truncated(copy, file):
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[: len(data) // 2])
    refused(copy, "not as LeRobot writes it|no whole video|no frame at")
    (copy / file).unlink()
    refused(copy, "it is missing|episode 0 is not there")


def test_a_playlist_in_disguise_opens_no_other_file(copy):
    (copy / VIDEO).write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{copy.parent}/copy/{VIDEO}\n#EXT-X-ENDLIST\n")
    refused(copy, "no whole video", VIDEO)


def test_frames_that_are_too_large(copy):
    with av.open(str(copy / VIDEO), "w") as container:
        stream = container.add_stream("libx264", 15, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 8192, 4096, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(8192, 4096, "yuv420p")))
        container.mux(stream.encode(None))
    refused(copy, "its frames have no size that can be read|no whole video", VIDEO)


def test_more_rows_than_an_episode_can_have(copy, monkeypatch):
    monkeypatch.setattr("worldmodels.data.sources.lerobot.MAX_FRAMES", 6)
    refused(copy, "an episode has more than 6 rows", DATA)


def test_without_pyarrow(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.dataset", None)
    refused(written, r'needs pyarrow; install it with: pip install "worldmodels\[lerobot\]"')


@pytest.mark.parametrize("file", [DATA, META, VIDEO])
@pytest.mark.parametrize("seed", range(12))
def test_damaged_bytes_are_one_sentence(copy, file, seed, capfd):
    rng, data = random.Random(seed), bytearray((copy / file).read_bytes())
    for _ in range(rng.choice((1, 4, 32))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    (copy / file).write_bytes(data)
    try:
        everything(copy)
    except UserError as e:
        assert "\n" not in str(e)
    assert capfd.readouterr().err == ""

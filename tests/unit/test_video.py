"""Recordings as videos, written by FFmpeg through PyAV itself."""

import csv
import random

import av
import cv2
import numpy as np
import pytest

from tests.unit.stores import assert_same, episode
from tests.unit.test_npz import arrays
from worldmodels.data.sources.video import video, video_card, video_parts
from worldmodels.types import UserError

COLUMNS = ("action", "reward", "terminated", "truncated", "life_loss")


def encode(path, frames, codec="ffv1", pixels=None, **options):
    """Frames (N, H, W[, 3]) uint8 as a video; lossless unless told otherwise."""
    source = "rgb24" if frames.ndim == 4 else "gray"
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=60, options=options)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = pixels or {"rgb24": "bgr0", "gray": "gray"}[source]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=source)))
        container.mux(stream.encode())


def table(path, columns):
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write(folder, number=0, name="play.mkv", length=9, without=(), repeat=1, side=32, **codec):
    """Episode `number` as a video and a csv file, with every frame shown `repeat` times but the last."""
    e = arrays(episode(number, length, codec.pop("channels", 3), side))
    frames = np.repeat(e["obs"], repeat, 0)
    encode(folder / name, frames[: 1 - repeat or None], **codec)
    table((folder / name).with_suffix(".csv"), {k: e[k] for k in COLUMNS if k not in without})
    return str(folder)


def refused(path, match, part="play.mkv", name=None, **settings):
    with pytest.raises(UserError, match=match) as error:
        video_card(path, game="pong", **settings)
        list(video(path, part, **settings))
    assert (name or part) in str(error.value) and "\n" not in str(error.value)


def wanted(k, *args, **kw):
    e = episode(k, *args, **kw)
    e.info.clear()
    return e


@pytest.mark.parametrize(
    "name, codec, pixels", [("a.mkv", "ffv1", None), ("a.avi", "rawvideo", "bgr24"), ("a.avi", "huffyuv", "bgra")]
)
def test_lossless_round_trip(tmp_path, name, codec, pixels):
    path = write(tmp_path, 1, name, codec=codec, pixels=pixels)  # 1: with a frame after the last action
    (got,) = video(path, name)
    assert_same(got, wanted(1, 9, side=32))
    card = video_card(path, game="pong")
    assert (card["source"], card["lossy"], card["truncation_known"]) == ("video", None, True)
    assert card["obs"] | {"height": 32, "width": 32, "channels": 3, "colour": "rgb"} == card["obs"]


def test_grey_and_as_many_frames_as_actions(tmp_path):
    path = write(tmp_path, 0, channels=1)  # 0: without one
    (got,) = video(path, "play.mkv")
    assert_same(got, wanted(0, 9, channels=1, side=32))
    card = video_card(path, game="pong", colour="cv2_gray")
    assert (card["obs"]["channels"], card["obs"]["colour"], card["lossy"]) == (1, "cv2_gray", None)


@pytest.mark.parametrize(
    "name, codec, pixels, options",
    [
        ("a.mp4", "libx264", "yuv420p", {"crf": "1"}),
        ("a.webm", "libvpx-vp9", "yuv420p", {}),
        ("a.mkv", "ffv1", "yuv420p", {}),
    ],
)
def test_lossy_is_marked(tmp_path, name, codec, pixels, options):
    smooth = cv2.resize(episode(1, 9).obs[0], (32, 32), interpolation=cv2.INTER_LINEAR)
    encode(tmp_path / name, np.stack([np.roll(smooth, k, 0) for k in range(9)]), codec, pixels, **options)
    table(tmp_path / "a.csv", {"action": range(9)})
    (got,) = video(str(tmp_path), name)
    assert np.abs(got.obs[3].astype(int) - np.roll(smooth, 3, 0)).mean() < 20
    assert got.action.tolist() == list(range(9)) and not got.reward.any() and not got.terminated.any()
    card = video_card(str(tmp_path), game="pong")
    assert card["lossy"] == "video" and card["dataset"] == {"reward": "not logged, all zero"}
    assert not card["truncation_known"]


def test_lossless_h264_is_exact_too(tmp_path):
    path = write(tmp_path, 1, "a.mp4", codec="libx264rgb", pixels="rgb24", qp="0")
    assert_same(next(video(path, "a.mp4")), wanted(1, 9, side=32))
    assert video_card(path, game="pong")["lossy"] == "video"  # its header does not tell


def test_size_and_skip(tmp_path):
    path = write(tmp_path, 1, repeat=4)
    (got,) = video(path, "play.mkv", size=16, skip=4)
    want = episode(1, 9, side=32)
    for got_frame, frame in zip([*got.obs, got.final_obs], [*want.obs, want.final_obs], strict=True):
        np.testing.assert_array_equal(got_frame, cv2.resize(frame, (16, 16), interpolation=cv2.INTER_AREA))
    np.testing.assert_array_equal(got.action, want.action)
    card = video_card(path, game="pong", size=16, skip=4, max_pool=False)
    assert card["obs"] | {"height": 16, "width": 16, "resize": "area", "max_pool": False} == card["obs"]
    refused(path, "more frames than the 9 actions of play.csv allow, 3 each", skip=3)
    refused(path, "37 frames, too few for the 9 actions of play.csv, 5 each", skip=5)
    for setting in ({"skip": 0}, {"size": 0}, {"skip": 1.5}):
        with pytest.raises(UserError, match="whole number of at least 1"):
            list(video(path, "play.mkv", **setting))
        with pytest.raises(UserError, match="whole number of at least 1"):
            video_card(path, game="pong", **setting)


def test_several_videos_and_actions_in_npz(tmp_path):
    for k in (10, 9, 1):
        write(tmp_path, k, f"ep_{k}.mkv")
        (tmp_path / f"ep_{k}.csv").unlink()
        np.savez(tmp_path / f"ep_{k}.npz", **{n: v for n, v in arrays(episode(k, 9, side=32)).items() if n != "obs"})
    path = str(tmp_path)
    assert video_parts(path) == ["ep_1.mkv", "ep_9.mkv", "ep_10.mkv"]
    for part, k in zip(video_parts(path), (1, 9, 10), strict=True):
        assert_same(next(video(path, part)), wanted(k, 9, side=32))
    np.savez(tmp_path / "ep_9.npz", reward=np.zeros(9))
    refused(path, "no column action", "ep_9.mkv", "ep_9.npz")
    (tmp_path / "ep_9.npz").unlink()
    refused(path, "ep_9.csv or ep_9.npz", "ep_9.mkv")
    write(tmp_path, 9, "ep_9.mkv", side=16)
    refused(path, r"its frames are \(16, 16, 3\)", "ep_9.mkv")


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "no column action"),
        ("action\n", "more frames than the 0 actions"),
        ("reward\n1\n", "no column action"),
        ("action,rewrd\n1,2\n", "'rewrd'"),
        ("action,action\n1,2\n", "'action'"),
        ("action,reward\n1,0\n2\n", "row 1: it has 1 values"),
        ("action\n1\n\nx\n", "row 1: action is 'x'; allowed are 0 to 17"),
        ("action\n" + "9" * 5000 + "\n", "row 0: action is"),
        ("action,reward\n1,many\n", "row 0: reward is 'many'"),
        ("action,terminated\n1,2\n", "row 0: terminated is '2'"),
        ("action\n" + "1\n" * 7, "more frames than the 7 actions"),
        ("action\n" + "1\n" * 10, "9 frames, too few for the 10 actions"),
        ("action\n" + "1\n" * 8 + "18\n", "row 8: action 18"),
        ("action,reward\n" + "1,0\n" * 8 + "1,nan\n", "row 8: reward nan"),
        ("action,truncated\n" + "1,True\n" * 9, "row 0: truncated is set"),
        ("action\n\xff", "no text"),
        ("action\n" + "1" * 200_000, "no text"),
    ],
)
def test_action_files_that_are_none(tmp_path, text, match):
    path = write(tmp_path, 0)
    (tmp_path / "play.csv").write_bytes(text.encode("latin-1"))
    refused(path, match, name="play.")


def test_a_spreadsheets_csv(tmp_path):
    path = write(tmp_path, 0)
    (tmp_path / "play.csv").write_text("\ufeffaction, terminated\r\n" + "3,FALSE\r\n" * 8 + "4, TRUE\r\n", "utf-8")
    (got,) = video(path, "play.mkv")
    assert got.action.tolist() == [3] * 8 + [4] and got.terminated.tolist() == [False] * 8 + [True]


def test_what_is_no_video(tmp_path):
    path = write(tmp_path, 0)
    whole = (tmp_path / "play.mkv").read_bytes()
    (tmp_path / "play.mkv").write_bytes(whole[: len(whole) // 2])
    refused(path, "too few|no whole video")
    for text in ("", "#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "ffconcat version 1.0\nfile /etc/passwd\n"):
        (tmp_path / "play.mkv").write_text(text)
        refused(path, "no whole video")
    with av.open(tmp_path / "play.mkv", "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
    refused(path, "no video that can be decoded")
    with pytest.raises(UserError, match=r"no \.mp4 or \.mkv"):
        video_parts(str(tmp_path / "none"))


def test_frames_of_absurd_size(tmp_path):
    path = write(tmp_path, 0)
    encode(tmp_path / "play.mkv", np.zeros((1, 64, 2**19), np.uint8), "rawvideo", "gray")
    refused(path, "no size that can be read")
    encode(tmp_path / "play.mkv", np.zeros((1, 4000, 4000), np.uint8), "rawvideo", "gray")
    (tmp_path / "play.csv").write_text("action\n" + "1\n" * 1000)
    refused(path, "source.size=84")


def test_mutated_bytes_never_end_in_a_traceback(tmp_path):
    path, rng = write(tmp_path, 0, "play.mp4", codec="libx264", pixels="yuv420p"), random.Random(0)
    whole, refusals = (tmp_path / "play.mp4").read_bytes(), 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 5, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "play.mp4").write_bytes(data)
        try:
            video_card(path, game="pong")
            list(video(path, "play.mp4"))
        except UserError as error:
            assert "play.mp4" in str(error)
            refusals += 1
    assert refusals > 50

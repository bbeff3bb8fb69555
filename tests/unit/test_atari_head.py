"""Atari-HEAD's files, written by Pillow and tarfile."""

import bz2
import random
import tarfile
import tracemalloc

import ale_py
import cv2
import numpy as np
import pytest

from tests.fixtures.make_atari_head import add, name_of, png, write_meta, write_trial
from worldmodels.data.sources.atari_head import atari_head, atari_head_card, atari_head_parts
from worldmodels.envs.atari import rom_path
from worldmodels.types import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 10, 8, 3), np.uint8)


def trial(folder, number=52, n=12, game="ms_pacman", frames=None, **rows):
    """A game's folder with one trial of one open episode, unless `rows` say otherwise."""
    write_meta(folder.parent, (game, number, 0, "FALSE"))
    columns = {"action": [k % 18 for k in range(n)], "reward": [10 * (k % 4) for k in range(n)], "episode": [0] * n}
    frames = NOISE[:n] if frames is None else frames
    return write_trial(folder, number, frames, **columns | rows)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "head" / "ms_pacman"


def read(folder, **settings):
    return [e for part in atari_head_parts(str(folder)) for e in atari_head(str(folder), part, **settings)]


def refused(folder, match, **settings):
    with pytest.raises(UserError, match=match) as error:
        atari_head_card(str(folder), **settings)
        read(folder, **settings)
    assert "\n" not in str(error.value)


def test_episodes(folder):
    episode = [0] * 5 + [1] * 3 + [2] * 4
    trial(folder, episode=episode)
    first, second, third = read(folder)
    for e, rows in ((first, range(5)), (second, range(5, 8)), (third, range(8, 12))):
        np.testing.assert_array_equal(e.obs, NOISE[rows.start : rows.stop])
        assert e.action.tolist() == [k % 18 for k in rows] and e.action.dtype == np.uint8
        assert e.reward.tolist() == [10 * (k % 4) for k in rows] and e.reward.dtype == np.float32
        assert e.final_obs is None and not e.truncated.any() and not e.life_loss.any()
    assert [e.terminated.tolist() for e in (first, third)] == [[False] * 4 + [True], [False] * 4]
    about = {"trial": 52, "subject": "RZ", "chain": 52, "frame_averaging": False, "highscore": False}
    assert [e.info for e in (first, second, third)] == [about | {"episode_id": k} for k in range(3)]


def test_the_consoles_screen_and_the_card(folder):
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.loadROM(rom_path("ms_pacman"))
    frames = [ale.getScreenRGB() for _ in range(60) if ale.act(ale_py.Action.UP) is not None]
    part = trial(folder, n=60, frames=frames)
    (e,) = read(folder)
    np.testing.assert_array_equal(e.obs, frames)
    card = atari_head_card(str(folder))
    assert (card["source"], card["game"], card["frame_skip"]) == ("atari_head", "ms_pacman", 1)
    assert (card["licence"], card["policy"], card["lossy"]) == ("CC-BY-4.0", {"type": "human"}, None)
    assert card["action_set"] == list(range(18)) and not card["reward"]["clipped"]
    assert card["obs"] == {
        "height": 210,
        "width": 160,
        "channels": 3,
        "colour": "rgb",
        "resize": "none",
        "max_pool": False,
    }
    assert "gaze_positions" in card["dataset"]["stripped"] and str(folder) not in str(card)
    (small,) = atari_head(str(folder), part, size=84)
    np.testing.assert_array_equal(small.obs[7], cv2.resize(frames[7], (84, 84), interpolation=cv2.INTER_AREA))
    assert atari_head_card(str(folder), size=84, skip=4)["obs"] == card["obs"] | {
        "height": 84,
        "width": 84,
        "resize": "area",
        "max_pool": True,
    }


@pytest.mark.parametrize("absent", ["null", "", "18", "-1", "2.5"])
def test_a_row_without_action_cuts_the_episode(folder, absent):
    action = [1, 1, absent, absent, 1, absent, 1, 1, 1, 1, absent, 1]
    episode = [0] * 6 + [0, 1, 1, 1] + [1, 2]  # the row between 1 and 2 is lost, and with it the end of 1
    trial(folder, action=action, episode=episode)
    found = read(folder)
    assert [len(e) for e in found] == [2, 1, 1, 3, 1]
    assert [e.info.get("end") for e in found] == ["gap", "gap", None, "gap", None]
    assert [bool(e.terminated[-1]) for e in found] == [False, False, True, False, False]
    assert [e.info.get("stripped") for e in found] == [
        {"rows_without_action": 2},
        {"rows_without_action": 1},
        None,
        {"rows_without_action": 1},
        None,
    ]
    starts, follows = [0, 4, 6, 7, 11], [2, 5, None, 10, None]
    for e, start, follow in zip(found, starts, follows, strict=True):
        np.testing.assert_array_equal(e.obs, NOISE[start : start + len(e)])
        if follow is None:
            assert e.final_obs is None
        else:  # the dropped row's frame was seen after the last action
            np.testing.assert_array_equal(e.final_obs, NOISE[follow])


def test_dropped_rows_at_either_end_and_rewards_that_are_null(folder):
    trial(folder, action=["null"] * 2 + [1] * 10, reward=[0] * 6 + ["null"] + [0] * 4 + ["null"])
    first, second = read(folder)
    assert first.info["stripped"] == {"rows_without_action": 2, "rows_without_reward": 1}
    assert second.info["stripped"] == {"rows_without_reward": 1} and second.info["end"] == "gap"
    assert [len(first), len(second)] == [4, 4]
    trial(folder, action=["null"] * 12)
    refused(folder, "none of its rows has an action")


def test_frame_numbers_that_leave_some_out(folder):
    trial(folder, numbers=[*range(5, 10), *range(20, 27)], episode=[0] * 5 + [1] * 7)
    first, second = read(folder)
    assert [len(first), len(second)] == [5, 7]
    assert first.info["end"] == "gap" and first.final_obs is None and not first.terminated.any()


def test_null_episode_ids_go_on(folder):
    trial(folder, episode=["null"] * 3 + [0, "null", 0, 1, "null", "null", 1, 2, "null"])
    assert [(len(e), bool(e.terminated[-1]), e.info["episode_id"]) for e in read(folder)] == [
        (6, True, 0),
        (4, True, 1),
        (2, False, 2),
    ]
    trial(folder, episode=["null"] * 12)
    (e,) = read(folder)
    assert not e.terminated.any() and e.info["episode_id"] is None


def test_steps_of_four_rows(folder):
    trial(folder, n=18, episode=[0] * 10 + [1] * 8, action=[*range(17), "null"])
    first, second = read(folder, skip=4)
    assert first.action.tolist() == [0, 4, 8] and first.reward.tolist() == [60, 60, 10]
    assert first.terminated.tolist() == [False, False, True]
    pooled = np.maximum(NOISE[:-1], NOISE[1:])  # row k: of frames k and k + 1
    np.testing.assert_array_equal(first.obs, [NOISE[0], pooled[3], pooled[7]])
    assert second.action.tolist() == [10, 14] and second.final_obs is None  # its last step is not whole
    np.testing.assert_array_equal(second.obs, [NOISE[10], pooled[13]])
    trial(folder, n=9, action=[0] * 8 + ["null"])
    (e,) = read(folder, skip=4, size=5)
    np.testing.assert_array_equal(e.final_obs, cv2.resize(pooled[7], (5, 5), interpolation=cv2.INTER_AREA))
    refused(folder, "source.skip=0", skip=0)
    refused(folder, "source.size=-1", size=-1)


def test_trials_chains_and_highscore(folder):
    write_meta(
        folder.parent,
        ("ms_pacman", 9, 0, "TRUE"),
        ("ms_pacman", 10, 9, "FALSE"),
        ("ms_pacman_highscore", 300, 10, "FALSE"),
        ("ms_pacman", 301, 302, "FALSE"),
        ("ms_pacman", 302, 301, "FALSE"),
        ("alien", 53, 0, "FALSE"),
    )
    rows = {"action": [0] * 3, "reward": [0] * 3, "episode": [0] * 3}
    for where, number in (("highscore", 300), ("", 10), ("", 9), ("", 301)):
        write_trial(folder / where, number, NOISE[:3], **rows)
    parts = atari_head_parts(str(folder))
    assert parts == [*(f"{name_of(n)}.tar.bz2" for n in (9, 10, 301)), f"highscore/{name_of(300)}.tar.bz2"]
    infos = [e.info for e in read(folder)]
    assert [i["chain"] for i in infos][:2] + [infos[3]["chain"]] == [9, 9, 9]
    assert [i["frame_averaging"] for i in infos] == [True, False, False, False]
    assert [i["highscore"] for i in infos] == [False, False, False, True]
    assert atari_head_card(str(folder))["game"] == "ms_pacman"
    refused(folder, "it holds breakout and ms_pacman", game="breakout")
    write_trial(folder, 53, NOISE[:3], **rows)
    refused(folder, "it holds alien and ms_pacman, but a store holds one game")
    write_trial(folder, 54, NOISE[:3], **rows)
    refused(folder, "54_RZ_.* it is not named after a trial of meta_data.csv")


def test_an_archive_in_any_order_with_other_things_in_it(folder):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    names = [f"{name_of(52)}/{name}" for name in ("notes.txt", "RZ_2300052_99.png")]
    outside = [(f"{where}RZ_2300052_1.png", png(NOISE[30])) for where in ("../", "/tmp/")]
    extra = [(name, b"junk") for name in names] + outside + [link]
    trial(folder, order=[11, *range(5), *range(10, 4, -1)], extra=extra)
    (e,) = read(folder)
    np.testing.assert_array_equal(e.obs, NOISE[:12])


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("frame_id,", "frame,", "its first line is not frame_id,episode_id"),
        ("RZ_2300052_3,", "RZ_2300052_2,", "lists a frame twice"),
        ("RZ_2300052_3,", "RZ,", "row 2: it is no frame's name"),
        ("RZ_2300052_3,0", "RZ_2300052_3,x", "row 2: episode_id"),
        ("RZ_2300052_3,0", "RZ_2300052_3,nan", "row 2: episode_id"),
        ("RZ_2300052_3,0", "RZ_2300052_3,1e300", "row 2: episode_id"),
        ("RZ_2300052_12,", "RZ_2300052_13,", "frame RZ_2300052_13 is not in it"),
        ("RZ_2300052_12,0,null,61,30,", "RZ_2300052_12", "row 11: it is no frame's name"),
        ("RZ_2300052_1,", "\u00e9_1,", "missing or damaged|not in it"),
    ],
)
def test_damaged_rows(folder, old, new, match):
    part = trial(folder)
    file = folder / part.replace(".tar.bz2", ".txt")
    text = file.read_text()
    assert old in text
    file.write_bytes(text.replace(old, new).encode("latin-1"))
    refused(folder, f"52_RZ.*({match})")


def test_lines_without_anything_in_them(folder):
    part = trial(folder)
    for file in (folder.parent / "meta_data.csv", folder / part.replace(".tar.bz2", ".txt")):
        nothing = ",,,,\n" if file.suffix == ".csv" else "\n"
        file.write_text(nothing.join(file.read_text().splitlines(True)) + nothing)
    assert [len(e) for e in read(folder)] == [12]


def test_missing_files(folder):
    part = trial(folder)
    (folder.parent / "meta_data.csv").rename(folder / "meta_data.csv")
    assert len(read(folder)) == 1  # it may lie in the folder as well
    (folder / "meta_data.csv").write_text("GameName,trial_id\nms_pacman,52\n")
    refused(folder, "meta_data.csv, row 0: it must have GameName")
    (folder / "meta_data.csv").unlink()
    refused(folder, "no meta_data.csv in it or beside it: download it")
    trial(folder)
    (folder / part.replace(".tar.bz2", ".txt")).unlink()
    refused(folder, "52_RZ_2300052_Aug-10-14-52-42.txt: it is missing")
    refused(folder.parent, "give the unzipped folder of one game")


def archive(folder, data):
    (folder / f"{name_of(52)}.tar.bz2").write_bytes(bz2.compress(data))


def header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "data, match",
    [
        (header("a.png", 2**40), "a member of 1099511627776 bytes is no frame"),
        (header("a.txt", 2**40), "a member's length is absurd"),
        (header("a", 2**33, tarfile.GNUTYPE_LONGNAME), "a member of 8589934592 bytes"),
        (header("a", 2**33, tarfile.XHDTYPE), "a member of 8589934592 bytes"),
        (header("a.txt", -(10**6)), "missing or damaged"),
        (b"no tar file" * 100, "missing or damaged"),
        (b"", "missing or damaged|is not in it"),
    ],
)
def test_hostile_archives(folder, data, match):
    trial(folder)
    archive(folder, data)
    tracemalloc.start()
    refused(folder, f"52_RZ.*({match})")
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_hostile_pictures(folder):
    part = trial(folder)
    whole = png(NOISE[0])
    huge = whole[:16] + (2**31 - 1).to_bytes(4, "big") * 2 + whole[24:]
    for data, match in (
        (huge, "2147483647x2147483647"),
        (whole[:20], "missing or damaged"),
        (whole[:60], "missing or damaged"),
        (b"GIF89a" + whole, "missing or damaged|claims to be"),
        (b"\xff\xd8" + whole[2:], "missing or damaged"),
        (png(NOISE[0, :5]), r"its frames are \(5, 8, 3\)"),
    ):
        with tarfile.open(folder / part, "w:bz2") as tar:
            for k in range(12):
                add(tar, f"x/RZ_2300052_{k + 1}.png", data if k == 6 else png(NOISE[k]))
        refused(folder, f"52_RZ.*({match})")


def test_an_archive_cut_short(folder):
    part = trial(folder)
    whole = (folder / part).read_bytes()
    (folder / part).write_bytes(whole[: len(whole) // 2])
    refused(folder, "52_RZ.*(missing or damaged|is not in it)")


def test_an_episode_that_does_not_fit_into_memory(folder, tmp_path):
    trial(folder, n=3, frames=[np.zeros((1000, 1000, 3), np.uint8)] * 3)
    file = folder / f"{name_of(52)}.txt"
    with open(file, "a") as f:
        f.writelines(f"RZ_2300052_{k},0,0,50,0,0,null\n" for k in range(4, 2000))
    refused(folder, "source.size=84, or take source.skip=4")


def test_memory_does_not_grow_with_a_trial(folder):
    frame = np.zeros((210, 160, 3), np.uint8)
    trial(folder, n=200, frames=[frame] * 200, action=[0] * 200, episode=[k // 10 for k in range(200)])
    tracemalloc.start()
    for part in atari_head_parts(str(folder)):
        for e in atari_head(str(folder), part):
            assert len(e) == 10
    assert tracemalloc.get_traced_memory()[1] < 2**23  # the trial's frames are 20 MB
    tracemalloc.stop()


def test_mutated_bytes_never_end_in_a_traceback(folder):
    part, rng = trial(folder), random.Random(0)
    files = [folder.parent / "meta_data.csv", folder / part, folder / part.replace(".tar.bz2", ".txt")]
    tar, refusals = bz2.decompress((folder / part).read_bytes()), 0
    for k in range(240):
        file = files[k % 3]
        whole = file.read_bytes()
        inside = file.suffix == ".bz2" and k % 2
        data = bytearray(tar if inside else whole)
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.choice([len(data)] * 3 + [rng.randrange(len(data))])]
        file.write_bytes(bz2.compress(data) if inside else data)
        try:
            atari_head_card(str(folder))
            read(folder)
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
        file.write_bytes(whole)
    assert refusals > 120

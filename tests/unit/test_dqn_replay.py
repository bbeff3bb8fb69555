import gzip
import io
import json
import random
import re
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.fixtures.make_dqn_replay import random_episodes, real_play, save, surviving, write_log
from tests.unit.stores import FIELDS
from worldmodels.data.card import check_episode
from worldmodels.data.sources.dqn_replay import dqn_replay, dqn_replay_card, dqn_replay_parts
from worldmodels.data.sources.reading import minimal_actions
from worldmodels.types import UserError

PONG = [0, 1, 3, 4, 11, 12]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "Pong" / "1" / "replay_logs"


def log(folder, lengths, capacity=50, seed=0, final=True):
    """A log of random episodes, and what the ring knows of it."""
    episodes = list(random_episodes(np.random.default_rng(seed), lengths, PONG))
    return episodes, write_log(folder, episodes, capacity, PONG, final, level=1)


def read(path, **settings):
    return [e for part in dqn_replay_parts(str(path), **settings) for e in dqn_replay(str(path), part, **settings)]


def where(e):
    """Number and first step of a random episode, as its frames have them."""
    return int(e.obs[0, 0, 0]) * 256 + int(e.obs[0, 0, 1]), int(e.obs[0, 0, 2]) * 256 + int(e.obs[0, 0, 3]) - 1


def assert_rows(e, source, start=0):
    """All columns of `e` are those of `source` from step `start` on."""
    for name in FIELDS[:-1]:
        np.testing.assert_array_equal(getattr(e, name), getattr(source, name)[start : start + len(e)], err_msg=name)
        assert getattr(e, name).dtype == getattr(source, name).dtype
    assert e.final_obs is None
    json.dumps(e.info)


def outline(found):
    """(number, first step, rows, gap) of episodes."""
    return [(*where(e), len(e), e.info.get("end") == "gap") for e in found]


def test_real_play_comes_back_bit_for_bit(tmp_path):
    folder = tmp_path / "Breakout" / "5" / "replay_logs"
    episodes = list(real_play("breakout", 600))
    write_log(folder, episodes, 250, minimal_actions("breakout"))
    found = read(folder)
    card = dqn_replay_card(str(folder))
    assert len(found) == len(episodes) and len(dqn_replay_parts(str(folder))) > 2
    for a, b in zip(found, episodes, strict=True):
        assert_rows(a, b)
        check_episode(card, a, "it")
        assert a.info["stripped"] == {"zero_rows": 3} and not {"start", "end", "truncation"} & set(a.info)


@pytest.mark.parametrize("seed", range(24))
def test_parts_read_alone_give_what_survives_of_a_random_log(folder, seed):
    rng = np.random.default_rng(seed)
    capacity, mean = int(rng.integers(40, 250)), int(rng.choice([4, 20, 60, 150, 400]))
    lengths = rng.integers(1, 2 * mean, 2 + 6 * capacity // mean)
    episodes, ring = log(folder, lengths, capacity, seed, final=bool(rng.random() < 0.7))
    parts = dqn_replay_parts(str(folder))
    found = {part: list(dqn_replay(str(folder), part)) for part in random.Random(seed).sample(parts, len(parts))}
    found = [e for part in parts for e in found[part]]
    for e in found:
        number, step = where(e)
        assert_rows(e, episodes[number], step)
    if any("start" in e.info for e in found):  # the last dump came too late in its cycle to tell what it follows on
        assert capacity - 1 - ring.dumps[-1][1] < 20
        cut = next(i for i, e in enumerate(found) if "start" in e.info)
        assert outline(found)[: cut - 1] == [(n, 0, *rest) for n, *rest in surviving(ring)][: cut - 1]
    else:
        assert outline(found) == [(n, 0, *rest) for n, *rest in surviving(ring)]


def test_the_row_of_a_full_ring_comes_from_the_next_file(folder):
    episodes, ring = log(folder, [60, 60])  # 50 slots: row 49 of the run is step 46 of the first episode
    assert ring.rows[49] == (0, 46) and len(ring.dumps) == 3
    stored = np.load(io.BytesIO(gzip.decompress((folder / "$store$_observation_ckpt.0.gz").read_bytes())))
    assert not (stored[49] == episodes[0].obs[46]).all()
    first, second = read(folder)
    assert_rows(first, episodes[0])
    assert_rows(second, episodes[1])
    assert [e.info["checkpoint"] for e in (first, second)] == [0, 1]
    assert [e.info["row"] for e in (first, second)] == [3, 16]


@pytest.mark.parametrize("before", [46, 47, 48])  # rows in the ring before padding and first row straddle slot 49
def test_a_skipped_dump_cuts_the_episode_before_it_alone(folder, before):
    # The padding of the third episode skips the dump of the second cycle, which loses the end of the second episode.
    lengths = [37, before + 7, 60, 10]
    episodes, ring = log(folder, lengths)
    assert [added // 50 for added, _ in ring.dumps] == [0, 2, 3]
    first, second, third, fourth = read(folder)
    for e, source in zip((first, second, third, fourth), episodes, strict=True):
        assert_rows(e, source)
    assert second.info["end"] == "gap" and not second.terminated.any()
    assert [len(e) for e in (first, second, third, fourth)] == [37, 6, 60, 10]
    assert third.info["stripped"] == {"zero_rows": before - 46}
    assert not any("start" in e.info for e in (first, second, third, fourth))


def test_stale_rows_of_the_last_dump_are_not_read(folder):
    episodes, ring = log(folder, [30, 30, 10])
    assert ring.dumps == [(49, 49), (79, 29)]
    assert outline(read(folder)) == [(0, 0, 30, False), (1, 0, 30, False), (2, 0, 10, False)]


def test_a_run_that_ends_just_after_a_dump(folder):
    episodes, ring = log(folder, [30, 60])
    assert ring.dumps[-1] == (96, 46)
    episodes, ring = log(folder.parents[1] / "2" / "replay_logs", [30, 63])
    assert ring.dumps[-2:] == [(99, 49), (99, 49)]
    found = read(folder.parents[1] / "2")
    assert outline(found) == [(0, 0, 30, False), (1, 0, 63, False)]
    assert "start" not in found[1].info


def test_a_last_dump_too_late_to_compare_begins_anew(folder):
    episodes, ring = log(folder, [30, 60])
    first, cut, rest = read(folder)
    assert outline([first, cut]) == [(0, 0, 30, False), (1, 0, 13, True)]
    assert_rows(rest, episodes[1], 14)  # the row between stands in slot 49, of which no more is known
    assert rest.info["start"] == "unknown" and rest.terminated[-1]


def test_a_log_that_stops_leaves_its_last_episode_open(folder):
    episodes = list(random_episodes(np.random.default_rng(0), [20, 100], PONG))
    episodes[1] = replace(episodes[1], terminated=np.zeros(100, bool))
    write_log(folder, episodes, 60, PONG)
    last = read(folder)[-1]
    assert len(last) == 100 and not last.terminated.any() and not last.truncated.any() and "end" not in last.info


def test_a_checkpoint_alone_and_one_that_is_missing(folder):
    episodes, ring = log(folder, [100, 90, 65, 10], capacity=60)
    assert [added for added, _ in ring.dumps] == [59, 119, 179, 239, 277]
    for file in folder.glob("*_ckpt.2.gz"):
        file.unlink()
    found = read(folder)
    # Rows 119 to 179 of the run are gone; row 106 is the first of the second episode.
    assert dqn_replay_parts(str(folder)) == ["ckpt.0", "ckpt.1", "ckpt.3", "ckpt.4"]
    assert outline(found) == [
        (0, 0, 100, False),
        (1, 0, 13, True),
        (1, 74, 16, False),
        (2, 0, 65, False),
        (3, 0, 10, False),
    ]
    assert [e.info.get("start") for e in found] == [None, None, "unknown", None, None]
    for file in folder.glob("*_ckpt.[014].gz"):
        file.unlink()
    head, tail = read(folder)
    assert_rows(head, episodes[1], 74)
    assert head.info["start"] == "unknown" and head.terminated[-1]
    assert_rows(tail, episodes[2])
    assert len(tail) == 40 and "end" not in tail.info and not tail.terminated.any()


def test_27000_rows_are_the_time_limit(folder):
    episodes, _ = log(folder, [27_000, 26_999, 27_000], capacity=40_000)
    found = read(folder)
    assert [len(e) for e in found] == [27_000, 26_999, 27_000]
    assert [e.truncated[-1] for e in found] == [True, False, True]
    assert [e.terminated[-1] for e in found] == [False, True, False]
    assert [e.info.get("truncation") for e in found] == ["assumed", None, "assumed"]
    assert not any(e.truncated[:-1].any() or e.terminated[:-1].any() for e in found)


def test_an_episode_beyond_the_time_limit_is_refused(folder):
    log(folder, [27_001], capacity=40_000)
    with pytest.raises(UserError, match=r"terminal_ckpt\.0\.gz, row 3: an episode of 27001 rows.*27000"):
        read(folder)


def test_card(folder):
    log(folder, [60])
    card = dqn_replay_card(str(folder))
    assert card["game"] == "pong" and card["action_set"] == PONG and card["dataset"]["run"] == 1
    obs = {"height": 2, "width": 4, "channels": 1, "colour": "ale_gray", "resize": "area", "max_pool": True}
    assert card["obs"] == obs and card["reward"] == {"clipped": True} and card["sticky_prob"] == 0.25
    assert card["time_limit"] == 27_000 and card["truncation_known"] is False and card["lossy"] is None
    assert str(folder.parents[2]) not in json.dumps(card)
    assert dqn_replay_card(str(folder.parents[1])) == card


def test_which_game(tmp_path):
    log(tmp_path / "logs", [60])
    with pytest.raises(UserError, match="do not tell the game; give it as game="):
        dqn_replay_card(str(tmp_path / "logs"))
    assert dqn_replay_card(str(tmp_path / "logs"), game="pong")["game"] == "pong"
    log(tmp_path / "Breakout" / "2" / "replay_logs", [60])
    with pytest.raises(UserError, match="it holds breakout and pong, but a store holds one game"):
        dqn_replay_card(str(tmp_path / "Breakout"), game="pong")
    with pytest.raises(UserError, match="it holds 2 runs"):
        dqn_replay_card(str(tmp_path), game="pong")


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(UserError, match=r"there is no add_count_ckpt\.0\.gz; give a run's folder replay_logs"):
        dqn_replay_card(str(tmp_path / "nowhere"), game="pong")
    epoch = tmp_path / "pong" / "1" / "1"
    epoch.mkdir(parents=True)
    save(epoch / "observation.gz", np.zeros((9, 2, 2), np.uint8))
    with pytest.raises(UserError, match="without add_count .as d4rl-atari names them. do not tell which rows are new"):
        dqn_replay_parts(str(tmp_path))


class Server(ThreadingHTTPServer):
    """Python's own web server, over `folder`: fails where `broken` matches the address, hangs up where `cut` does."""

    broken = cut = "nothing"

    def __init__(self, folder):
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def send_head(self):
                if re.search(server.broken, self.path):
                    return self.send_error(500)
                return super().send_head()

            def copyfile(self, source, outputfile):
                outputfile.write(source.read(100 if re.search(server.cut, self.path) else -1))

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path) as server:
        yield server
        server.shutdown()


def test_a_run_is_read_from_a_web_server(folder, server):
    log(folder, [60, 20, 40])
    url = f"{server.url}/Pong/1/replay_logs"
    assert dqn_replay_parts(url) == dqn_replay_parts(str(folder))
    assert dqn_replay_card(url + "/") == dqn_replay_card(str(folder))
    for a, b in zip(read(url), read(folder), strict=True):
        assert_rows(a, b)
        assert a.info == b.info


def test_a_web_server_that_fails(folder, server):
    log(folder, [60, 20, 40])
    url = f"{server.url}/Pong/1/replay_logs"
    with pytest.raises(UserError, match=r"there is no add_count_ckpt\.0\.gz"):
        dqn_replay_parts(f"{server.url}/Pong/2/replay_logs")
    server.broken = r"add_count_ckpt\.1"  # is not the end of the run
    with pytest.raises(UserError, match=r"add_count_ckpt\.1\.gz: it is missing or out of reach .*500"):
        dqn_replay_parts(url)
    server.broken = r"observation_ckpt\.1"
    with pytest.raises(UserError, match=r"observation_ckpt\.1\.gz: it is missing or out of reach .*500"):
        read(url)
    server.broken, server.cut = "nothing", r"observation_ckpt\.1"
    with pytest.raises(UserError, match=r"observation_ckpt\.1\.gz: it cannot be read"):
        read(url)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="out of reach"):
        dqn_replay_parts(url)


@pytest.mark.parametrize("url", ["nothing://a/b", "gs://atari-replay-datasets/dqn/Pong/1/replay_logs"])
def test_an_address_that_nothing_reads(url):
    import importlib.util

    if url.startswith("gs:") and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(UserError, match=r"(?s)^cannot import \S+: it cannot be read|worldmodels\[cloud\]"):
        dqn_replay_parts(url)


def npy(header, version=b"\x01\x00", length=None, data=b""):
    """A gzipped .npy file with any header."""
    size = len(header) if length is None else length
    return gzip.compress(b"\x93NUMPY" + version + size.to_bytes(2 if version[0] == 1 else 4, "little") + header + data)


def header(descr, shape):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()


def raw(change):
    """Damage the bytes of a file."""
    return lambda file: file.write_bytes(change(file.read_bytes()))


def array(value):
    """Put another array in place of the one in a file."""
    return lambda file: save(file, value)


def row(number, value):
    """Put another value into a row."""

    def change(file):
        column = np.load(io.BytesIO(gzip.decompress(file.read_bytes())))
        column[number] = value
        save(file, column)

    return change


DAMAGE = {
    "truncated": ("observation", 1, raw(lambda b: b[: len(b) // 2]), "truncated"),
    "flipped": ("observation", 1, raw(lambda b: b[:300] + bytes([b[300] ^ 1]) + b[301:]), "cannot be read"),
    "no checksum": ("observation", 0, raw(lambda b: b[:-8] + bytes(8)), "incorrect data check"),
    "empty": ("terminal", 0, raw(lambda b: b""), "cannot be read|truncated"),
    "no gzip": ("action", 0, raw(lambda b: gzip.decompress(b)), "incorrect header check"),
    "no npy": ("action", 1, raw(lambda b: gzip.compress(b"hello world")), "magic string"),
    "longer": ("action", 0, raw(lambda b: gzip.compress(gzip.decompress(b) + b"!")), "more than the 50 rows"),
    "pickle": (
        "action",
        0,
        raw(lambda b: npy(header("'|O'", (50,)), data=b"cos\nsystem\n")),
        "object .50,., not int32",
    ),
    "long header": ("reward", 0, raw(lambda b: npy(b"", b"\x02\x00", 2**32 - 1)), "version .2, 0., not .1, 0."),
    "deep header": ("reward", 0, raw(lambda b: npy(b"(" * 5000)), "cannot be read"),
    "no header": ("reward", 0, raw(lambda b: npy(b"", data=bytes(10**6))), "cannot be read"),
    "many rows": ("action", 1, raw(lambda b: npy(header("'<i4'", (10**15,)))), "int32 .10{15},., not int32 .50,."),
    "many frames": (
        "observation",
        0,
        raw(lambda b: npy(header("'|u1'", (10**15, 2, 4)))),
        "it says that it holds 10{15}",
    ),
    "large frames": (
        "observation",
        0,
        raw(lambda b: npy(header("'|u1'", (50, 2, 10**9)))),
        "50 frames of 2x1000000000",
    ),
    "no frames": ("observation", 0, raw(lambda b: npy(header("'|u1'", (50, 0, 4)))), "50 frames of 0x4"),
    "few rows": ("reward", 2, array(np.zeros(49, np.float32)), "float32 .49,., not float32 .50,."),
    "other frames": ("observation", 1, array(np.zeros((50, 4, 4), np.uint8)), "uint8 .50, 4, 4., not uint8 .50, 2, 4."),
    "wrong dtype": ("reward", 0, array(np.zeros(50, np.float64)), "float64 .50,., not float32"),
    "an action": ("action", 0, row(20, 6), "row 20: action 6 is out of range; allowed are 0 to 5"),
    "a negative action": ("action", 1, row(49, -1), "row 49: action -1"),
    "nan": ("reward", 0, row(7, np.nan), "row 7: reward nan is not finite"),
    "a score": ("reward", 0, row(7, 200), "row 7: reward 200.0 is not clipped"),
    "a flag": ("terminal", 0, row(8, 255), "row 8: terminal is 255; allowed are 0 and 1"),
    "no padding": ("observation", 0, row(1, 9), "row 0: 3 rows of zeros must stand here"),
    "an end in the padding": ("terminal", 0, row(2, 1), "row 0: 3 rows of zeros must stand here"),
    "cut padding": ("terminal", 2, row(39, 1), "row 40: 3 rows of zeros must stand here"),
    "no full ring": ("add_count", 1, array(np.array(100)), "it is 100, but a ring of 50 rows is dumped when"),
    "the same cycle": ("add_count", 1, array(np.array(49)), "it is 49, but a ring of 50 rows is dumped when"),
    "a negative count": ("add_count", 2, array(np.array(-1)), "it is -1, but"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_in_one_sentence(folder, case):
    _, ring = log(folder, [60, 90])
    assert ring.dumps == [(49, 49), (99, 49), (149, 49), (156, 6)]
    column, number, damage, message = DAMAGE[case]
    damage(folder / f"{'' if column == 'add_count' else '$store$_'}{column}_ckpt.{number}.gz")
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert str(error.value).startswith(f"cannot import {folder}/") and "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
def test_a_header_that_python_2_wrote(folder):
    _, ring = log(folder, [60, 90])
    file = folder / "$store$_action_ckpt.0.gz"
    content = gzip.decompress(file.read_bytes())
    file.write_bytes(npy(header("'<i4'", "(50L,)"), data=content[128:]))
    assert len(read(folder)) == 2


@pytest.mark.parametrize("column", ["add_count", "observation", "action", "reward", "terminal"])
def test_a_missing_file_of_a_set(folder, column):
    log(folder, [60, 90])
    file = folder / f"{'' if column == 'add_count' else '$store$_'}{column}_ckpt.1.gz"
    file.unlink()
    with pytest.raises(UserError, match=re.escape(f"{file}: it is missing, but other files of checkpoint 1 are")):
        dqn_replay_parts(str(folder))

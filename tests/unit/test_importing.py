"""The import driver, with a throwaway source; its command, with recordings in .npz files."""

import json
import os
import signal
import subprocess
import time
import tracemalloc
from functools import partial
from itertools import accumulate

import numpy as np
import pytest

from tests.conftest import arguments, environment
from tests.unit.stores import FIELDS, assert_holds, card, episode
from worldmodels.data import importing
from worldmodels.data.disk import read_json
from worldmodels.data.importing import import_log
from worldmodels.data.segments import read_attributes
from worldmodels.data.store import Store
from worldmodels.data.verify import verify
from worldmodels.types import Episode, UserError

LOG = {"a": 3, "b": 0, "c": 5, "d": 1, "e": 0, "f": 4, "g": 0}  # episodes of each part
FIRST = dict(zip(LOG, accumulate(LOG.values(), initial=0), strict=False))


def read(part, at=None, happens="", seed=0):
    """The log; at its episode number `at` something happens."""
    for number in range(FIRST[part], FIRST[part] + LOG[part]):
        if number == at:
            if happens == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"mistake": UserError, "defect": ZeroDivisionError, "interrupt": KeyboardInterrupt}[happens](happens)
        yield episode(number + seed)


def logged(number):
    e = episode(number)
    part = [p for p in LOG if FIRST[p] <= number][-1]
    info = {**e.info, "part": part, "index": number - FIRST[part]}
    return Episode(*(getattr(e, name) for name in FIELDS), info)


EPISODES = [logged(i) for i in range(sum(LOG.values()))]
STEPS = [0, *accumulate(map(len, EPISODES))]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(importing, "SEGMENT_FRAMES", 100)


def digest(path):
    return {p.relative_to(path): p.is_file() and p.read_bytes() for p in path.rglob("*") if p.suffix != ".lock"}


@pytest.mark.parametrize("processes", [1, 3])
def test_a_log_becomes_segments_in_its_order(tmp_path, processes):
    seen = []
    figures = import_log(tmp_path / "s", card(), list(LOG), read, processes=processes, progress=seen.append)
    store = Store.open(tmp_path / "s")
    assert_holds(store, EPISODES)
    assert figures == read_json(tmp_path / "s/metrics.json")
    checked = verify(tmp_path / "s")
    assert (checked["problems"], checked["unchecked"]) == ([], 0)
    expected = {"steps": STEPS[-1], "episodes": len(EPISODES), "parts": len(LOG), "complete": True}
    assert figures.items() >= expected.items()
    assert seen[0] == (0, 0, 0) and seen[-1] == (len(LOG), len(EPISODES), STEPS[-1])
    rows = [sum(read_attributes(p)["lengths"]) for p in store.sealed]
    assert len(rows) > 2 and max(rows) < 100 + 60
    if processes == 1:
        assert min(rows[:-1]) >= 100
    assert not list((tmp_path / "s").rglob("*.tmp*")) and not list((tmp_path / "s/staging/toy").iterdir())
    untouched = digest(tmp_path / "s")
    assert import_log(tmp_path / "s", card(), list(LOG), None) == figures, "nothing is read again"
    assert digest(tmp_path / "s") == untouched


@pytest.mark.parametrize("processes", [1, 2])
def test_a_limit_ends_with_an_episode_and_a_larger_one_goes_on(tmp_path, processes):
    run = partial(import_log, tmp_path / "s", card(), list(LOG), processes=processes)
    for limit in (1, STEPS[4], STEPS[4] + 1, STEPS[12] - 1):
        figures = run(read, limit=limit)
        count = next(k for k, steps in enumerate(STEPS) if steps >= limit)
        assert_holds(Store.open(tmp_path / "s"), EPISODES[:count])
        assert (figures["steps"], figures["complete"]) == (STEPS[count], False)
        assert run(None, limit=limit) == figures
    assert run(read)["complete"]
    assert_holds(Store.open(tmp_path / "s"), EPISODES)


def test_without_metrics_only_what_is_missing_is_written(tmp_path):
    run = partial(import_log, tmp_path / "s", card(), list(LOG))
    run(read)
    (tmp_path / "s/metrics.json").unlink()
    before = digest(tmp_path / "s")
    assert run(read)["complete"]
    assert {k: v for k, v in digest(tmp_path / "s").items() if k.name != "metrics.json"} == before


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_in_the_first_segment_leaves_nothing(tmp_path, processes):
    run = partial(import_log, card=card(), parts=list(LOG), processes=processes)
    with pytest.raises(UserError, match="^mistake$"):
        run(tmp_path / "s", read=partial(read, at=1, happens="mistake"))
    assert not (tmp_path / "s").exists()
    (tmp_path / "t").mkdir()
    (tmp_path / "t/run.log").write_text("mine")
    with pytest.raises(UserError, match="^mistake$"):
        run(tmp_path / "t", read=partial(read, at=1, happens="mistake"))
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["run.log"]
    with pytest.raises(UserError, match="the log holds no episodes"):
        import_log(tmp_path / "s", card(), ["b", "e"], read, processes=processes)
    with pytest.raises(UserError, match="the log holds no episodes"):
        import_log(tmp_path / "s", card(), [], read, processes=processes)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_later_keeps_what_was_committed(tmp_path, processes):
    run = partial(import_log, tmp_path / "s", card(), list(LOG), processes=processes)
    broken = partial(read, at=11, happens="mistake")
    with pytest.raises(UserError, match="^mistake; the [0-9]+ steps in .*/s are kept, and need not be read again$"):
        run(broken)
    count = len(Store.open(tmp_path / "s").lengths)
    assert 3 < count <= 11
    assert_holds(Store.open(tmp_path / "s"), EPISODES[:count])
    before = digest(tmp_path / "s")
    with pytest.raises(UserError, match="mistake"):
        run(broken)
    assert digest(tmp_path / "s") == before
    run(read)
    assert_holds(Store.open(tmp_path / "s"), EPISODES)


def test_an_interrupt_keeps_what_was_committed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        import_log(tmp_path / "s", card(), list(LOG), partial(read, at=11, happens="interrupt"))
    assert not list((tmp_path / "s").rglob("*.tmp*"))
    assert_holds(Store.open(tmp_path / "s"), EPISODES[: len(Store.open(tmp_path / "s").lengths)])


@pytest.mark.parametrize("happens, error", [("killed", UserError), ("defect", RuntimeError)])
def test_a_worker_that_dies_is_told(tmp_path, happens, error):
    with pytest.raises(error, match="killed by signal 9" if error is UserError else "its traceback is above") as e:
        import_log(tmp_path / "s", card(), list(LOG), partial(read, at=11, happens=happens), processes=2)
    assert "\n" not in str(e.value)
    import_log(tmp_path / "s", card(), list(LOG), read, processes=2)
    assert_holds(Store.open(tmp_path / "s"), EPISODES)


def test_what_cannot_be_stored_is_told(tmp_path):
    def bad(part):
        e = episode(0)
        e.reward[0] = np.nan
        yield e

    with pytest.raises(UserError, match="episode 0 of a cannot be stored: a reward is not finite"):
        import_log(tmp_path / "s", card(), list(LOG), bad)
    assert not (tmp_path / "s").exists()


def test_another_log_is_refused(tmp_path):
    run = partial(import_log, tmp_path / "s", limit=STEPS[5])
    run(card(), list(LOG), read)
    before = digest(tmp_path / "s")
    for other, parts, reader, match in [
        (card(frame_skip=1), list(LOG), read, "begun with frame_skip=4 and cannot go on with 1: give another store="),
        (card(seed=3), list(LOG), read, "begun with seed=0 and cannot go on with 3"),
        (card(), [*LOG, "h"], read, "other parts than when its import into .* began: give another store="),
        (card(), list(LOG), partial(read, seed=1), "the log has changed .*: episode 0 of c is another one"),
        (card(), list(LOG), lambda part: read("d"), "the log has changed since its import began"),
    ]:
        with pytest.raises(UserError, match=match):
            run(other, parts, reader, limit=None)
    assert digest(tmp_path / "s") == before
    with Store.create(tmp_path / "own", card()) as store:
        store.append(episode(0))
    with pytest.raises(UserError, match="other parts"):
        import_log(tmp_path / "own", card(), list(LOG), read)


def test_a_second_import_does_not_disturb_the_first(tmp_path):
    def meanwhile(part):
        with pytest.raises(UserError, match="another process is writing"):
            import_log(tmp_path / "s", card(), list(LOG), read)
        yield from read(part)

    import_log(tmp_path / "s", card(), list(LOG), meanwhile)
    assert_holds(Store.open(tmp_path / "s"), EPISODES)


def test_ends_of_episodes(tmp_path):
    def cut(part):
        for number, info in enumerate(({}, {"end": "gap"}, {}, {"end": "gap"})):
            e = episode(number)
            if number < 2:
                e.terminated[:], e.truncated[:] = False, False
            yield Episode(*(getattr(e, name) for name in FIELDS), info)

    import_log(tmp_path / "s", card(), ["all"], cut)
    store = Store.open(tmp_path / "s")
    assert [store.episode_info(i)["end"] for i in range(4)] == ["open", "gap", "terminal", "truncated"]


def test_memory_does_not_grow_with_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "SEGMENT_FRAMES", 65_536)

    def much(part):
        for number in range(40):
            yield episode(number, 250, channels=1, side=84)

    tracemalloc.start()
    import_log(tmp_path / "s", card(1, 84), ["all"], much)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    store = Store.open(tmp_path / "s")
    assert len(store.sealed) == 1 and int(store.lengths.sum()) * 84 * 84 > 70_000_000
    assert peak < 25_000_000, f"{peak} bytes"


# The command


def record(folder, count, length=None):
    folder.mkdir()
    for i in range(count):
        e = episode(i, length)
        columns = {name: getattr(e, name) for name in ("action", "reward", "terminated", "truncated")}
        np.savez(folder / f"ep_{i}.npz", obs=e.obs, **columns)
    return folder


def test_the_command(tmp_path, in_process):
    folder, store = record(tmp_path / "log", 12), tmp_path / "s"
    args = ("import", "source=npz", f"path={folder}", "game=pong", f"store={store}")
    code, out, err = in_process(*args, "limit=50")
    assert code == 0, err
    assert out.splitlines()[-1] == str(store)
    assert 50 <= int(Store.open(store).lengths.sum()) < 110
    code, out, err = in_process(*args, "processes=2")
    assert code == 0, err
    assert json.loads((store / "metrics.json").read_text())["complete"]
    for i, e in enumerate(map(Store.open(store).episode, range(12))):
        np.testing.assert_array_equal(e.obs, episode(i).obs)
        assert (e.info["part"], e.info["index"]) == (f"ep_{i}.npz", 0)
    code, out, _ = in_process(*args)
    assert code == 0 and "nothing to do: the store already holds" in out


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (("path=x",), ["the source is missing", "npz"]),
        (("source=catch_play", "path=x"), ["source=catch_play reads no log", "one of", "npz"]),
        (("source=npz", "path=x", "limit=0"), ["limit=0"]),
        (("source=npz", "path=x", "processes=0"), ["processes=0"]),
        (("source=npy", "path=x"), ["unknown source 'npy'", "did you mean 'npz'"]),
        (("source=npz",), ["'path' is missing"]),
    ],
)
def test_mistakes_in_the_command(tmp_path, in_process, settings, parts):
    code, _, err = in_process("import", f"store={tmp_path / 's'}", *settings)
    assert (code, err.count("\n")) == (2, 1), err
    assert all(part in err for part in parts), err
    assert not (tmp_path / "s").exists()


def test_interrupted_as_the_first_segment_is_committed(tmp_path, monkeypatch):
    """After the rename, before the store has taken note of it: what is committed is not taken for an empty store."""
    refresh, calls = Store.refresh, []

    def interrupted(store):
        calls.append(store)
        if len(calls) == 1:
            raise KeyboardInterrupt
        refresh(store)

    monkeypatch.setattr(Store, "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_log(tmp_path / "s", card(), list(LOG), read)
    store = Store.open(tmp_path / "s")
    assert len(calls) == 2 and len(store.lengths)
    assert_holds(store, EPISODES[: len(store.lengths)])


def test_an_interrupted_command_keeps_what_was_committed(tmp_path):
    folder, store = record(tmp_path / "log", 300, 1000), tmp_path / "s"
    args = arguments("import", "source=npz", f"path={folder}", "game=pong", f"store={store}")
    process = subprocess.Popen(args, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while not list(store.glob("segments/npz/*.zarr")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert 65_536 <= Store.open(store).lengths.sum() < 300_000

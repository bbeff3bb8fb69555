"""Killed, or out of disk, at any moment of collecting and importing: what was committed is there, and the next run goes
on to what an undisturbed one makes. And a store that grows can be read.

The tests run this file as a program, which forks a child for every kill: one that has imported everything already.
"""

import errno
import fcntl
import math
import mmap
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import ROOT, environment
from tests.unit.stores import FIELDS, assert_holds, assert_same, card, episode
from worldmodels.data import groups, importing, segments
from worldmodels.data import store as store_module
from worldmodels.data.collecting import collect
from worldmodels.data.importing import import_log
from worldmodels.data.store import Store
from worldmodels.types import Episode, UserError

PARTS = {"a": range(4), "b": range(4, 5), "c": range(5, 12)}
SEGMENT = 120  # rows, so that there are three segments or four


def read(part, pause=0.0):
    for number in PARTS[part]:
        time.sleep(pause)
        yield episode(number)


def played(number):
    return episode(number)


def imported(number):
    e, part = episode(number), next(part for part, numbers in PARTS.items() if number in numbers)
    info = {**e.info, "part": part, "index": number - PARTS[part][0]}
    return Episode(*(getattr(e, name) for name in FIELDS), info)


EXPECTED = {"collect": [played(i) for i in range(12)], "import": [imported(i) for i in range(12)]}


def collecting(path, pause=0.0):
    def play(steps, start):
        for number in range(start, 12):
            time.sleep(pause)
            yield episode(number)

    collect(path, card(), play, sum(map(len, EXPECTED["collect"])))


def importing_(path):
    import_log(path, card(), list(PARTS), read)


# The program


def child(kind, path, arm):
    """Fork a process that does the work; returns its process id and where it counts committed episodes and points."""
    shared = mmap.mmap(-1, 16)
    if pid := os.fork():
        return pid, shared
    code = 1
    try:
        for name in ("append", "commit"):
            setattr(Store, name, telling(getattr(Store, name), shared))
        arm(shared)
        {"collect": collecting, "import": importing_}[kind](path)
        code = 0
    except UserError as e:
        assert "is full" in str(e) and "\n" not in str(e), e
        code = 2
    except BaseException as e:
        print(repr(e), file=sys.stderr)
        raise
    finally:
        os._exit(code)


def telling(method, shared):
    def told(store, argument):
        method(store, argument)
        struct.pack_into("q", shared, 0, len(store.lengths))

    return told


def points(names, at, happens):
    """Before each of these calls, and halfway through each write of a segment, look whether something happens."""

    def arm(shared):
        def point():
            reached = struct.unpack_from("q", shared, 8)[0] + 1
            struct.pack_into("q", shared, 8, reached)
            if reached >= at:
                happens()

        def before(call):
            def counted(*args, **kw):
                point()
                return call(*args, **kw)

            return counted

        class Halved:
            def __init__(self, path, mode):
                self.file = open(path, mode, buffering=0)  # noqa: SIM115
                self.close = self.file.close

            def write(self, data):
                self.file.write(data[: len(data) // 2])
                point()
                self.file.write(data[len(data) // 2 :])

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.close()

        for name in names:
            setattr(os, name, before(getattr(os, name)))
        segments.open = groups.open = Halved

    return arm


def small_files(size):
    return lambda shared: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


WRITES = ("fsync", "replace", "rename", "link", "mkdir")
ALL = (*WRITES, "unlink", "rmdir")


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(path, committed, expected):
    for write in (False, True):
        try:
            store = Store.open(path, write)
        except UserError as e:
            assert not committed and re.search("there is no store|holds no episodes", str(e)), e
            continue
        assert committed <= len(store.lengths) <= len(expected), (committed, store.lengths)
        assert_holds(store, expected[: len(store.lengths)])
        store.close()
        assert not write or not list(path.rglob("*.tmp*"))


def finish(kind, path, names=ALL):
    """Let a run end by itself; returns how many points of these names it has."""
    pid, shared = child(kind, path, points(names, math.inf, kill))
    assert ended(pid) == 0
    check(path, 12, EXPECTED[kind])
    assert not list(path.glob("staging/toy/*")) and (path / "metrics.json").exists()
    return struct.unpack_from("q", shared, 8)[0]


def program(kind, kills, root):
    """Kill `kills` times, half of them at points, then run out of disk a third as often."""
    import zarr.codecs  # noqa: F401 (before the forks)

    store_module.SEGMENT_FRAMES = importing.SEGMENT_FRAMES = SEGMENT
    times, totals = [], []
    for k, names in enumerate((ALL, WRITES, ALL)):
        began = time.monotonic()
        totals.append(finish(kind, root / f"undisturbed{k}", names))
        times.append(time.monotonic() - began)
    (total, writes, _), seconds, rng, hits = totals, min(times), random.Random(0), 0

    def moments(n, total):  # one in each nth of all points
        return [1 + math.floor(total * (k + rng.random()) / n) for k in range(n)]

    for k, at in enumerate(moments(kills // 2, total)):
        path = root / f"point{k}"
        pid, shared = child(kind, path, points(ALL, at, kill))
        assert ended(pid) == -signal.SIGKILL, at
        check(path, struct.unpack_from("q", shared)[0], EXPECTED[kind])
        finish(kind, path)
    for k in range(kills - kills // 2):
        path = root / f"time{k}"
        pid, shared = child(kind, path, lambda shared: None)
        time.sleep(rng.uniform(0, 0.8 * seconds))
        os.kill(pid, signal.SIGKILL)
        hits += ended(pid) == -signal.SIGKILL
        check(path, struct.unpack_from("q", shared)[0], EXPECTED[kind])
        finish(kind, path)
    disks = [points(WRITES, at, full) for at in moments(kills // 3, writes)]
    disks += [small_files(size) for size in (5000, 20000)]
    for k, disk in enumerate(disks):
        path = root / f"full{k}"
        pid, shared = child(kind, path, disk)
        assert ended(pid) == 2, k
        if path.exists():
            assert not list(path.rglob("*.tmp*")), "what cannot be finished is removed at once"
        check(path, struct.unpack_from("q", shared)[0], EXPECTED[kind])
        finish(kind, path)
    print(total, hits)


# The tests


def run(*args, **kw):
    """This file as a program."""
    command = [sys.executable, "-m", "tests.integration.test_kill", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, **kw)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.exhaustive)])
def test_nothing_committed_is_ever_lost(tmp_path, kind, kills):
    process = run("kill", kind, kills, tmp_path, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    total, hits = map(int, out.split())
    assert total > 60, "many calls were aimed at"
    assert hits >= kills // 5, "and most kills at random times were before the end"


@pytest.mark.parametrize("delay", [0.3, 1.0])
def test_killed_with_its_workers(tmp_path, delay):
    process = run("import", tmp_path / "s", 0.3)
    while not list(tmp_path.glob("s/segments/toy/*.tmp")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 3, "the server and two workers"
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    check(tmp_path / "s", 0, EXPECTED["import"])
    assert run("import", tmp_path / "s", 0).wait() == 0
    check(tmp_path / "s", 12, EXPECTED["import"])


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_store_can_be_read_while_it_grows(tmp_path, kind, monkeypatch):
    def no_lock(*args):
        raise AssertionError("readers take no locks")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(fcntl, "lockf", no_lock)
    expected, path, seen, process = EXPECTED[kind], tmp_path / "s", [], run(kind, tmp_path / "s", 0.1)
    kept = None
    while process.poll() is None or not seen or seen[-1] < 12:
        assert process.returncode in (None, 0)
        try:
            fresh = Store.open(path)
        except UserError as e:
            assert not seen, e
            continue
        kept = kept or fresh
        if kept.lengths.sum() < fresh.lengths.sum():
            before = len(kept.lengths)
            assert_same(kept.episode(before - 1), expected[before - 1])  # sealed meanwhile or not
            assert len(kept.lengths) >= before
            kept.refresh()
        for store in (fresh, kept):
            n = len(store.lengths)
            windows = store.read([(i, -1) for i in range(n)], 70)
            for i, e in enumerate(expected[:n]):
                np.testing.assert_array_equal(windows.obs[i, 1 : 1 + len(e)].numpy().transpose(0, 2, 3, 1), e.obs)
        seen.append(len(fresh.lengths))
    assert process.returncode == 0, "the writer was not disturbed"
    assert seen == sorted(seen) and len(set(seen)) > 2, seen
    assert_holds(kept, expected)


def main(what, *args):
    store_module.SEGMENT_FRAMES = importing.SEGMENT_FRAMES = SEGMENT
    if what == "kill":
        kind, kills, root = args
        program(kind, int(kills), Path(root))
    elif what == "collect":
        collecting(Path(args[0]), float(args[1]))
    else:
        from functools import partial

        import_log(Path(args[0]), card(), list(PARTS), partial(read, pause=float(args[1])), processes=2)


if __name__ == "__main__":
    main(*sys.argv[1:])

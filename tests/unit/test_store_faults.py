"""What a store makes of crashes, full disks, missing rights and damaged files."""

import errno
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.unit.stores import SEGMENTS, assert_holds, card, episode, filled, flip
from worldmodels.data.store import Store
from worldmodels.types import UserError

# Crashes


def in_process_env():
    """Where a process finds the package and these tests' helpers."""
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}"}


def test_leftovers_of_a_crash_are_tidied(tmp_path):
    root = tmp_path / "s"
    _, episodes = filled(root, seal_at=())
    staged = tmp_path / "copies"
    shutil.copytree(root / "staging/toy", staged)
    with Store.open(root, write=True):
        pass
    for name in ("000000003.npz", "000000011.npz"):  # died after the segment's rename
        shutil.copy(staged / name, root / "staging/toy" / name)
    (root / "staging/toy/000000012.npz.tmp77").write_bytes(b"half")
    (root / SEGMENTS / "000001.zarr.tmp77/obs").mkdir(parents=True)
    (root / "sources/toy.json.tmp77").write_text("{")
    assert_holds(Store.open(root), episodes)
    with Store.open(root, write=True) as store:
        assert_holds(store, episodes)
        assert not list(root.rglob("*.tmp*")) and not list((root / "staging/toy").iterdir())
        store.append(episode(12))
    assert_holds(Store.open(root), [*episodes, episode(12)])


def test_killed_while_being_made(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/store.json.tmp77").write_text("{")
    with pytest.raises(UserError, match="there is no store at"):
        Store.open(tmp_path / "new")
    Store.create(tmp_path / "new", card()).close()
    assert not list((tmp_path / "new").glob("*.tmp*"))
    Store.create(tmp_path / "s", card()).close()
    (tmp_path / "s/sources/toy.json").unlink()
    with pytest.raises(UserError, match="holds no episodes"):
        Store.open(tmp_path / "s")
    with Store.create(tmp_path / "s", card()) as store:
        store.append(episode(0))
    assert_holds(Store.open(tmp_path / "s"), [episode(0)])


MAKER = """
import sys, time
from pathlib import Path
from stores import card, episode
from worldmodels.data.store import Store
from worldmodels.types import UserError
root, number, sources = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
for k, source in enumerate(sources):
    (root / f"{number}.{k}").touch()
    while not all((root / f"{other}.{k}").exists() for other in "01"):
        pass
    try:
        with Store.create(root / f"s{k}", {**card(), "source": source}) as store:
            store.append(episode(int(number)))
            print(store.uuid)
            time.sleep(0.02)
    except UserError as e:
        print(e)
"""


def test_two_processes_make_a_store_at_once(tmp_path):
    """One of them writes; the other is told so, or adds to the same store when the first is done."""
    env, rounds = in_process_env(), 12
    same = ["toy"] * (rounds // 2)
    sources = [",".join(same + [name] * (rounds // 2)) for name in ("toy", "mario")]
    makers = [
        subprocess.Popen([sys.executable, "-c", MAKER, tmp_path, str(i), sources[i]], stdout=-1, stderr=-1, env=env)
        for i in range(2)
    ]
    said = []
    for maker in makers:
        out, error = maker.communicate(timeout=120)
        assert maker.returncode == 0, error.decode()
        said.append(out.decode().splitlines())
    for k in range(rounds):
        store = Store.open(tmp_path / f"s{k}")
        told = [lines[k] for lines in said]
        wrote = [i for i in range(2) if told[i] == store.uuid]
        assert len(store.lengths) == len(wrote) >= 1, told
        for other in {0, 1}.difference(wrote):
            assert ("another process is writing" if k < rounds // 2 else "is of source") in told[other], told
        assert len(list(store.path.glob("sources/*.json"))) == 1 and not list(store.path.rglob("*.tmp*"))


# Disks and rights


def in_process(code, *args):
    """What a program prints that may import the package and these tests' helpers."""
    run = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=in_process_env())
    assert run.returncode == 0, run.stderr
    return run.stdout


def limited(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_segment_that_a_full_disk_does_not_let_in_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store.create(tmp_path / "s", card()) as store:
        store.append(episode(0))
        with monkeypatch.context() as patch, pytest.raises(UserError, match="is full"):
            patch.setattr(os, "rename", full)
            store.seal()
        assert not list(tmp_path.rglob("*.tmp*"))
        assert_holds(store, [episode(0)])
    assert_holds(Store.open(tmp_path / "s"), [episode(0)])


def test_disk_full_keeps_what_is_stored(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    store = Store.create(tmp_path / "s", card())
    for i in range(3):
        store.append(episode(i, 20))  # about 4 kB each
    try:
        limited(8_000)
        with pytest.raises(UserError, match="disk of .* is full; nothing stored is lost"):
            store.append(episode(3, 60))
        with pytest.raises(UserError, match="disk of .* is full; nothing stored is lost"):
            store.seal()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert not list((tmp_path / "s").rglob("*.tmp*"))
    assert_holds(Store.open(tmp_path / "s"), [episode(i, 20) for i in range(3)])
    store.append(episode(3, 60))
    store.seal()
    assert_holds(store, [*(episode(i, 20) for i in range(3)), episode(3, 60)])


@pytest.mark.parametrize("calls", range(1, 30, 4))
def test_every_fsync_may_fail(tmp_path, monkeypatch, calls):
    store = Store.create(tmp_path / "s", card())
    store.append(episode(0))
    left, real = [calls], os.fsync

    def failing(fd):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", failing)
        with pytest.raises(UserError, match="is full"):
            store.append(episode(1))
            store.seal()
            store.append(episode(2))
    store.close()
    with Store.open(tmp_path / "s", write=True) as again:
        count = len(again.lengths)
        assert count >= 1
        assert_holds(again, [episode(i) for i in range(count)])


NO_RIGHTS = """
import os, sys
os.chdir(sys.argv[1])
from stores import card
from worldmodels.data.store import Store
from worldmodels.types import UserError
Store.open("s")  # imports all it needs: the interpreter may be in a folder of root's
import fcntl, numpy.random
if os.getuid() == 0:  # root may do anything
    os.setuid(65534)
for attempt in (lambda: Store.create("closed/s", card()), lambda: Store.open("s", write=True)):
    try:
        attempt()
    except UserError as e:
        print(e)
store = Store.open("s")
print(len(store.lengths), {k: v.tolist() for k, v in store.splits.items()})
"""


def test_no_permission():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        root = Path(folder)
        filled(root / "s", count=3)
        (root / "closed").mkdir()
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        first, second, splits = in_process(NO_RIGHTS, folder).splitlines()
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
        assert "no permission to use closed/s" in first and "no permission to use s/sources/toy.lock" in second
        assert not (root / "s/splits").exists()
        assert splits == "3 " + str({k: v.tolist() for k, v in Store.open(root / "s").splits.items()})


# Damage


@pytest.mark.parametrize("place", [100, -10])  # in a chunk; in the index
def test_flipped_bit_is_noticed(tmp_path, place):
    filled(tmp_path / "s", count=6)
    flip(tmp_path / "s" / SEGMENTS / "000000.zarr/obs/c/0/0/0/0", place)
    store = Store.open(tmp_path / "s")
    with pytest.raises(UserError, match="000000.zarr/obs is damaged"):
        for i in range(6):
            store.episode(i)


def test_lost_or_hostile_files_are_one_sentence(tmp_path):
    filled(tmp_path / "s", seal_at=(5,))
    (tmp_path / "s" / SEGMENTS / "000000.zarr/reward/c/0").write_bytes(b"")
    with pytest.raises(UserError, match="reward/c/0 is damaged"):
        Store.open(tmp_path / "s").read([(1, 0)], 4)
    (tmp_path / "s" / SEGMENTS / "000000.zarr/obs/zarr.json").unlink()
    with pytest.raises(UserError, match="000000.zarr/obs is damaged"):  # and not asked for again without end
        Store.open(tmp_path / "s").read([(2, 0)], 4)
    staged = tmp_path / "s/staging/toy/000000007.npz"
    mark = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    np.savez(staged, action=np.array([Evil()], object), allow_pickle=True)
    assert pickle.dumps(Evil())
    with pytest.raises(UserError, match="000000007.npz is damaged"):
        Store.open(tmp_path / "s")
    assert not mark.exists()
    shutil.rmtree(tmp_path / "s" / SEGMENTS / "000000.zarr")
    (tmp_path / "s" / SEGMENTS / "000000.zarr").mkdir()
    with pytest.raises(UserError, match="000000.zarr is damaged"):
        Store.open(tmp_path / "s")

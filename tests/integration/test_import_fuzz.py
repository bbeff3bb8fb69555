"""Logs of every format, through the command line: all readers agree on a good one, a damaged one is one sentence."""

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from tests.fixtures import make_diamond, make_rl_unplugged
from tests.fixtures.make_dqn_replay import random_episodes, write_log
from tests.fixtures.make_lerobot import write_lerobot
from tests.unit import test_atari_head, test_minari, test_video
from tests.unit.stores import by_tensorstore, episode
from tests.unit.test_npz import arrays
from worldmodels.data.store import Store

RUN = Callable[..., tuple[int, str, str]]
PONG = [0, 1, 3, 4, 11, 12]


def noise(*lengths: int) -> list:
    return list(random_episodes(np.random.default_rng(0), lengths, PONG))


def dqn_replay(folder: Path) -> None:
    write_log(folder / "Pong" / "1" / "replay_logs", noise(30, 20, 45, 9), 40, PONG)


def rl_unplugged(folder: Path) -> None:
    for shard, lengths in enumerate([(5, 3), (4,)]):
        examples = [
            make_rl_unplugged.example(make_rl_unplugged.fields(e, PONG, i)) for i, e in enumerate(noise(*lengths))
        ]
        name = f"run_1-{shard:05d}-of-00002"
        make_rl_unplugged.write_shard(folder / "atari_episodes_ordered" / "Pong" / name, examples)


def minari(folder: Path) -> None:
    test_minari.create(folder, "atari/pong/noise-v0", [test_minari.play(5, k) for k in range(2)])


def npz(folder: Path) -> None:
    for k in range(3):
        np.savez_compressed(folder / f"{k}.npz", **arrays(episode(k, 6)))


def hdf5(folder: Path) -> None:
    with h5py.File(folder / "play.h5", "w") as f:
        for k in range(2):
            for name, values in arrays(episode(k, 6)).items():
                f.create_dataset(f"{k}/{name}", data=values, compression="gzip" if k else None)


def video(folder: Path) -> None:
    test_video.write(folder)


def diamond(folder: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    episodes = [replace(e, obs=frames[: len(e)]) for e in noise(4, 6)]
    (folder / "train").mkdir()
    make_diamond.write(folder / "train", episodes, PONG)


def atari_head(folder: Path) -> None:
    test_atari_head.trial(folder / "ms_pacman", n=6)


def lerobot(folder: Path) -> None:
    write_lerobot(folder, [episode(k, 5, side=64, final=False) for k in range(3)])


def command(name: str, log: Path, store: Path) -> list[str]:
    game, path = ("ms_pacman", log / "ms_pacman") if name == "atari_head" else ("pong", log)
    return ["import", f"source={name}", f"path={path}", f"store={store}", f"game={game}"]


FORMATS = {f.__name__: f for f in (dqn_replay, rl_unplugged, minari, npz, hdf5, video, diamond, atari_head, lerobot)}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small good log of every format."""
    root = tmp_path_factory.mktemp("logs")
    for name, write in FORMATS.items():
        (root / name).mkdir()
        write(root / name)
    return {name: root / name for name in FORMATS}


def damage(rng: random.Random, folder: Path) -> str:
    """Something that happens to files; told, so that a failure can be seen again."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    kind = rng.choice(
        ["flip", "flip", "flip many", "truncate", "truncate", "insert", "empty", "delete", "swap", "zeros"]
    )
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "flip many":
        for _ in range(rng.randrange(2, 40)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "truncate":
        del data[rng.randrange(len(data)) :]
    elif kind == "insert":
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif kind == "zeros":
        at = rng.randrange(len(data))
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "swap":
        data = bytearray(rng.choice(files).read_bytes())
    path.write_bytes(b"" if kind == "empty" else data)
    if kind == "delete":
        path.unlink()
    return f"{kind} {path.relative_to(folder)}"


def digest(store: Path) -> str:
    """Of what is kept: everything but the lock and the figures of the last command."""
    h = hashlib.sha256()
    for path in sorted(p for p in store.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != "metrics.json"):
        h.update(str(path.relative_to(store)).encode() + path.read_bytes())
    return h.hexdigest()


@pytest.mark.parametrize("name", FORMATS)
def test_every_reader_reads_what_was_imported(
    in_process: RUN, logs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Our reader, zarr-python and TensorStore agree on all rows of each format's log."""
    code, _, err = in_process(*command(name, logs[name], tmp_path / "s"))
    assert code == 0, err
    store = Store.open(tmp_path / "s")
    ours = {"obs": np.concatenate([store.episode(i).obs for i in range(len(store.lengths))])}
    ours |= {column: store.column(column) for column in ("action", "reward", "flags")}
    for column, values in ours.items():
        paths = [segment / column for segment in store.sealed]
        np.testing.assert_array_equal(np.concatenate([zarr.open_array(p, mode="r")[:] for p in paths]), values)
        np.testing.assert_array_equal(np.concatenate([by_tensorstore(p) for p in paths]), values)


@pytest.mark.parametrize("cases", [90, pytest.param(2000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(7200)])])
def test_damaged_logs(in_process: RUN, logs: dict[str, Path], tmp_path: Path, cases: int) -> None:
    ends, imported = {0: 0, 2: 0}, {name: tmp_path / f"good-{name}" for name in FORMATS}
    for name, store in imported.items():
        code, _, err = in_process(*command(name, logs[name], store))
        assert code == 0, err
    for case in range(cases):
        rng = random.Random(case)
        name = sorted(FORMATS)[case % len(FORMATS)]
        log, store = tmp_path / "log", tmp_path / "store"
        shutil.copytree(logs[name], log)
        what = damage(rng, log)
        before = ""
        if rng.random() < 0.5:  # into a store that holds something of another log
            good = Store.open(imported[name])
            with Store.create(store, good.card) as kept:
                kept.append(good.episode(0))
            before = digest(store)
        code, _, err = in_process(*command(name, log, store))
        told = f"case {case}: {name}: {what}: exit {code}: {err}"
        assert code in ends, told
        ends[code] += 1
        if code == 2:
            assert [line[:12] for line in err.splitlines()] == ["worldmodels:"], told
            assert (digest(store) if store.exists() else "") == before, told
        else:
            assert len(Store.open(store).lengths), told
        shutil.rmtree(log, ignore_errors=True)
        shutil.rmtree(store, ignore_errors=True)
    assert min(ends.values()) > cases // 20, ends

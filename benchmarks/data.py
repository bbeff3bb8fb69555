"""How fast a store is read, how small it is, and how fast a log is imported: every figure in one run, side by side.

The stores hold real play of Pong, Breakout and MsPacman (84x84 grey, and 64x64 colour beside it). They are made once,
with two other forms of the same frames, and kept in data/benchmarks, which takes 3 GB (0.7 GB with --quick). What is
counted a second is counted beside it a second of this process's CPU time (`per_cpu_s`), which other processes on the
same cores do not lessen by much: where the two differ, the machine is busy.
"""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.logs import FORMS, dqn_log, drop_cache, repeated, stores, write_pt_files
from benchmarks.readers import FRAMES, Read, pt_files, tensorstore_reads, zarr_python
from benchmarks.results import publish
from worldmodels import hardware
from worldmodels.data.importing import import_log
from worldmodels.data.mixing import open_stores
from worldmodels.data.sampling import WindowSampler
from worldmodels.data.sources.dqn_replay import dqn_replay, dqn_replay_card, dqn_replay_parts
from worldmodels.data.store import Store
from worldmodels.data.transforms import Transform

BATCH = 32
TABLE_BYTES = 94.7  # a frame, in the benchmark of twenty stores that this design comes from, on the same three games
LIMITS = {
    "windows_per_s": "at least 10,000",
    "ratio_to_pt_files": "at least 12",
    "bytes_per_frame": f"at most {1.2 * TABLE_BYTES:.1f}",
    "stall_percent": "below 2",
    "memory_growth_mb": "below 20",
    "import_frames_per_s": "at least 20,000",
}


def main() -> None:
    """Print the figures and their limits, and the same as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 steps a game in place of 100,000, fewer repeats")
    parser.add_argument("--out", type=Path, help="folder for data.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, repeats = (20_000, 3) if options.quick else (100_000, 7)
    root = Path("data", "benchmarks")
    paths = {form: stores(root, form, steps) for form in FORMS}
    grey, times = paths["gray84"], 300_000 // (3 * steps)
    figures: dict[str, float] = {}
    for measure in (
        lambda: reading(root, grey, repeats),
        lambda: {f"{name}_rgb64": value for name, value in own_reading(paths["rgb64"], repeats).items()},
        lambda: stalls(grey, repeats),
        lambda: growth(repeated(root, grey, times), repeated(root, grey, 10 * times)),
        lambda: importing(root, grey, steps),
    ):
        for name, value in measure().items():
            figures[name] = round(float(value), 3)
            print(f"{name:<36} {figures[name]:>12,.6g}  {LIMITS.get(name, '')}", flush=True)

    publish("data", figures, options.out)


def reading(root: Path, paths: Sequence[Path], repeats: int) -> dict[str, float]:
    """Random windows a second of a store and of .pt files, from the cache and from the disk; and its size."""
    samplers = [_opened([path])[1] for path in paths]
    files = [write_pt_files(root, path) for path in paths]
    readers = {"": _in_turn(map(_own, paths)), "pt_": _in_turn(map(pt_files, files, samplers))}
    others = {"mixed_": _own(*paths), "zarr_python_": _in_turn(map(zarr_python, paths, samplers))}
    if find_spec("tensorstore"):  # of the extra `cloud`
        others["tensorstore_"] = _in_turn(map(tensorstore_reads, paths, samplers))
    for name in ("pt_", *list(others)[1:]):
        if not torch.equal((readers | others)[name](1000).flatten(), readers[""](1000).flatten()):
            raise AssertionError(f"{name} reads other frames")
    warm: dict[str, list[Rate]] = {name: [] for name in readers | others}
    cold: dict[str, list[Rate]] = {name: [] for name in readers}
    for _ in range(repeats):  # in turn, so that a busy moment of the machine meets all of them
        for name, read in (readers | others).items():
            warm[name].append(_rate(read, seconds=1.0))
    for _ in range(repeats):
        for name, read in readers.items():
            drop_cache([*_files(paths), *chain(*files)])
            cold[name].append(_rate(read, batches=21))
    fast = {name: _medians(rates) for name, rates in warm.items()}
    slow = {name: _medians(rates)["windows_per_s"] for name, rates in cold.items()}
    return {
        **fast[""],
        "ratio_to_pt_files": fast[""]["windows_per_s"] / fast["pt_"]["windows_per_s"],
        "ratio_to_pt_files_cold": slow[""] / slow["pt_"],
        **{f"{name}{key}": value for name, rates in fast.items() for key, value in rates.items()},
        **{f"{name}windows_per_s_cold": value for name, value in slow.items()},
        **_sizes(paths),
        "pt_bytes_per_frame": sum(f.stat().st_size for f in chain(*files)) / sum(_frames(p) for p in paths),
    }


def own_reading(paths: Sequence[Path], repeats: int) -> dict[str, float]:
    """Random windows a second of stores, and their size."""
    read = _in_turn(map(_own, paths))
    return {**_medians([_rate(read, seconds=1.0) for _ in range(repeats)]), **_sizes(paths)}


def _own(*paths: Path) -> Read:
    """Our own reader, of one store or of a mixture."""
    store, sampler = _opened(paths)
    return lambda k: store.read(sampler(k), FRAMES - 1).obs


def _opened(paths: Sequence[Path]) -> tuple[Any, WindowSampler]:
    store = open_stores(paths, Transform())
    # so many rows lie in the episode, whichever way they are read: FRAMES - 1 transitions have FRAMES frames
    return store, WindowSampler(store, np.arange(len(store.lengths)), BATCH, FRAMES)


def _in_turn(readers: Iterable[Read]) -> Read:
    """Batch after batch from one of the readers after the other."""
    readers = list(readers)
    return lambda k: readers[k % len(readers)](k)


def _frames(path: Path) -> int:
    return int(Store.open(path).lengths.sum())


def _files(paths: Sequence[Path]) -> list[Path]:
    return [p for path in paths for p in path.rglob("*") if p.is_file()]


def _sizes(paths: Sequence[Path]) -> dict[str, float]:
    sizes = {path: sum(p.stat().st_size for p in _files([path])) for path in paths}
    frames = {path: _frames(path) for path in paths}
    each = {f"bytes_per_frame_{path.name.partition('-')[0]}": sizes[path] / frames[path] for path in paths}
    return {"bytes_per_frame": sum(sizes.values()) / sum(frames.values()), **each}


class Rate(NamedTuple):
    """Windows a second of the clock, and a second of this process's CPU time."""

    windows_per_s: float
    windows_per_cpu_s: float


def _rate(read: Read, seconds: float = 60.0, batches: int = 10**9) -> Rate:
    """Measured over that many seconds or batches, whichever is less."""
    start, cpu, k = time.perf_counter(), time.process_time(), 0
    while k < batches and time.perf_counter() - start < seconds:
        read(k)
        k += 1
    return Rate(BATCH * k / (time.perf_counter() - start), BATCH * k / (time.process_time() - cpu))


def _medians(rates: Sequence[Rate]) -> dict[str, float]:
    return Rate(*map(statistics.median, zip(*rates, strict=True)))._asdict()


def stalls(paths: Sequence[Path], repeats: int) -> dict[str, float]:
    """What a training step of 20 ms loses to a DataModule that reads ahead by one thread, and to reading in turn."""
    from worldmodels.data.datamodule import StoreDataModule

    hardware.tune_allocator()  # as training does: without it a step takes twice as long, and hides the stall
    loader = iter(StoreDataModule([str(p) for p in paths], BATCH, FRAMES - 1).train_dataloader())
    read, fixed = _own(*paths), next(loader).obs
    sources = {
        "no_loader": lambda k: fixed,
        "prefetch": lambda k: next(loader).obs,
        "synchronous": read,
    }
    step = _training_step(fixed)
    took: dict[str, list[float]] = {name: [] for name in sources}
    waited: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(2 * repeats):
        for name, batch_of in sources.items():
            for k in range(30):
                start = time.perf_counter()
                obs = batch_of(k)
                got = time.perf_counter()
                step(obs)
                took[name].append(time.perf_counter() - start)
                waited[name].append(got - start)
    plain = statistics.median(took["no_loader"])
    return {
        "stall_percent": 100 * sum(waited["prefetch"]) / sum(took["prefetch"]),
        "stall_percent_synchronous": 100 * sum(waited["synchronous"]) / sum(took["synchronous"]),
        "step_slowdown_percent": 100 * (statistics.median(took["prefetch"]) / plain - 1),
        "step_slowdown_percent_synchronous": 100 * (statistics.median(took["synchronous"]) / plain - 1),
        "step_ms": 1000 * plain,
    }


def _training_step(obs: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Forward, backward and update of a small network on one thread; as many layers as make it 20 ms."""
    frames = obs.shape[1]
    for layers in range(1, 200):
        body = [m for _ in range(layers) for m in (torch.nn.Linear(512, 512), torch.nn.ReLU())]
        net = torch.nn.Sequential(
            torch.nn.Conv2d(frames, 16, 8, 8), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.LazyLinear(512), *body, torch.nn.Linear(512, 1),
        )  # fmt: skip
        net(obs[:, :, 0] / 255)
        optimizer = torch.optim.SGD(net.parameters(), 1e-4)

        def step(obs: torch.Tensor, net: Any = net, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            net(obs[:, :, 0] / 255).square().mean().backward()
            optimizer.step()

        times = []
        for _ in range(7):
            start = time.perf_counter()
            step(obs)
            times.append(time.perf_counter() - start)
        if min(times) >= 0.02:
            return step
    raise AssertionError("no network of 200 layers takes 20 ms")


def growth(small: Path, large: Path) -> dict[str, float]:
    """Anonymous memory of a fresh process that reads windows of a store, and of one that is ten times as large."""
    few, many = fresh(memory, small), fresh(memory, large)
    return {
        "memory_growth_mb": many["anonymous"] - few["anonymous"],
        **{f"memory_{k}_mb_{few['frames']}_frames": few[k] for k in ("anonymous", "peak")},
        **{f"memory_{k}_mb_{many['frames']}_frames": many[k] for k in ("anonymous", "peak")},
        "windows_per_s_large": many["windows_per_s"],
    }


def memory(path: Path) -> dict[str, float]:
    """Read windows from all over a store, and tell what this process holds then."""
    torch.set_num_threads(1)
    return {"frames": _frames(path), "windows_per_s": _rate(_own(path), batches=400).windows_per_s, **_held()}


def _held() -> dict[str, float]:
    """Megabytes of anonymous memory of this process now, and of all its memory at its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {k: int(status[v].split()[0]) / 1024 for k, v in {"anonymous": "RssAnon", "peak": "VmHWM"}.items()}


def importing(root: Path, paths: Sequence[Path], steps: int) -> dict[str, float]:
    """Frames a second that DQN Replay files are imported at, by one process on one core."""
    done = [fresh(import_one, dqn_log(root, path, steps), root / "imported") for path in paths]
    frames, seconds, cpu = (sum(d[name] for d in done) for name in ("frames", "seconds", "cpu_seconds"))
    each = {
        f"import_frames_per_s_{p.name.partition('-')[0]}": d["frames"] / d["seconds"]
        for p, d in zip(paths, done, strict=True)
    }
    return {
        "import_frames_per_s": frames / seconds,
        "import_frames_per_cpu_s": frames / cpu,
        **each,
        "import_peak_mb": max(d["peak"] for d in done),
    }


def import_one(log: Path, store: Path) -> dict[str, float]:
    """Import a log into a new store and take it away again."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    import zarr  # noqa: F401 (half a second that is not the log's)

    shutil.rmtree(store, ignore_errors=True)
    start, cpu = time.perf_counter(), time.process_time()
    card, parts = dqn_replay_card(str(log), None), dqn_replay_parts(str(log), None)
    figures = import_log(store, card, parts, partial(dqn_replay, str(log), game=None))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    shutil.rmtree(store)
    return {"frames": figures["steps"], "seconds": seconds, "cpu_seconds": cpu, **_held()}


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    main()

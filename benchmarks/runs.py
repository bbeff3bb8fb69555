"""What benchmarks of many runs share: parts that go on where they were stopped, returns with intervals, a command line.

Every part is a `worldmodels` command in a folder of its own below DIR/full or DIR/quick, named GROUP/RUN/SEED.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results import publish
from worldmodels.data.store import Store

RESAMPLES = 10_000


class Runs:
    """Runs below `root`, of which those are wanted whose names begin with one of `only`, or all.

    A subclass has `play`, which makes what is wanted.

    Args:
        root: folder of all of them.
        only: beginnings of names, such as pong/clone.
    """

    def __init__(self, root: Path, only: Sequence[str]) -> None:
        self.root, self.only = root, only

    def wanted(self, part: str) -> bool:
        """Whether a part is asked for."""
        return not self.only or part.startswith(tuple(self.only))

    def run(self, *arguments: str, out: Path) -> None:
        """A command that leaves metrics.json in `out`; nothing where that is there."""
        if (out / "metrics.json").exists():
            return
        began = time.monotonic()
        print(f"{out.relative_to(self.root)} ...", end=" ", flush=True)
        command = [sys.executable, "-m", "worldmodels", *arguments, f"out={out}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        print(f"{time.monotonic() - began:.0f} s", flush=True)

    def train(self, experiment: str, steps: int | None, *settings: str, out: Path) -> Path:
        """The checkpoint that training leaves."""
        often = [] if steps is None else [f"trainer.max_steps={steps}", f"trainer.val_check_interval={-(-steps // 5)}"]
        self.run("train", f"experiment={experiment}", "logger=csv", "callbacks.dream=null", *often, *settings, out=out)
        return out / "best.ckpt"

    def collect(self, game: str, steps: int, *settings: str, out: Path) -> Path:
        """A log of a game, of so many steps at least."""
        if not out.exists() or Store.open(out).offsets[-1] < steps:
            command = ["collect", f"game={game}", f"steps={steps}", f"store={out}", *settings]
            subprocess.run([sys.executable, "-m", "worldmodels", *command], check=True, stdout=subprocess.DEVNULL)
        return out

    def returns(self, group: str, name: str, played: str = "played") -> list[np.ndarray]:
        """Returns of the real games of each seed of a run that has played, in the folder `played` of it."""
        whole = sorted((self.root / group / name).glob(f"*/{played}/metrics.json"))
        found = [path.with_name("results.jsonl").read_text(encoding="utf-8") for path in whole]
        return [np.array([json.loads(line)["return"] for line in text.splitlines()]) for text in found]


def logged_returns(log: Path) -> list[np.ndarray]:
    """Returns of the games of a log, as of one seed."""
    store = Store.open(log)
    return [np.array([store.episode_info(i)["return"] for i in range(len(store.lengths))])]


def means(runs: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Mean return in each resample, (1 + RESAMPLES,), the sample itself first; seeds and games are drawn again."""
    drawn = np.zeros(RESAMPLES)
    seeds = rng.integers(len(runs), size=(RESAMPLES, len(runs)))
    for k, games in enumerate(runs):
        counts = (seeds == k).sum(1)
        for again in range(counts.max()):
            some = np.flatnonzero(counts > again)
            drawn[some] += games[rng.integers(len(games), size=(len(some), len(games)))].mean(1)
    return np.concatenate([[np.mean([games.mean() for games in runs])], drawn / len(runs)])


def told(values: np.ndarray) -> dict[str, Any]:
    """Mean and 95 % interval."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"mean": round(float(values[0]), 3), "interval": [round(float(low), 3), round(float(high), 3)]}


class Asked(NamedTuple):
    """What a benchmark was asked for.

    Args:
        name: of the benchmark.
        out: folder of all that it makes.
        quick: whether next to no training is wanted.
        only: beginnings of the names of parts.
        began: when, in seconds.
    """

    name: str
    out: Path
    quick: bool
    only: list[str]
    began: float

    @property
    def root(self) -> Path:
        """Folder of the runs."""
        return self.out.absolute() / ("quick" if self.quick else "full")

    def publish(self, figures: dict[str, Any]) -> None:
        """Print and keep the figures."""
        publish(self.name, figures, self.out, quick=self.quick, seconds_now=round(time.monotonic() - self.began))


def command_line(name: str, about: str | None, example: str, quick: str) -> Asked:
    """Read `[--quick] [--only PART ...] [--out DIR]`.

    Args:
        name: of the benchmark.
        about: its help.
        example: of parts.
        quick: what --quick means.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help=f"such as {example}")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="where runs are kept")
    options = parser.parse_args()
    return Asked(name, options.out, options.quick, options.only, time.monotonic())


def made(
    runs: Any, groups: Iterable[str], figures_of: Callable[[Any, str], dict[str, Any]], show: Callable[[str, Any], None]
) -> dict[str, Any]:
    """Make what is missing, and tell the figures of each group of which there is something."""
    runs.play()
    figures: dict[str, Any] = {}
    for group in groups:
        if (runs.root / group).exists():
            figures[group] = figures_of(runs, group)
            show(group, figures[group])
    return figures

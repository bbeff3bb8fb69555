"""What benchmarks of many runs share: parts that go on where they were stopped, returns with intervals, a command line.

Every part is a `worldmodels` command in a folder of its own below DIR/full or DIR/quick, named GROUP/RUN/SEED. Beside
its results lies part.json: the settings that it was begun with, those of conf among them, and the seconds that it took.
A part that was begun with other settings than it would be now is refused; one of an earlier version, which has no such
file, counts as it is.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from benchmarks.results import publish
from worldmodels.config import conf_dir, dotted, sentences
from worldmodels.data.disk import make_folder, read_json, write_json
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
        """A command that leaves metrics.json in `out`; nothing where that is there, made with the same settings."""
        arguments = (*arguments, f"out={out}")
        if self.done(out, composed(*arguments)):
            return
        began = time.monotonic()
        print(f"{out.relative_to(self.root)} ...", end=" ", flush=True)
        try:
            ended = subprocess.run([sys.executable, "-m", "worldmodels", *arguments], capture_output=True, text=True)
        finally:
            part, seconds = read_json(out / "part.json"), time.monotonic() - began
            write_json(out / "part.json", part | {"seconds": round(part["seconds"] + seconds, 1)})
        if ended.returncode:
            print(f"worldmodels {' '.join(arguments)} failed:\n{ended.stderr[-2000:]}", file=sys.stderr)
            sys.exit(ended.returncode)
        print(f"{seconds:.0f} s", flush=True)

    def done(self, out: Path, settings: Mapping[str, Any]) -> bool:
        """Whether a part is finished; if not, its settings are kept beside it.

        Settings that there were not yet when it was begun are no difference.

        Args:
            out: its folder.
            settings: all of them.

        Raises:
            SystemExit: it was begun with others.
        """
        finished, kept = (out / "metrics.json").exists(), out / "part.json"
        flat = {name: value for name, value in dotted(settings).items() if not isinstance(value, Mapping)}
        now = json.loads(json.dumps(flat).replace(str(self.root), "."))  # the whole may be moved elsewhere
        if kept.exists():
            before = read_json(kept)["settings"].items()
            if differ := [f"{k}={v} and not {now.get(k)}" for k, v in before if k not in now or now[k] != v]:
                sys.exit(
                    f"{out} was begun with {', '.join(differ)}: delete that folder to make it with the new settings, "
                    "or its part.json to keep it as it is"
                )
        elif not finished:
            make_folder(out)
            write_json(kept, {"settings": now, "seconds": 0.0})
        return finished

    def train(self, experiment: str, steps: int | None, *settings: str, out: Path, by: str = "train") -> Path:
        """The checkpoint that training leaves; `by` is the command, train or online."""
        self.run(by, *training(experiment, steps, *settings), out=out)
        return out / "best.ckpt"

    def collect(self, game: str, steps: int, *settings: str, out: Path) -> Path:
        """A log of a game, of so many steps at least."""
        if not out.exists() or Store.open(out).offsets[-1] < steps:
            command = ["collect", f"game={game}", f"steps={steps}", f"store={out}", *settings]
            ended = subprocess.run([sys.executable, "-m", "worldmodels", *command], stdout=subprocess.DEVNULL)
            if ended.returncode:  # it has said why
                sys.exit(ended.returncode)
        return out

    def returns(self, group: str, name: str, played: str = "played") -> list[np.ndarray]:
        """Returns of the real games of each seed of a run that has played, in the folder `played` of it."""
        whole = sorted((self.root / group / name).glob(f"*/{played}/metrics.json"))
        return [np.array(read_json(path)["returns"]) for path in whole]


def training(experiment: str, steps: int | None, *settings: str) -> list[str]:
    """The settings of a training as on the command line; without `steps` as many as the experiment has."""
    often = [] if steps is None else [f"trainer.max_steps={steps}", f"trainer.val_check_interval={-(-steps // 5)}"]
    return [f"experiment={experiment}", "logger=csv", "callbacks.dream=null", *often, *settings]


def composed(command: str, *arguments: str) -> DictConfig:
    """The settings of a command, as its own process reads them."""
    GlobalHydra.instance().clear()
    with sentences(command), hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose(command, list(arguments))


def spent(root: Path) -> dict[str, int]:
    """Seconds of all parts below a folder, over all times that each was gone on with, and CPU seconds of trainings.

    Of what a command tells of itself and what was measured here the greater counts: the one leaves out its start, the
    other what came before part.json or a kill.
    """
    seconds = cpu = 0.0
    for path in root.rglob("metrics.json"):
        told, part = read_json(path), path.with_name("part.json")
        measured = read_json(part)["seconds"] if part.exists() else 0.0
        seconds, cpu = seconds + max(told.get("seconds", 0.0), measured), cpu + told.get("cpu_seconds", 0.0)
    return {"seconds": round(seconds), "training_cpu_seconds": round(cpu)}


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
        """Print and keep the figures, with what all parts took together and what is of it from now."""
        now = round(time.monotonic() - self.began)
        publish(self.name, figures, self.out, quick=self.quick, **spent(self.root), seconds_now=now)


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
    return shown(runs, groups, figures_of, show)


def shown(
    runs: Any, groups: Iterable[str], figures_of: Callable[[Any, str], dict[str, Any]], show: Callable[[str, Any], None]
) -> dict[str, Any]:
    """The figures of each group that has a log, which are told."""
    figures: dict[str, Any] = {}
    for group in groups:
        if (runs.root / group / "log").exists():
            figures[group] = figures_of(runs, group)
            show(group, figures[group])
    return figures

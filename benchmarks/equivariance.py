"""What symmetry built into MuZero is worth: trained on few mazes that stand one way, played in turned and in new ones.

`python -m benchmarks.equivariance [--quick] [--only PART ...] [--out DIR]`. Every part is a `worldmodels` command in a
folder of its own below DIR, which goes on where it was stopped and is found finished the next time. Parts are named
LOG/RUN/SEED, such as log20000/c4/0; --only takes the beginnings of such names.

All runs of a log have the same number of optimizer steps, and networks of about as many parameters:

- plain: MuZero without any symmetry; turned: the same, each training batch turned at random;
- encoder: only its representation has quarter turns built in; c4: all of it has, and so its search.

Each plays the mazes of its log as they stood, the same mazes turned by a quarter, a half and three quarters, and mazes
that it has never seen. Logs of several lengths say how much play a return takes.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.policies import Bench, means, told
from benchmarks.results import publish
from worldmodels.data.store import Store
from worldmodels.evaluation.pictures import plot

RUNS = {
    "plain": (),
    "turned": ("model.turned=c4",),
    "encoder": ("model.symmetry=c4", "model.symmetric=[representation]"),
    "c4": ("model.symmetry=c4",),
}
PLAYED = {f"turned {90 * k}": {"orientation": k} for k in range(4)} | {"unseen": {"unseen": True}}
"""Where a run is played, by the settings of the game that differ from its log's."""


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Args:
        logs: steps of play of each log.
        mazes: in a log.
        train: optimizer steps of each run.
        games: that each run plays in each place.
        seeds: of training.
    """

    logs: tuple[int, ...]
    mazes: int
    train: int
    games: int
    seeds: int


FULL = Budget((5000, 10_000, 20_000), mazes=10, train=3000, games=50, seeds=5)
QUICK = Budget((3000,), mazes=10, train=30, games=5, seeds=1)


class Mazes(Bench):
    """Logs of several lengths and, of each, four runs with each seed."""

    def __init__(self, root: Path, budget: Budget, only: list[str]) -> None:
        super().__init__(root, {}, only)
        self.budget = budget

    def parts(self) -> Iterator[tuple[str, str, int]]:
        """Log, run and seed of every part that is wanted."""
        for steps in self.budget.logs:
            for name in RUNS:
                for seed in range(self.budget.seeds):
                    if not self.only or f"log{steps}/{name}/{seed}".startswith(tuple(self.only)):
                        yield f"log{steps}", name, seed

    def store(self, log: str) -> Path:
        """The log, made where it is not there."""
        path = self.root / log / "log"
        settings = [f"source.mazes={self.budget.mazes}", f"steps={log.removeprefix('log')}", f"store={path}"]
        if not (path / "metrics.json").exists():
            command = [sys.executable, "-m", "worldmodels", "collect", "game=maze", *settings]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return path

    def play(self) -> None:
        """Train every run that is wanted, and let it play everywhere."""
        for log, name, seed in self.parts():
            settings, out = (
                [f"store={self.store(log)}", f"seed={seed}", *RUNS[name]],
                self.root / log / name / str(seed),
            )
            checkpoint = self.train("maze_muzero", self.budget.train, *settings, out=out)
            for place, env in PLAYED.items():
                arguments = [f"checkpoint={checkpoint}", "game=maze", "protocol=store", f"agent={name}", "films=0"]
                arguments += [f"seed={seed}", f"episodes={self.budget.games}"]
                told_env = ",".join(f"{k}:{str(v).lower()}" for k, v in env.items())
                self.run("evaluate", *arguments, f"env={{{told_env}}}", out=out / place.replace(" ", "_"))

    def scores(self, log: str, name: str, place: str) -> list[np.ndarray]:
        """Returns of the games of each seed in one place."""
        whole = sorted((self.root / log / name).glob(f"*/{place.replace(' ', '_')}/metrics.json"))
        lines = [path.with_name("results.jsonl").read_text(encoding="utf-8").splitlines() for path in whole]
        return [np.array([json.loads(line)["return"] for line in text]) for text in lines]


def figures_of(bench: Mazes, log: str) -> dict[str, Any]:
    """Returns of every run of a log, in each place, and their differences."""
    rng, store = np.random.default_rng(0), Store.open(bench.store(log))
    behaviour = [np.array([store.episode_info(i)["return"] for i in range(len(store.lengths))])]
    figures: dict[str, Any] = {"log": told(means(behaviour, rng))}
    for name in RUNS:
        played = {place: runs for place in PLAYED if (runs := bench.scores(log, name, place))}
        drawn = {place: means(runs, rng) for place, runs in played.items()}
        figures[name] = {place: told(values) | {"seeds": len(played[place])} for place, values in drawn.items()}
        if turned := [drawn[place] for place in drawn if place in ("turned 90", "turned 180", "turned 270")]:
            figures[name]["loss_by_turning"] = told(drawn["turned 0"] - np.mean(turned, axis=0))
    return figures


def show(log: str, figures: dict[str, Any]) -> None:
    """The table of a log."""
    print(f"\n{log:<10}" + "".join(f"{place:>24}" for place in PLAYED))
    for name in RUNS:
        cells = [figures[name].get(place) for place in PLAYED]
        texts = [
            "" if c is None else f"{c['mean']:.1f} [{c['interval'][0]:.1f}, {c['interval'][1]:.1f}]" for c in cells
        ]
        print(f"{name:<10}" + "".join(f"{text:>24}" for text in texts))
    print(f"behaviour of the log {figures['log']['mean']:.1f}")


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Return by length of the log, of every run, in mazes of the log that are turned, and in new ones."""
    panels: dict[str, Any] = {}
    for place in ("turned 90", "unseen"):
        curves = {}
        for name in RUNS:
            known = [(int(log[3:]), f[name][place]) for log, f in figures.items() if place in f[name]]
            if known:
                steps, here = [k for k, _ in known], [f for _, f in known]
                curves[name] = steps, [f["mean"] for f in here], [f["interval"] for f in here]
        panels |= {place: curves} if curves else {}
    if panels:
        plot(path, panels, "steps of play in the log", "return")


def main() -> None:
    """Make what is missing, and print every figure and the same as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one log, one seed and next to no training")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="such as log20000/c4")
    parser.add_argument("--out", type=Path, default=Path("runs/equivariance"), help="where runs are kept")
    options = parser.parse_args()
    root, began = options.out.absolute() / ("quick" if options.quick else "full"), time.monotonic()
    bench = Mazes(root, QUICK if options.quick else FULL, options.only)
    bench.play()
    figures: dict[str, Any] = {}
    for log in (f"log{steps}" for steps in bench.budget.logs):
        if (root / log).exists():
            figures[log] = figures_of(bench, log)
            show(log, figures[log])
    draw(root / "equivariance.png", figures)
    publish("equivariance", figures, options.out, quick=options.quick, seconds_now=round(time.monotonic() - began))


if __name__ == "__main__":
    main()

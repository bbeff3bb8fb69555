"""What symmetry built into MuZero is worth: trained on few mazes that stand one way, played in turned and in new ones.

`python -m benchmarks.equivariance [--quick] [--only PART ...] [--out DIR]`. Every part is a `worldmodels` command in a
folder of its own below DIR, which goes on where it was stopped and is found finished the next time. Parts are named
LOG/RUN/SEED, such as log20000/c4/0; --only takes the beginnings of such names.

All runs of a log have the same number of optimizer steps, and networks of about as many parameters:

- plain: MuZero without any symmetry; turned: the same, each training batch turned at random;
- encoder: only its representation has quarter turns built in; c4: all of it has, and so its search.

Each plays the mazes of its log as they stood, the same mazes turned by a quarter, a half and three quarters, and mazes
that it has never seen. Logs of several lengths say how much play a return takes.

Two further games are parts of their own: breakout, in benchmarks/equivariance_atari.py, and chaser, which is run only
where --only asks for it, in benchmarks/equivariance_chaser.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import equivariance_atari as atari
from benchmarks import equivariance_chaser as chaser
from benchmarks.runs import Runs, command_line, logged_returns, made, means, told
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
        limit: steps after which a game is cut: one that is hardly trained may wander for all of the log's 3,000.
        seeds: of training.
    """

    logs: tuple[int, ...]
    mazes: int
    train: int
    games: int
    limit: int
    seeds: int


FULL = Budget((5000, 10_000, 20_000), mazes=10, train=3000, games=50, limit=3000, seeds=5)
QUICK = Budget((3000,), mazes=10, train=30, games=3, limit=200, seeds=1)


class Mazes(Runs):
    """Logs of several lengths and, of each, four runs with each seed."""

    def __init__(self, root: Path, budget: Budget, only: list[str]) -> None:
        super().__init__(root, only)
        self.budget = budget

    def parts(self) -> Iterator[tuple[str, str, int]]:
        """Log, run and seed of every part that is wanted."""
        for steps in self.budget.logs:
            for name in RUNS:
                for seed in range(self.budget.seeds):
                    if self.wanted(f"log{steps}/{name}/{seed}"):
                        yield f"log{steps}", name, seed

    def store(self, log: str) -> Path:
        """The log, made where it is not there."""
        steps = int(log.removeprefix("log"))
        return self.collect("maze", steps, f"source.mazes={self.budget.mazes}", out=self.root / log / "log")

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
                arguments += [
                    f"seed={seed}",
                    f"episodes={self.budget.games}",
                    f"protocol.time_limit={self.budget.limit}",
                ]
                told_env = ",".join(f"{k}:{str(v).lower()}" for k, v in env.items())
                self.run("evaluate", *arguments, f"env={{{told_env}}}", out=out / place.replace(" ", "_"))


def figures_of(bench: Mazes, log: str) -> dict[str, Any]:
    """Returns of every run of a log, in each place, and their differences."""
    rng = np.random.default_rng(0)
    figures: dict[str, Any] = {"log": told(means(logged_returns(bench.store(log)), rng))}
    for name in RUNS:
        played = {place: runs for place in PLAYED if (runs := bench.returns(log, name, place.replace(" ", "_")))}
        drawn = {place: means(runs, rng) for place, runs in played.items()}
        figures[name] = {place: told(values) | {"seeds": len(played[place])} for place, values in drawn.items()}
        if turned := [drawn[place] for place in drawn if place in ("turned 90", "turned 180", "turned 270")]:
            figures[name]["loss_by_turning"] = told(drawn["turned 0"] - np.mean(turned, axis=0))
    return figures


def show(log: str, figures: dict[str, Any]) -> None:
    """The table of a log."""
    places = dict.fromkeys(place for name in RUNS for place in figures[name] if place != "loss_by_turning")
    print(f"\n{log:<10}" + "".join(f"{place:>24}" for place in places))
    for name in RUNS:
        cells = [figures[name].get(place) for place in places]
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
    asked = command_line("equivariance", __doc__, "log20000/c4 or breakout", "one seed and next to no training")
    mazes = Mazes(asked.root, QUICK if asked.quick else FULL, asked.only)
    figures = made(mazes, [f"log{steps}" for steps in mazes.budget.logs], figures_of, show)
    draw(asked.root / "equivariance.png", figures)
    flips = atari.Flips(asked.root, atari.QUICK if asked.quick else atari.FULL, asked.only)
    figures |= made(flips, [atari.GAME], atari.figures_of, atari.show)
    procgen = chaser.Chaser(asked.root, chaser.QUICK if asked.quick else chaser.FULL, asked.only, RUNS)
    figures |= made(procgen, ["chaser"], chaser.figures_of, show)
    asked.publish(figures)


if __name__ == "__main__":
    main()

"""What symmetry built into MuZero is worth: trained on few mazes that stand one way, played in turned and in new ones.

`python -m benchmarks.equivariance [--quick] [--only PART ...] [--out DIR]`. Every part is a `worldmodels` command in a
folder of its own below DIR, which goes on where it was stopped and is found finished the next time. Parts are named
LOG/RUN/SEED, such as log10000/c4/0; --only takes the beginnings of such names, by which two cores can share the work.

All runs of a log have networks of about as many parameters (within 3 %, and their numbers are told):

- plain: MuZero without any symmetry; turned: the same, each training batch turned at random;
- encoder: only its representation has quarter turns built in; c4: all of it has, and so its search;
- turned_time: turned for as many seconds of the processor as c4 has trained; plain_flops: plain for as many steps as
  the arithmetic of c4's training pays for. All others have as many optimizer steps;
- random: no network.

Each plays, by its search, the mazes of its log as they stood, the same mazes turned by a quarter, a half and three
quarters, and mazes that it has never seen; the first, those turned by a quarter and the last also by the likeliest
action of its policy alone. Games of the same seed and number begin alike, and differences are those of such pairs. Logs
of several lengths, of which the shorter have plain and c4 alone, say how much play a return takes (`data_ratio`). A log
of one maze says what turning costs where less of what it shows was seen before.

Further games are parts of their own: breakout and freeway, in benchmarks/equivariance_atari.py, and chaser, which is
run only where --only asks for it, in benchmarks/equivariance_chaser.py.

Cost: on a core of its own 1,500 steps of training took 50 s (plain) and 130 s (c4), whose arithmetic is 4.5 times
plain's, and 20 games of 500 steps 17 s and 45 s by search. All mazes were 2.9 hours of one core, Breakout and Freeway
one hour, Chaser three quarters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import equivariance_atari as atari
from benchmarks import equivariance_chaser as chaser
from benchmarks.equivariance_chaser import RANDOM
from benchmarks.paired import games_of, minus, share_equal
from benchmarks.runs import Runs, command_line, logged_returns, means, shown, told
from worldmodels.data.disk import read_json
from worldmodels.data.sampling import even_windows
from worldmodels.data.store import Store
from worldmodels.evaluation.pictures import plot
from worldmodels.learners.muzero import load_muzero
from worldmodels.models.muzero import MuZero

RUNS = {
    "plain": (),
    "turned": ("model.turned=c4",),
    "encoder": ("model.symmetry=c4", "model.symmetric=[representation]"),
    "c4": ("model.symmetry=c4",),
}
PAID_AS_C4 = {"turned_time": "turned", "plain_flops": "plain"}
"""Runs that are given what c4 costs, and whose settings they have."""
ALL = (*RUNS, RANDOM, *PAID_AS_C4)
"""All have the longest log of ten mazes."""
SHORT = ("plain", "c4")
"""Those that have the shorter ones, too."""
ONE = (*RUNS, RANDOM)
"""Those that have a log of one maze, too."""
PLAYED = {f"turned {90 * k}": [f"env={{orientation:{k}}}"] for k in range(4)}
PLAYED |= {"unseen": ["env={unseen:true,mazes:10}"]}
PLAYED |= {
    f"policy {place}": [*PLAYED[place], "planner=prior", "planner.temperature=0"]
    for place in ("turned 0", "turned 90", "unseen")
}
"""Where and how a run is played."""
TURNED = ("turned 90", "turned 180", "turned 270")


@dataclass(frozen=True)
class Log:
    """What is learned from.

    Args:
        steps: of play.
        mazes: that it has.
        runs: that learn from it.
    """

    steps: int
    mazes: int = 10
    runs: tuple[str, ...] = SHORT


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Args:
        logs: by name; those of several lengths are called log, and their steps.
        train: optimizer steps of each run.
        games: that each run plays in each place.
        limit: steps after which a game is cut: one that is hardly trained may wander for all of the log's 3,000.
        seeds: of training.
    """

    logs: dict[str, Log]
    train: int
    games: int
    limit: int
    seeds: int


LOGS = {"one40000": Log(40_000, 1, ONE)}
LOGS |= {"log10000": Log(10_000), "log40000": Log(40_000), "log80000": Log(80_000, runs=ALL)}
FULL = Budget(LOGS, train=1500, games=20, limit=500, seeds=3)
QUICK = Budget({"one3000": Log(3000, 1, ONE), "log3000": Log(3000, runs=ALL)}, train=30, games=3, limit=200, seeds=1)


class Mazes(Runs):
    """Logs of several lengths and, of each, all runs with each seed."""

    def __init__(self, root: Path, budget: Budget, only: list[str]) -> None:
        super().__init__(root, only)
        self.budget = budget

    def parts(self) -> Iterator[tuple[str, str, int]]:
        """Log, run and seed of every part that is wanted."""
        for log, about in self.budget.logs.items():
            for name in about.runs:
                for seed in range(self.budget.seeds):
                    if self.wanted(f"{log}/{name}/{seed}"):
                        yield log, name, seed

    def store(self, log: str) -> Path:
        """The log, made where it is not there."""
        about = self.budget.logs[log]
        settings = ["source.cells=9", "source.size=9", f"source.mazes={about.mazes}"]
        return self.collect("maze", about.steps, *settings, out=self.root / log / "log")

    def trained(self, log: str, name: str, seed: int) -> Path:
        """The checkpoint of a run, trained where it is not."""
        out = self.root / log / name / str(seed)
        if not (out / "metrics.json").exists():
            settings = [f"store={self.store(log)}", f"seed={seed}", *RUNS[PAID_AS_C4.get(name, name)]]
            self.train("maze_muzero", self.steps(log, name, seed), *settings, out=out)
        return out / "best.ckpt"

    def steps(self, log: str, name: str, seed: int) -> int:
        """Optimizer steps of a run."""
        if name not in PAID_AS_C4:
            return self.budget.train
        costs = []
        for run in ("c4", PAID_AS_C4[name]):
            checkpoint = self.trained(log, run, seed)
            if name == "turned_time":
                costs.append(read_json(checkpoint.with_name("metrics.json"))["cpu_seconds"])
            else:
                costs.append(arithmetic(load_muzero(checkpoint)[0], self.store(log)))
        return round(self.budget.train * costs[0] / costs[1])

    def play(self) -> None:
        """Train every run that is wanted, and let it play everywhere."""
        for log, name, seed in self.parts():
            player = [f"store={self.store(log)}", "policy=random"]
            if name != RANDOM:
                player = [f"checkpoint={self.trained(log, name, seed)}"]
            for place, how in PLAYED.items():
                if name == RANDOM and place.startswith("policy"):
                    continue
                arguments = [*player, *how, "game=maze", "protocol=store", f"agent={name}", "films=0"]
                arguments += [
                    f"seed={seed}",
                    f"episodes={self.budget.games}",
                    f"slots={self.budget.games}",
                    f"protocol.time_limit={self.budget.limit}",
                ]
                self.run("evaluate", *arguments, out=self.root / log / name / str(seed) / place.replace(" ", "_"))


def arithmetic(model: MuZero, log: Path) -> int:
    """Floating-point operations of what one window costs in training: its loss forward and back."""
    model.requires_grad_(True)
    store = Store.open(log)
    starts = even_windows(store, store.splits["train"], 1, model.least_length)
    segment = store.read(starts, model.least_length)
    with FlopCounterMode(display=False) as counter:
        model.loss(segment)[0].backward()
    return counter.get_total_flops()


def figures_of(bench: Mazes, log: str) -> dict[str, Any]:
    """Returns of every run of a log, in each place, and their differences."""
    rng = np.random.default_rng(0)
    figures: dict[str, Any] = {"log": told(means(logged_returns(bench.store(log)), rng))}
    unseen = {name: games_of(bench.root / log / name, "unseen") for name in ALL}
    for name in ALL:
        played = {place: games_of(bench.root / log / name, place.replace(" ", "_")) for place in PLAYED}
        played = {place: games for place, games in played.items() if games}
        if not played:
            continue
        figures[name] = {
            place: told(means(list(games.values()), rng)) | {"seeds": len(games)} for place, games in played.items()
        }
        if "turned 0" in played and (places := [played[place] for place in TURNED if place in played]):
            still = played["turned 0"]
            seeds = set(still).intersection(*places)
            mean = {seed: np.mean([games[seed] for games in places], axis=0) for seed in seeds}
            figures[name]["loss_by_turning"] = minus(still, mean, rng)
            figures[name]["same_when_turned"] = share_equal(still, places)
        if "policy turned 90" in played:
            figures[name]["policy_loss_by_turning"] = minus(played["policy turned 0"], played["policy turned 90"], rng)
        if name != "plain":
            figures[name]["unseen_minus_plain"] = minus(unseen[name], unseen["plain"], rng)
        if trained := [read_json(path) for path in sorted((bench.root / log / name).glob("*/metrics.json"))]:
            figures[name] |= {"parameters": trained[0]["parameters"], "steps": [run["steps"] for run in trained]}
    return figures


def data_ratio(figures: dict[str, Any], logs: dict[str, Log]) -> dict[str, Any]:
    """The shortest log with which each run of `SHORT` reaches, in unseen mazes, what plain reaches with the longest.

    Args:
        figures: by log.
        logs: of which those of ten mazes count.

    Returns:
        That `return`, and by run the steps of the log, None where none that it has suffices.
    """
    named = {logs[log].steps: log for log in figures if logs[log].mazes == Log.mazes}
    lengths = sorted(named)

    def reached(length: int, name: str) -> float | None:
        return figures[named[length]].get(name, {}).get("unseen", {}).get("mean")

    if not lengths or (wanted := reached(lengths[-1], "plain")) is None:
        return {}
    found: dict[str, Any] = {"return": wanted}
    for name in SHORT:
        known = {length: mean for length in lengths if (mean := reached(length, name)) is not None}
        if known:
            found[name] = next((length for length, mean in known.items() if mean >= wanted), None)
    return found


def show(log: str, figures: dict[str, Any]) -> None:
    """The table of a log, and below it what else is known of each run."""
    runs = [name for name in figures if name != "log"]
    places = dict.fromkeys(place for name in runs for place in figures[name] if place in (*PLAYED, *chaser.PLACES))
    print(f"\n{log:<12}" + "".join(f"{place:>24}" for place in places))
    for name in runs:
        print(f"{name:<12}" + "".join(f"{_text(figures[name].get(place)):>24}" for place in places))
    for name in runs:
        more = {key: f for key, f in figures[name].items() if key not in places and f is not None}
        if more:
            print(
                f"{name:<12}" + ", ".join(f"{key} {_text(f) if isinstance(f, dict) else f}" for key, f in more.items())
            )
    print(f"behaviour of the log {figures['log']['mean']:.1f}")


def _text(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else f"{figure['mean']:.1f} [{figure['interval'][0]:.1f}, {figure['interval'][1]:.1f}]"


def draw(root: Path, figures: dict[str, Any], logs: dict[str, Log]) -> None:
    """Return by how the mazes of the log are turned, and by the length of the log, of every run."""
    turned, lengths = {}, {}
    for log, f in figures.items():
        title = f"{logs[log].mazes} maze{'s' * (logs[log].mazes > 1)}, {logs[log].steps:,} steps"
        known = {name: [(90 * k, f[name].get(f"turned {90 * k}")) for k in range(4)] for name in ALL if name in f}
        turned[title] = _curves(known)
    of_lengths = [(logs[log].steps, f) for log, f in figures.items() if logs[log].mazes == Log.mazes]
    for place in ("turned 90", "unseen", "policy unseen"):
        lengths[place] = _curves({name: [(x, f.get(name, {}).get(place)) for x, f in of_lengths] for name in ALL})
    if turned := {title: curves for title, curves in turned.items() if curves}:
        plot(root / "equivariance.png", turned, "mazes of the log, turned by degrees", "return")
    if lengths := {place: curves for place, curves in lengths.items() if curves}:
        plot(root / "equivariance_samples.png", lengths, "steps of play in the log", "return", log="x")


def _curves(points: dict[str, list[tuple[int, dict[str, Any] | None]]]) -> dict[str, Any]:
    known = {name: [(x, f) for x, f in of if f] for name, of in points.items()}
    return {
        name: ([x for x, _ in of], [f["mean"] for _, f in of], [f["interval"] for _, f in of])
        for name, of in known.items()
        if of
    }


def main() -> None:
    """Make what is missing, and print every figure and the same as JSON in the last line."""
    asked = command_line("equivariance", __doc__, "log10000/c4 or breakout", "one seed and next to no training")
    quick = asked.quick
    mazes = Mazes(asked.root, QUICK if quick else FULL, asked.only)
    flips = atari.Flips(asked.root, atari.QUICK if quick else atari.FULL, asked.only)
    procgen = chaser.Chaser(asked.root, chaser.QUICK if quick else chaser.FULL, asked.only, RUNS)
    for bench in (mazes, flips, procgen):  # figures come last, so that they have what others made meanwhile
        bench.play()
    logs = mazes.budget.logs
    figures = shown(mazes, logs, figures_of, show)
    draw(asked.root, figures, logs)
    figures["data_ratio"] = data_ratio(figures, logs)
    print(f"steps of play for the return of plain in unseen mazes: {figures['data_ratio']}")
    figures |= shown(flips, atari.GAMES, atari.figures_of, atari.show)
    figures |= shown(procgen, ["chaser"], chaser.figures_of, show)
    asked.publish(figures)


if __name__ == "__main__":
    main()

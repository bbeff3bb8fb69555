"""What MuZero learns from logs alone, and from its own play: on a toy whose best return is known, and in Atari.

`python -m benchmarks.muzero [--quick] [--only PART ...] [--out DIR]`. Every part is a `worldmodels` command in a folder
of its own below DIR, which goes on where it was stopped and is found finished the next time. Parts are named
GAME/RUN/SEED, such as catch/unplugged/0; --only takes the beginnings of such names, and what they need is made first.
Shared by two cores all of it takes about an hour and a half; --quick makes the same figures with one seed and next to
no training. `seconds` is what all parts that there are took together, resumed or not.

The toy is Catch with eight balls an episode, from a log of which no episode has more than 0.6 of the best return and
whose players go away from the ball more often than to it, so that to do what is mostly done is no good play. All runs
of a game have the same network, log and number of optimizer steps, and play whole games by the rules of the log. All
take the best action that they know of, without noise, but `clone`. Freeway's log is of random actions, each held for
some steps, by which a chicken crosses about once a game:

- clone: the logged actions; its policy is drawn from, since the log's was. clone_greedy: the same network by its
  likeliest actions, as the others act, so that what they are above it is no matter of drawing.
- rosmo: improved by one step of lookahead.
- unplugged: every window searched again by the newest target network, after a first quarter of the steps, in which
  policy and value are the log's (a search by values that know nothing teaches a policy to do one thing whatever it
  sees, which takes long to unlearn); half: every second one; logged: none, so that only acting searches.
- stale: none searched again, but targets that a bulk search wrote once, by a network that learned as `unplugged` does
  in a fifth of the steps: a whole training, whose learning rate falls to 0, and not the beginning of a longer one.
- prior_greedy: `unplugged` played without a search, by the likeliest action of its policy.
- up: that action at every step, without any network: what can be had of Freeway by not looking.
- online: no log but its own play, by `worldmodels online`: as many steps, a fifth of each batch new play and the rest
  searched again; for the first quarter of the steps it plays at random and searches nothing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import Runs, command_line, logged_returns, made, means, told


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Args:
        log: steps of play in a log.
        train: optimizer steps of each run.
        games: whole real games that each run plays.
        seeds: of training, but for what is there to compare with alone, which has three.
        runs: that are made.
    """

    log: int
    train: int
    games: int
    seeds: int
    runs: tuple[str, ...]


RUNS = {
    "clone": ("learner=muzero_cloning",),
    "clone_greedy": (),
    "rosmo": ("learner=rosmo",),
    "unplugged": (),
    "half": ("data.fraction=0.5",),
    "logged": ("data.fraction=0",),
    "stale": ("data.fraction=0",),
    "prior_greedy": (),
    "up": (),
    "online": ("store=null", "data.fraction=0.8", "round_steps=200", "learner.target_every=100"),
}
GREEDY = {"clone_greedy": "clone", "prior_greedy": "unplugged"}
"""Runs that are the network of another one, played by its likeliest actions."""
COMPARED = ("half", "logged", "stale", "online")
"""Runs that are there to compare others with."""
ATARI = ("clone", "clone_greedy", "rosmo", "unplugged", "prior_greedy", "up")
TOY = tuple(name for name in RUNS if name != "up")
FULL = {"catch": Budget(12_000, 2000, 100, 5, TOY), "freeway": Budget(100_000, 1000, 20, 3, ATARI)}
QUICK = {"catch": Budget(2000, 60, 10, 1, TOY), "freeway": Budget(6000, 10, 1, 1, ATARI)}
PLAYED = {"catch": ["source.balls=8"]}
LOGS = {
    "catch": [*PLAYED["catch"], "source.skill=0.3", "source.contrary=0.4", "source.at_most=0.6"],
    "freeway": ["source.mixture={sticky:1.0}"],
}
LEARNED = {"catch": ["model.td_steps=1"], "freeway": []}
"""Of all runs of a game. What Catch's players do next says little of what a better one gets."""
BEST = {"catch": 8.0}
"""The best return there is, where it is known."""


class MuZeroBench(Runs):
    """One log and many runs of each game, below `root`."""

    def __init__(self, root: Path, budgets: dict[str, Budget], only: Sequence[str]) -> None:
        super().__init__(root, only)
        self.budgets = budgets

    def log(self, game: str) -> Path:
        """The log of a game."""
        return self.collect(game, self.budgets[game].log, *LOGS.get(game, []), out=self.root / game / "log")

    def parts(self) -> Iterator[tuple[str, str, int]]:
        """Game, run and seed of every part that is wanted."""
        for game, budget in self.budgets.items():
            for name in budget.runs:
                for seed in range(min(budget.seeds, 3) if name in COMPARED else budget.seeds):
                    if self.wanted(f"{game}/{name}/{seed}"):
                        yield game, name, seed

    def policy(self, game: str, name: str, seed: int) -> Path:
        """The checkpoint of a run, with all that it needs."""
        steps = self.budgets[game].train
        if name in GREEDY:
            return self.policy(game, GREEDY[name], seed)
        learned = [f"seed={seed}", f"data.search_from={steps // 4}", *LEARNED[game], *RUNS[name]]
        if name == "online":
            settings = [f"game={game}", *PLAYED[game], *learned]
            return self.train(f"{game}_muzero", steps, *settings, out=self.root / game / name / str(seed), by="online")
        settings = [f"store={self.log(game)}", *learned]
        if name == "stale":
            settings.append(f"data.version={self.targets(game, seed)}")
        return self.train(f"{game}_muzero", steps, *settings, out=self.root / game / name / str(seed))

    def targets(self, game: str, seed: int) -> str:
        """The version of the targets that a little trained network gave the whole log once."""
        steps, out = self.budgets[game].train // 5, self.root / game / "young" / str(seed)
        settings = [f"store={self.log(game)}", f"seed={seed}", f"data.search_from={steps // 4}", *LEARNED[game]]
        checkpoint = self.train(f"{game}_muzero", steps, *settings, out=out)
        settings = [f"checkpoint={checkpoint}", f"store={self.log(game)}"]
        self.run("reanalyse", *settings, out=out / "targets")
        return json.loads((out / "targets" / "metrics.json").read_text(encoding="utf-8"))["version"]

    def play(self) -> None:
        """Train every run that is wanted, and let it play."""
        for game, name, seed in self.parts():
            who = ["policy=up", f"store={self.log(game)}"]
            if name != "up":
                who = [f"checkpoint={self.policy(game, name, seed)}"]
            settings = [*who, f"game={game}", "protocol=store", f"agent={name}", f"seed={seed}"]
            settings += [f"episodes={self.budgets[game].games}", "films=0"]
            settings += ["planner=prior", "planner.temperature=0"] if name in GREEDY else []
            self.run("evaluate", *settings, out=self.root / game / name / str(seed) / "played")


def figures_of(bench: MuZeroBench, game: str) -> dict[str, Any]:
    """Every figure of a game that has been played so far."""
    rng, log = np.random.default_rng(0), logged_returns(bench.log(game))
    played = {name: runs for name in bench.budgets[game].runs if (runs := bench.returns(game, name))}
    drawn = {name: means(runs, rng) for name, runs in ({"log": log} | played).items()}
    figures: dict[str, Any] = {}
    for name, values in drawn.items():
        figures[name] = told(values)
        if name in played:
            figures[name] |= {"seeds": len(played[name]), "games": sum(map(len, played[name]))}
            figures[name]["minus_log"] = told(values - drawn["log"])
        if game in BEST:
            figures[name]["share_of_best"] = round(float(values[0]) / BEST[game], 3)
    pairs = [(name, clone) for clone in ("clone", "clone_greedy") for name in played if name not in ("clone", clone)]
    for a, b in [*pairs, ("unplugged", "prior_greedy"), ("unplugged", "up")]:
        if a in played and b in played:
            figures[f"{a}_minus_{b}"] = told(drawn[a] - drawn[b])
    return figures | {"best_of_log": float(log[0].max())}


def show(game: str, figures: dict[str, Any]) -> None:
    """The table of a game."""
    print(f"\n{game:<24} {'return':>8}   95 % interval      of the best   seeds x games")
    for name, f in figures.items():
        if isinstance(f, dict):
            low, high = f["interval"]
            share = f"{f['share_of_best']:>8.1%}" if "share_of_best" in f else ""
            runs = f"{f['seeds']} x {f['games'] // f['seeds']}" if "seeds" in f else ""
            print(f"{name:<24} {f['mean']:>8.2f}   [{low:>6.2f}, {high:>6.2f}]   {share:>8}      {runs}".rstrip())
    print(f"{'best of the log':<24} {figures['best_of_log']:>8.2f}")


def main() -> None:
    """Make what is missing, and print every figure and the same as JSON in the last line."""
    asked = command_line("muzero", __doc__, "freeway/clone or catch", "one seed and next to no training")
    bench = MuZeroBench(asked.root, QUICK if asked.quick else FULL, asked.only)
    asked.publish(made(bench, bench.budgets, figures_of, show))


if __name__ == "__main__":
    main()

"""What policies learned from logs and from dreams score in the real game, beside the players that made the logs.

`python -m benchmarks.policies [--quick] [--only PART ...] [--out DIR]`. Every part is a `worldmodels` command in a
folder of its own below DIR, which goes on where it was stopped and is found finished the next time; so is the whole.
Parts are named GAME/RUN/SEED, such as pong/clone/0; --only takes the beginnings of such names, and what they need is
made first. On two cores all of it takes about four hours; --quick makes the same figures with next to no training.

Every policy of a game has the same encoder and the same log, was tuned in one trial (the settings of conf/experiment),
takes the checkpoint that the log or the dreams choose, and plays whole real games by the rules of its log.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import Runs, command_line, logged_returns, made, means, told
from worldmodels.data.sources.atari_play import atari_play, weights

TEMPERATURE = 0.5
"""Of all actors that play: nearer to what a mixture of players does most than to any one's whim."""


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Args:
        log: steps of play in a log.
        model: optimizer steps of a world model; None: as its experiment has it.
        clone: optimizer steps of a clone.
        values: of action values.
        dream: of an actor-critic in dreams.
        games: whole real games that each policy plays.
        seeds: of training.
        value_seeds: of training, for the comparison of heads.
    """

    log: int
    model: int | None
    clone: int
    values: int
    dream: int
    games: int
    seeds: int
    value_seeds: int


ATARI = Budget(200_000, None, clone=2000, values=1000, dream=400, games=20, seeds=3, value_seeds=5)
TOY = Budget(4000, 600, clone=400, values=1000, dream=300, games=100, seeds=5, value_seeds=5)
QUICK = {"seeds": 1, "value_seeds": 1}
BUDGETS = {"pong": ATARI, "breakout": replace(ATARI, clone=750, value_seeds=0), "catch": TOY}
QUICK_BUDGETS = {
    "pong": Budget(6000, 20, clone=10, values=5, dream=4, games=1, **QUICK),
    "catch": Budget(800, 60, clone=60, values=60, dream=10, games=20, **QUICK),
}
LOGS = {"catch": ["source.skill=0.5", "source.cells=10", "source.size=40"]}
MODELS = {"pong": "pong_tiny", "breakout": "breakout_tiny", "catch": "catch"}
MODEL_SETTINGS = {"catch": ["model.image_size=40"]}
FAMILY = {"pong": "pong", "breakout": "pong", "catch": "catch"}
"""Whose experiments a game takes."""
BINS = {"catch": ["model.head.low=-2", "model.head.high=2"]}
"""Where returns are small, the support of HL-Gauss is made to fit."""
KEPT = {
    "pong": ["data.ahead=40", "learner.least_ahead=0"],
    "breakout": ["data.ahead=40", "learner.least_ahead=1"],
    "catch": ["data.ahead=9", "learner.least_ahead=1"],
}
"""Over how many steps, about as many as a ball is on its way, how many points make a row worth cloning."""
RUNS = {
    "clone": "the log's actions, all alike",
    "clone_best": "those of the best fifth of its games",
    "clone_kept": "those that turned out well within some steps",
    "clone_weighted": "all, weighed by advantage",
    "q_mse": "values by squared error",
    "q_hl_gauss": "values by HL-Gauss",
    "dream": "actor-critic in dreams, from scratch",
    "dream_clone": "the same, begun with clone_kept",
}


class Bench(Runs):
    """One log, one world model and many policies of each game, below `root`."""

    def __init__(self, root: Path, budgets: dict[str, Budget], only: Sequence[str]) -> None:
        super().__init__(root, only)
        self.budgets = budgets

    def log(self, game: str) -> Path:
        """The log of a game."""
        return self.collect(game, self.budgets[game].log, *LOGS.get(game, []), out=self.root / game / "log")

    def world_model(self, game: str) -> Path:
        """The one world model of a game."""
        settings = [f"store={self.log(game)}", *MODEL_SETTINGS.get(game, [])]
        return self.train(MODELS[game], self.budgets[game].model, *settings, out=self.root / game / "world_model")

    def policy(self, game: str, name: str, seed: int) -> Path:
        """The checkpoint of a policy, with all that it needs."""
        family, budget, out = FAMILY[game], self.budgets[game], self.root / game / name / str(seed)
        shared = [f"store={self.log(game)}", f"seed={seed}"]
        if name.startswith("clone"):
            more = {
                "clone_best": ["data.best_share=0.2"],
                "clone_kept": KEPT[game],
                "clone_weighted": ["learner.advantage=0.2"],
            }.get(name, [])
            if name != "clone_kept":
                more = ["data.ahead=null", "learner.least_ahead=null", *more]
            return self.train(f"{family}_cloning", budget.clone, *shared, *more, out=out)
        if name.startswith("q_"):
            head = ["head@model.head=mse"] if name == "q_mse" else BINS.get(game, [])
            return self.train(f"{family}_offline_q", budget.values, *shared, *head, out=out)
        experiment = "catch_actor_critic" if family == "catch" else f"{family}_imagination"
        more = [f"learner.world_model={self.world_model(game)}"]
        if name == "dream":
            more.append("learner.real_weight=0")
        else:
            begun = f"learner.policy={self.policy(game, 'clone_kept', seed)}"
            more += [begun, *KEPT[game], "head@model.head=hl_gauss"]
        return self.train(experiment, budget.dream, *shared, *more, out=out)

    def parts(self) -> Iterator[tuple[str, str, int]]:
        """Game, run and seed of every policy that is wanted."""
        for game, budget in self.budgets.items():
            for name in RUNS:
                for seed in range(budget.value_seeds if name.startswith("q_") else budget.seeds):
                    if self.wanted(f"{game}/{name}/{seed}"):
                        yield game, name, seed

    def play(self) -> None:
        """Train every policy that is wanted, and let it play."""
        for game, name, seed in self.parts():
            checkpoint = self.policy(game, name, seed)
            games = self.budgets[game].games
            settings = [
                f"checkpoint={checkpoint}",
                f"game={game}",
                "protocol=store",
                f"episodes={games}",
                "slots=10",
                "films=0",
                f"protocol.temperature={TEMPERATURE}",
                f"agent={name}",
            ]
            self.run("evaluate", *settings, f"seed={seed}", out=checkpoint.parent / "played")


def behaviours(game: str, log: Path, games: int) -> dict[str, list[np.ndarray]]:
    """Returns of the log's games, and of whole games of each behaviour in its mixture alone."""
    found = {"log": logged_returns(log)}
    if game == "catch":
        return found
    for name in weights(game):
        episodes = atari_play(10**9, seed=10_000, game=game, mixture={name: 1.0})
        found[name] = [np.array([next(episodes).reward.sum() for _ in range(games)])]
    return found


def kept_behaviours(bench: Bench, game: str) -> dict[str, list[np.ndarray]]:
    """The same, played once."""
    file = bench.root / game / "behaviours.json"
    if not file.exists():
        found = behaviours(game, bench.log(game), bench.budgets[game].games)
        file.write_text(json.dumps({k: [x.tolist() for x in v] for k, v in found.items()}), encoding="utf-8")
    return {k: [np.array(x) for x in v] for k, v in json.loads(file.read_text(encoding="utf-8")).items()}


COMPARISONS = {
    "clone_best_minus_clone": ("clone_best", "clone"),
    "clone_kept_minus_clone": ("clone_kept", "clone"),
    "clone_weighted_minus_clone": ("clone_weighted", "clone"),
    "hl_gauss_minus_mse": ("q_hl_gauss", "q_mse"),
    "dream_clone_minus_clone_kept": ("dream_clone", "clone_kept"),
}


def figures_of(bench: Bench, game: str) -> dict[str, Any]:
    """Every figure of a game that has been played so far."""
    rng, figures = np.random.default_rng(0), {}
    played = {name: runs for name in RUNS if (runs := bench.returns(game, name))}
    drawn = {name: means(runs, rng) for name, runs in (kept_behaviours(bench, game) | played).items()}
    for name, values in drawn.items():
        figures[name] = told(values)
        if name in played:
            figures[name] |= {"seeds": len(played[name]), "games": sum(map(len, played[name]))}
            figures[name]["minus_log"] = told(values - drawn["log"])
    for name, (a, b) in COMPARISONS.items():
        if a in drawn and b in drawn:
            figures[name] = told(drawn[a] - drawn[b])
    return figures


def show(game: str, figures: dict[str, Any]) -> None:
    """The table of a game."""
    print(f"\n{game:<28} {'return':>8}   95 % interval      above the log's mean")
    for name, f in figures.items():
        more = "{mean:+.2f} [{interval[0]:.2f}, {interval[1]:.2f}]".format(**f["minus_log"]) if "minus_log" in f else ""
        low, high = f["interval"]
        print(f"{name:<28} {f['mean']:>8.2f}   [{low:>6.2f}, {high:>6.2f}]   {more}  {RUNS.get(name, '')}".rstrip())


def main() -> None:
    """Make what is missing, and print every figure and the same as JSON in the last line."""
    asked = command_line("policies", __doc__, "pong/clone or catch", "one seed and next to no training")
    bench = Bench(asked.root, QUICK_BUDGETS if asked.quick else BUDGETS, asked.only)
    asked.publish(made(bench, bench.budgets, figures_of, show))


if __name__ == "__main__":
    main()

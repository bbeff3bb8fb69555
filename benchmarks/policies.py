"""What policies learned from logs and from dreams score in the real game, beside the players that made the logs.

`python -m benchmarks.policies [--quick] [--only PART ...] [--out DIR]`. Every part is a `worldmodels` command in a
folder of its own below DIR, which goes on where it was stopped and is found finished the next time; so is the whole.
Parts are named GAME/RUN/SEED, such as pong/clone/0; --only takes the beginnings of such names, and what they need is
made first. Shared by two cores all of it takes about two hours (`seconds` is what all parts that there are took
together, resumed or not; Pong is 2.2 hours of one core); --quick makes the same figures with next to no training.

Every policy of a game has the same encoder and the same log, takes the checkpoint that the log or the dreams choose
(Freeway's with dreams and its clone_longer take the last), and plays whole real games by the rules of its log. They
were not tuned alike. The encoder, how long Pong is cloned, in windows of what length, and `KEPT` were chosen in several
trials of Pong's clone_kept, some of which played real games of its seed 0 that were seen; clones have the same steps
and windows, all policies the encoder, and dream_clone and clone_longer begin with clone_kept and clone on by the same
`KEPT`. So these three have been favoured in Pong, seed 0 most of all. In mazes the weight on logged actions and the
encoder were chosen, for both heads, by real games of seed 0 with half of the play; the settings of dreams in Catch by
what its world model foresees and real games of seed 0, in Freeway by dreams of seeds 0 and 1 from scratch, which played
real games; normalised advantages did harm in Pong (seed 0). The rest has the settings of conf/experiment, of one trial.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import Runs, command_line, composed, logged_returns, made, means, told, training
from worldmodels.config import plain, sentences, sized
from worldmodels.data.disk import make_folder, write_json
from worldmodels.data.sources.atari_play import atari_play, weights
from worldmodels.learners.fit import fit
from worldmodels.learners.policy import load_policy

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


ATARI = Budget(200_000, None, clone=2000, values=1000, dream=500, games=20, seeds=3, value_seeds=3)
TOY = Budget(4000, 4000, clone=400, values=1000, dream=1000, games=100, seeds=3, value_seeds=5)
QUICK = {"seeds": 1, "value_seeds": 1}
BUDGETS = {
    "pong": ATARI,
    "freeway": replace(ATARI, model=2000, clone=500, dream=200, value_seeds=0),
    "catch": TOY,
    "maze": replace(TOY, log=80_000, values=1500, seeds=0),  # for the comparison of heads alone
}
QUICK_ATARI = Budget(6000, 20, clone=10, values=5, dream=4, games=1, **QUICK)
QUICK_BUDGETS = {
    "pong": QUICK_ATARI,
    "freeway": replace(QUICK_ATARI, value_seeds=0),
    "catch": Budget(800, 60, clone=60, values=60, dream=10, games=20, **QUICK),
    "maze": Budget(2000, None, clone=0, values=10, dream=0, games=5, seeds=0, value_seeds=1),
}
LOGS = {
    "freeway": ["source.mixture={sticky:1.0}"],
    "catch": ["source.skill=0.5", "source.cells=10", "source.size=40"],
    "maze": ["source.cells=9", "source.size=9", "source.mazes=10"],
}
MODELS = {"pong": "pong_tiny", "freeway": "pong_tiny", "catch": "catch"}
WHOLE = ["data.length=10", "data.left_padding=9"]
"""Windows as long as an episode of Catch."""
MODEL_SETTINGS = {"catch": ["model.image_size=40", "model.sizes.tiny.reward_length=null", *WHOLE]}
"""A memory that was only ever five or six steps long foresees no end after nine."""
DREAMS = {
    "catch": [
        *WHOLE,
        "data.batch_size=128",
        "learner.horizon=9",
        "learner.reuse=4",
        "learner.normalise=true",
        "learner.entropy=1.0e-2",
    ],
    "freeway": [
        "data.length=39",
        "data.event_share=0.5",
        "data.event_rows=15",
        "learner.left_out=15",
        "learner.normalise=true",
        "learner.entropy=1.0e-2",
        "trainer.val_check_interval=200",
    ],
}
"""An episode of Catch is dreamt whole. In Freeway's log points are rare: half of the windows are drawn so that one, or
the end, is within the 15 steps before which a dream begins, and as held-out dreams hold none, the last step is taken.
"""
FAMILY = {"pong": "pong", "freeway": "pong", "catch": "catch", "maze": "maze"}
"""Whose experiments a game takes."""
BINS = {
    "catch": ["model.head.low=-2", "model.head.high=2"],
    "maze": ["model.head.low=-10", "model.head.high=40", "model.head.bins=101"],
}
"""Where returns are small or large, the support of HL-Gauss is made to fit."""
KEPT = {
    "pong": ["data.ahead=40", "learner.least_ahead=0"],
    "freeway": ["data.ahead=40", "learner.least_ahead=1"],
    "catch": ["data.ahead=9", "learner.least_ahead=1"],
}
"""Over how many steps, about as many as a ball is on its way, how many points make a row worth cloning."""
RUNS = {
    "clone": "the log's actions, all alike",
    "clone_best": "those of the best fifth of its games",
    "clone_kept": "those that turned out well within some steps",
    "q_mse": "values by squared error",
    "q_hl_gauss": "values by HL-Gauss",
    "dream": "actor-critic in dreams, from scratch",
    "dream_clone": "the same, begun with clone_kept; in Atari it clones on beside",
    "clone_longer": "dream_clone without the dreams: as many steps of cloning alone",
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
        if name.startswith("q_"):
            head = ["head@model.head=mse"] if name == "q_mse" else BINS.get(game, [])
            return self.train(f"{family}_offline_q", budget.values, *shared, *head, out=out)
        if name in ("clone", "clone_best", "clone_kept"):
            more = KEPT[game] if name == "clone_kept" else ["data.ahead=null", "learner.least_ahead=null"]
            more = [*more, "data.best_share=0.2"] if name == "clone_best" else more
            return self.train(f"{family}_cloning", budget.clone, *shared, *more, out=out)
        experiment = "catch_actor_critic" if family == "catch" else f"{family}_imagination"
        shared += DREAMS.get(game, [])
        if name == "dream":
            more = [f"learner.world_model={self.world_model(game)}", "learner.real_weight=0"]
            return self.train(experiment, budget.dream, *shared, *more, out=out)
        begun, more = self.policy(game, "clone_kept", seed), [*KEPT[game], "head@model.head=hl_gauss"]
        if name == "dream_clone":
            more += [f"learner.world_model={self.world_model(game)}", f"learner.policy={begun}"]
            return self.train(experiment, budget.dream, *shared, *more, out=out)
        asked = composed("train", *training(experiment, budget.dream, *shared, *more), f"out={out}")
        return self.clone_on(begun, plain(asked), f"{family}_cloning", out)

    def clone_on(self, begun: Path, settings: dict[str, Any], cloning: str, out: Path) -> Path:
        """The checkpoint of a policy that clones on by the settings of a training in dreams, but for the dreams.

        Args:
            begun: checkpoint of the policy.
            settings: of the training in dreams.
            cloning: the experiment that has the learner; what both learners have is as in dreams.
            out: folder of the part.
        """
        learner = plain(composed("train", f"experiment={cloning}", f"out={out}"))["learner"]
        shared = {name: settings["learner"].get(name, value) for name, value in learner.items()}
        settings |= {"learner": shared | {"_target_": learner["_target_"]}, "model": sized(settings["model"])}
        if not self.done(out, settings):
            print(f"{out.relative_to(self.root)} ...", flush=True)
            with sentences("train"):
                fit(settings, out, load_policy(begun)[0].state_dict())
        return out / "best.ckpt"

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
    if game in LOGS:  # which say who plays
        return found
    for name in weights(game):
        episodes = atari_play(10**9, seed=10_000, game=game, mixture={name: 1.0})
        found[name] = [np.array([next(episodes).reward.sum() for _ in range(games)])]
    return found


def kept_behaviours(bench: Bench, game: str) -> dict[str, list[np.ndarray]]:
    """The same, played once."""
    file = bench.root / game / "behaviours.json"
    if not file.exists():
        began = time.monotonic()
        found = behaviours(game, bench.log(game), bench.budgets[game].games)
        file.write_text(json.dumps({k: [x.tolist() for x in v] for k, v in found.items()}), encoding="utf-8")
        make_folder(took := file.with_suffix(""))  # where every part has what it took
        write_json(took / "metrics.json", {"seconds": round(time.monotonic() - began, 1)})
    return {k: [np.array(x) for x in v] for k, v in json.loads(file.read_text(encoding="utf-8")).items()}


COMPARISONS = {
    "clone_best_minus_clone": ("clone_best", "clone"),
    "clone_kept_minus_clone": ("clone_kept", "clone"),
    "hl_gauss_minus_mse": ("q_hl_gauss", "q_mse"),
    "dream_clone_minus_clone_kept": ("dream_clone", "clone_kept"),
    "dream_clone_minus_clone_longer": ("dream_clone", "clone_longer"),
}


def best_minus_log(drawn: dict[str, np.ndarray], learned: Iterable[str]) -> dict[str, Any]:
    """What the best learned policy is above the log's mean, chosen again in each resample, and its name in the sample.

    The choosing is in the interval, but its luck is not taken out: it is among the very games that are told, so that
    the best of many policies that are all alike is above each. The `minus_log` of a policy named beforehand has no such
    luck. Resamples of a maximum lie higher than the maximum itself where several policies are near it.

    Args:
        drawn: mean return in each resample, (1 + resamples,), the sample first, by name, with `log` among them.
        learned: names of policies.
    """
    names = list(learned)
    every = np.array([drawn[name] for name in names])
    return told(every.max(0) - drawn["log"]) | {"best": names[every[:, 0].argmax()]}


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
    if played:
        figures["best_minus_log"] = best_minus_log(drawn, played)
    return figures


def show(game: str, figures: dict[str, Any]) -> None:
    """The table of a game."""
    print(f"\n{game:<28} {'return':>8}   95 % interval      above the log's mean")
    for name, f in figures.items():
        more = "{mean:+.2f} [{interval[0]:.2f}, {interval[1]:.2f}]".format(**f["minus_log"]) if "minus_log" in f else ""
        (low, high), about = f["interval"], RUNS.get(name, f.get("best", ""))
        print(f"{name:<28} {f['mean']:>8.2f}   [{low:>6.2f}, {high:>6.2f}]   {more}  {about}".rstrip())


def main() -> None:
    """Make what is missing, and print every figure and the same as JSON in the last line."""
    asked = command_line("policies", __doc__, "pong/clone or catch", "one seed and next to no training")
    bench = Bench(asked.root, QUICK_BUDGETS if asked.quick else BUDGETS, asked.only)
    asked.publish(made(bench, bench.budgets, figures_of, show))


if __name__ == "__main__":
    main()

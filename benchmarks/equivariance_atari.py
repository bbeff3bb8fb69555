"""What a flip that play has only nearly is worth in real Atari games, learned from logs.

A part of `benchmarks.equivariance`, which runs it with the others; `--only breakout freeway` runs it alone. Breakout
has the flip but for its score bar; Freeway but for the player, who walks left of the middle, and for its cars, which a
flip lets come from the other side. Freeway's log is of random actions that are held, as in `benchmarks.muzero`.

All runs have the same log, number of optimizer steps and about as many parameters: plain; turned, whose training
windows are flipped at random; encoder, whose representation has the flip built in, and nothing else (partial
equivariance). Held-out play of the log tells the loss of rewards, and how far values are from the discounted sum of the
clipped rewards that followed, which is the behaviour's and no better policy's; whole real games, played by the search,
tell the score.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.paired import games_of, minus
from benchmarks.runs import Runs, logged_returns, means, told
from worldmodels.data.sampling import even_windows
from worldmodels.data.segments import TERMINATED
from worldmodels.data.store import Store
from worldmodels.data.targets import returns_to_go
from worldmodels.learners.muzero import load_muzero
from worldmodels.models.muzero import MuZero
from worldmodels.models.muzero_loss import VALUE, own_targets

GAMES = {"breakout": ("pong_muzero", []), "freeway": ("freeway_muzero", ["source.mixture={sticky:1.0}"])}
"""The experiment that a game is learned by, and what its log is made with."""
RUNS = {
    "plain": (),
    "turned": ("model.turned=flip_lr",),
    "encoder": ("model.symmetry=flip_lr", "model.symmetric=[representation]"),
}
LENGTH = 16


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Args:
        log: steps of play.
        train: optimizer steps of each run.
        games: whole real games that each run plays.
        limit: steps after which a game is cut: a player that never serves would play half an hour; Freeway has 2,048.
        windows: of held-out play.
        seeds: of training.
    """

    log: int
    train: int
    games: int
    limit: int
    windows: int
    seeds: int


FULL = Budget(50_000, train=1000, games=10, limit=2100, windows=256, seeds=3)
QUICK = Budget(6000, train=10, games=1, limit=200, windows=16, seeds=1)


class Flips(Runs):
    """One log of each game, and three runs with each seed."""

    def __init__(self, root: Path, budget: Budget, only: list[str]) -> None:
        super().__init__(root, only)
        self.budget = budget

    def parts(self) -> Iterator[tuple[str, str, int]]:
        """Game, run and seed of every part that is wanted."""
        for game in GAMES:
            for seed in range(self.budget.seeds):
                yield from ((game, name, seed) for name in RUNS if self.wanted(f"{game}/{name}/{seed}"))

    def play(self) -> None:
        """Train every run that is wanted, judge it on held-out play, and let it play."""
        for game, name, seed in self.parts():
            experiment, source = GAMES[game]
            log = self.collect(game, self.budget.log, *source, out=self.root / game / "log")
            out = self.root / game / name / str(seed)
            settings = [f"store={log}", f"seed={seed}", *RUNS[name]]
            checkpoint = self.train(experiment, self.budget.train, *settings, out=out)
            if not (out / "value_error").exists():
                (out / "value_error").write_text(
                    str(value_error(load_muzero(checkpoint)[0], Store.open(log), self.budget.windows))
                )
            arguments = [f"checkpoint={checkpoint}", f"game={game}", "protocol=store", f"agent={name}", "films=0"]
            arguments += [f"seed={seed}", f"episodes={self.budget.games}", f"protocol.time_limit={self.budget.limit}"]
            self.run("evaluate", *arguments, out=out / "played")

    def held_out(self, game: str, name: str) -> dict[str, list[float]]:
        """The loss of rewards, and the error of values, of each seed of a run."""
        runs = sorted(path.parent for path in (self.root / game / name).glob("*/value_error"))
        metrics = [json.loads((out / "metrics.json").read_text(encoding="utf-8"))["final"] for out in runs]
        losses = [final["loss_reward"] for final in metrics]
        return {"reward_loss": losses, "value_error": [float((out / "value_error").read_text()) for out in runs]}


def value_error(model: MuZero, store: Store, windows: int) -> float:
    """Root mean square of what values differ by from the discounted clipped rewards of held-out play."""
    flags = store.column("flags") & TERMINATED > 0
    followed, known = returns_to_go(np.sign(store.column("reward")), flags, store.offsets, model.gamma)
    starts = even_windows(store, store.splits["test"], windows, LENGTH)
    segment = store.read(starts, LENGTH)
    with torch.no_grad():
        values = own_targets(model, segment)[VALUE].numpy()
    counts = segment.mask.numpy().copy()
    counts[:, : model.frames - 1] = False  # that see less than the whole context
    which, step = np.nonzero(counts)
    row = store.offsets[starts[which, 0]] + starts[which, 1] + step
    return float(np.sqrt(np.mean((values[which, step] - followed[row])[known[row]] ** 2)))


def figures_of(bench: Flips, game: str) -> dict[str, Any]:
    """Held-out losses of every run, returns, and the difference to the plain one's."""
    rng = np.random.default_rng(0)
    figures: dict[str, Any] = {"log": told(means(logged_returns(bench.root / game / "log"), rng))}
    played = {name: runs for name in RUNS if (runs := bench.returns(game, name))}
    drawn = {name: means(runs, rng) for name, runs in played.items()}
    for name, values in drawn.items():
        figures[name] = told(values) | {"seeds": len(played[name])}
        trained = next((bench.root / game / name).glob("*/metrics.json"))
        figures[name]["parameters"] = json.loads(trained.read_text(encoding="utf-8"))["parameters"]
        for figure, seeds in bench.held_out(game, name).items():
            figures[name][figure] = {"mean": round(float(np.mean(seeds)), 4), "seeds": [round(x, 4) for x in seeds]}
        if name != "plain":
            games, plain = (games_of(bench.root / game / run) for run in (name, "plain"))
            figures[name]["minus_plain"] = minus(games, plain, rng)
    return figures


def show(game: str, figures: dict[str, Any]) -> None:
    """The table of the game."""
    print(f"\n{game:<10}{'return':>24}{'held-out reward loss':>24}{'held-out value error':>24}{'parameters':>12}")
    for name, f in figures.items():
        text = f"{f['mean']:.2f} [{f['interval'][0]:.2f}, {f['interval'][1]:.2f}]"
        held_out = [f"{f[k]['mean']:.4f}" if k in f else "" for k in ("reward_loss", "value_error")]
        print(f"{name:<10}{text:>24}{held_out[0]:>24}{held_out[1]:>24}{f.get('parameters', ''):>12}".rstrip())

"""What four known games are worth to two new ones, of each of which 5,000 transitions may be used.

`python -m benchmarks.new_games [--quick] [--only PART ...] [--out DIR]`. Every part is a `worldmodels` command in a
folder of its own below DIR, which goes on where it was stopped and is found finished the next time. Parts are named
GAME/SEED, such as pong/0; --only takes the beginnings of such names, and what they need is made first. On two cores
all of it takes up to three hours; --quick makes the same figures with one seed and next to no training.

One model of size tiny learns `KNOWN` together. For each new game and seed, with the same episodes:

- full and scratch: `adapt-report`, fine-tuning beside training from scratch for several times as many steps;
- lora: fine-tuning by low-rank changes, biases, norms and embeddings alone, at rates three times as high;
- replay: fine-tuning with a share of every batch from the known games.

The error is PSNR on changed pixels of rollouts on test episodes, at horizon 8 where nothing else is said. A gain is
over the same model before fine-tuning, and what is forgotten is a share of its gain over the best static frame on the
known games. Intervals are over seeds, by Student's t.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from benchmarks.runs import Runs, command_line
from worldmodels.data.disk import read_json
from worldmodels.evaluation.adaptation import forgotten

KNOWN = ("breakout", "boxing", "freeway", "space_invaders")
NEW = ("pong", "demon_attack")
BUDGET = 5000
HORIZONS = (1, 4, 8)
BURN_IN = 32
LORA = ["method=lora", "learner.lr.denoiser=6.0e-3", "learner.lr.reward_model=3.0e-3"]


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Args:
        log: steps of play in a log.
        model: optimizer steps on the known games.
        tune: on a new one.
        times: how many times as many a training from scratch takes.
        points: how often a run is judged in `tune` steps.
        windows: rollouts that judge it.
        seeds: of fine-tuning, and of the episodes that it uses.
    """

    log: int
    model: int
    tune: int
    times: int
    points: int
    windows: int
    seeds: int


FULL = Budget(30_000, 6000, 450, 4, 5, 64, 3)
QUICK = Budget(12_000, 30, 6, 3, 2, 4, 1)


class NewGames(Runs):
    """One model of the known games, and what becomes of it on the new ones."""

    def __init__(self, root: Path, budget: Budget, only: Sequence[str]) -> None:
        super().__init__(root, only)
        self.budget = budget

    def log(self, game: str) -> Path:
        """The log of a game."""
        return self.collect(game, self.budget.log, out=self.root / game / "log")

    def base(self) -> Path:
        """The checkpoint of the model of the known games."""
        stores = f"store=[{','.join(str(self.log(game)) for game in KNOWN)}]"
        return self.train("several_tiny", self.budget.model, stores, out=self.root / "known")

    def adapt(self, game: str, seed: int) -> None:
        """Every run of a game and seed, and what is left of the known games."""
        b, out = self.budget, self.root / game / str(seed)
        old = f"[{','.join(str(self.log(known)) for known in KNOWN)}]"
        judged = [f"windows={b.windows}", f"horizons=[{','.join(map(str, HORIZONS))}]", f"burn_in={BURN_IN}"]
        shared = [f"checkpoint={self.base()}", f"store={self.log(game)}", f"seed={seed}", "logger=csv", *judged]
        curves = [f"old={old}", f"budgets=[{BUDGET}]", f"steps={b.tune}", f"points={b.points}"]
        self.run("adapt-report", *shared, *curves, f"scratch_times={b.times}", out=out / "full")
        every = -(-b.tune // b.points)
        alike = [f"budget={BUDGET}", f"trainer.max_steps={b.tune}", f"trainer.val_check_interval={every}"]
        alike += ["learner.schedule=constant", "scratch=false"]
        self.run("finetune", *shared, *alike, *LORA, out=out / "lora")
        self.run("finetune", *shared, *alike, f"replay.store={old}", out=out / "replay")
        kept = [f"checkpoint={out / 'replay' / 'finetuned' / 'best.ckpt'}", f"store={old}", *judged, "reward_rows=0"]
        kept += ["other_actions.windows=0", "spread.windows=0"]
        self.run("quality", *kept, out=out / "replay" / "kept")

    def parts(self) -> list[tuple[str, int]]:
        """Game and seed of what is wanted."""
        every = [(game, seed) for game in NEW for seed in range(self.budget.seeds)]
        return [(game, seed) for game, seed in every if self.wanted(f"{game}/{seed}")]

    def play(self) -> None:
        """Make what is wanted."""
        for game, seed in self.parts():
            self.adapt(game, seed)

    def whole(self, game: str) -> list[dict[str, Any]]:
        """What each seed of a game gave that is complete."""
        whole = sorted((self.root / game).glob("*/replay/kept/metrics.json"))
        return [self.found(path.parent.parent.parent) for path in whole]

    def found(self, folder: Path) -> dict[str, Any]:
        """The figures of a seed, by horizon."""
        report, lora, replay = (read_json(folder / name / "metrics.json") for name in ("full", "lora", "replay"))
        kept = read_json(folder / "replay" / "kept" / "metrics.json")["mean"]
        full, before = report["budgets"][str(BUDGET)], report["before"]
        numbers = read_json(folder / "lora" / "finetuned" / "metrics.json")["trained_parameters"]
        whole = read_json(folder / "full" / str(BUDGET) / "scratch" / "metrics.json")["parameters"]
        return {
            "before": before["new"]["psnr_changed_db"],
            "full": full["finetuned"]["psnr_changed_db"],
            "scratch": full["scratch_equal_steps"]["psnr_changed_db"],
            "lora": lora["finetune_psnr_changed_db"],
            "replay": replay["finetune_psnr_changed_db"],
            "steps_ratio": full["steps_ratio"],
            "scratch_times": full["scratch_steps"] / report["steps"],
            "lora_trained_share": numbers / whole,
            "forgotten": full["forgotten"],
            "forgotten_with_replay": forgotten(before["old"]["psnr_gain_changed_db"], kept["psnr_gain_changed_db"]),
        }


def told(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean over seeds and its 95 % interval, which a single seed has not."""
    known = np.array([value for value in values if value is not None], float)
    if not len(known):
        return {"mean": None, "interval": None}
    mean, interval = float(known.mean()), None
    if len(known) > 1:
        half = float(t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5)
        interval = [round(mean - half, 3), round(mean + half, 3)]
    return {"mean": round(mean, 3), "interval": interval}


def figures_of(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the seeds of a game say together, at horizon 8, and all of it by horizon and seed."""
    at, last = [{k: v[-1] if isinstance(v, list) else v for k, v in seed.items()} for seed in seeds], len(seeds)
    gains = {name: [s[name] - s["before"] for s in at] for name in ("full", "lora", "replay")}
    figures: dict[str, Any] = {"seeds": last}
    figures |= {f"psnr_8_{name}_db": told([s[name] for s in at]) for name in ("before", "scratch", *gains)}
    figures |= {f"gain_8_{name}_db": told(values) for name, values in gains.items()}
    ratios = [s["steps_ratio"] for s in at]
    figures["scratch_steps_ratio"] = ratios  # None: not reached in scratch_times as many steps
    figures["scratch_steps_ratio_at_least"] = min(s["steps_ratio"] or s["scratch_times"] for s in at)
    full = told(gains["full"])
    figures["full_gain_excludes_zero"] = full["interval"] is not None and full["interval"][0] > 0
    figures["lora_share_of_gain"] = round(sum(gains["lora"]) / sum(gains["full"]), 4) if sum(gains["full"]) else None
    figures["lora_trained_share"] = round(at[0]["lora_trained_share"], 4)
    figures["forgotten"] = told([s["forgotten"] for s in at])
    figures["forgotten_with_replay"] = told([s["forgotten_with_replay"] for s in at])
    return figures | {"by_seed": seeds}


def show(game: str, figures: dict[str, Any]) -> None:
    """The table of a game."""
    print(f"\n{game}, {figures['seeds']} seeds, horizon 8")
    for name, value in figures.items():
        if isinstance(value, dict):
            low, high = value["interval"] or (float("nan"), float("nan"))
            mean = float("nan") if value["mean"] is None else value["mean"]
            print(f"{name:<32} {mean:>8.3f}   [{low:.3f}, {high:.3f}]")
        elif name not in ("by_seed", "seeds"):
            print(f"{name:<32} {value}")


def main() -> None:
    """Make what is missing, and print every figure and the same as JSON in the last line."""
    asked = command_line("new_games", __doc__, "pong or pong/0", "one seed and next to no training")
    bench = NewGames(asked.root, QUICK if asked.quick else FULL, asked.only)
    bench.play()
    figures: dict[str, Any] = {}
    for game in NEW:
        if seeds := bench.whole(game):
            figures[game] = figures_of(seeds)
            show(game, figures[game])
    asked.publish(figures)


if __name__ == "__main__":
    main()

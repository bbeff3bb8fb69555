"""Dreams of ours beside those of DIAMOND's code at equal compute, and what the parts of ours are worth.

`python -m benchmarks.evidence --reference CHECKOUT [--part PART] [--game GAME] [--quick] [--out DIR]`, CHECKOUT being
one of github.com/eloialonso/diamond (measured against commit 5bcd159). Parts:

- reference: experiment=pong_tiny and breakout_tiny beside DIAMOND's denoiser in a small size (reference_training.py),
  60 and 30 minutes of CPU time each (two cores for 30 and 15 minutes), in turns, so that both meet the same load. Ours
  learns rewards and ends and is validated within its budget, the reference learns frames alone.
- ddpm: EDM beside DDPM on frames of 32x32, see ddpm.py.
- calls: 1, 2, 3 and 5 network calls a frame of `tiny` (the one of `reference`) and of `small`.
- changes: `tiny` with one change beside the same without it, all trained for the same CPU time: without its memory;
  as a deterministic regressor of the same size; with diffusers' UNet2DModel as backbone, neither having a memory, which
  that cannot take.

All is chosen on validation episodes: ours keeps the best of its checkpoints, the reference the best of several states
of its weights and of 1, 2 and 3 network calls. The test episodes are opened once, at the end of a part.
Everything is kept in data/benchmarks/evidence (evidence-quick): what is killed goes on, what is done is not done again.
A whole run takes about five hours of CPU time; parts can be run one by one, and without a part all are.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import ddpm, few_step, reference_training
from benchmarks.results import publish
from benchmarks.turns import Training, ours, take_turns
from worldmodels.data.disk import read_json, write_json
from worldmodels.data.store import Store
from worldmodels.evaluation.frames import changed_pixels, psnr, squared_error
from worldmodels.evaluation.pictures import strip
from worldmodels.evaluation.quality import HORIZONS, rollout_quality
from worldmodels.evaluation.rollouts import open_loop, window_starts
from worldmodels.hardware import tune_allocator
from worldmodels.learners.world_model import load_learner
from worldmodels.types import WorldModel

BURN_IN, CALLS, SHOWN = 32, (1, 2, 3, 5), (1, 8, 16)
SHARES = 4  # states of the reference's weights that are chosen from, evenly over its budget


class Scale(NamedTuple):
    """How much of everything: steps of play, CPU seconds of training, dreams judged."""

    steps: dict[str, int]
    budget: dict[str, float]
    small_budget: float
    change_budget: float
    turn: float
    windows: int
    ddpm: dict[str, int]


FULL = Scale(
    steps={"pong": 60_000, "breakout": 40_000},
    budget={"pong": 3600.0, "breakout": 1800.0},
    small_budget=2400.0,
    change_budget=450.0,
    turn=240.0,
    windows=128,
    ddpm={"steps": 3000, "seeds": 3, "windows": 8, "horizon": 200},
)
QUICK = Scale(
    steps={"pong": 20_000, "breakout": 10_000},
    budget={"pong": 90.0, "breakout": 60.0},
    small_budget=60.0,
    change_budget=45.0,
    turn=60.0,
    windows=32,
    ddpm={"steps": 100, "seeds": 3, "windows": 2, "horizon": 200},
)


class Bench(NamedTuple):
    """Where the evidence is kept, how much of it there is, and the reference's checkout where it is needed."""

    folder: Path
    scale: Scale
    checkout: Path | None

    def store(self, game: str) -> Store:
        """Real play by the mixture of behaviours of `worldmodels collect`, made where there is none."""
        steps = self.scale.steps[game]
        path = self.folder.parent / f"{game}-played-{steps}"
        command = [sys.executable, "-m", "worldmodels", "collect", f"game={game}", f"steps={steps}", f"store={path}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return Store.open(path)

    def tiny(self, game: str, store: Store) -> Training:
        """Ours, with the experiment's own settings."""
        return ours(f"{game}_tiny", store.path, self.folder / f"{game}-ours", self.scale.budget[game])


def against_reference(bench: Bench, game: str) -> dict[str, Any]:
    """Rollouts of ours and of the reference's, trained in turns for the same CPU time."""
    if bench.checkout is None:
        print("without --reference there is nothing to compare with: part reference is left out")
        return {}
    store, budget = bench.store(game), bench.scale.budget[game]
    mine, folder = bench.tiny(game, store), bench.folder / f"{game}-reference"

    def theirs() -> Training:
        until = max(budget, mine.spent().cpu)  # ours is planned to spend less; where it spends more, so do they
        options = {"reference": bench.checkout, "store": store.path, "out": folder}
        options |= {"until": until, "every": budget / SHARES}
        command = [sys.executable, "-m", "benchmarks.reference_training"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return Training(command, folder / "log.txt", lambda: reference_training.spent(folder, until))

    take_turns([mine, theirs()], bench.scale.turn)
    take_turns([theirs()], bench.scale.turn)
    chosen, calls, scores = choose(bench.checkout, folder, store)
    models = {"ours": best(mine), "reference": reference_training.load_model(bench.checkout, chosen, calls)}
    quality = judged(models["ours"], store, bench.scale.windows, models["reference"])
    picture(bench.folder / f"strip_{game}.png", models, store)
    spent = {"ours": mine.spent(), "reference": theirs().spent()}
    costs = {f"{name}_{unit}": round(getattr(s, unit), 1) for name, s in spent.items() for unit in s._fields[:3]}
    return compared(quality, "reference") | costs | {"reference_calls": calls, "reference_validation_db": scores}


def choose(checkout: Path, folder: Path, store: Store) -> tuple[Path, int, dict[str, float]]:
    """The state of the reference's weights, then the network calls a frame, that are best on validation episodes."""
    scores: dict[str, float] = {}

    def score(path: Path, calls: int) -> float:
        value = validation_score(reference_training.load_model(checkout, path, calls), store)
        scores[f"{path.stem}, {calls} calls"] = round(value, 2)
        print(f"reference, {path.stem}, {calls} calls: {value:.2f} dB on validation episodes", flush=True)
        return value

    states = [folder / f"weights_{k:02d}.pt" for k in range(1, SHARES)] + [folder / "state.pt"]
    path = max(states, key=lambda p: score(p, 3))
    by_calls = {3: scores[f"{path.stem}, 3 calls"], 1: score(path, 1), 2: score(path, 2)}
    return path, max(by_calls, key=by_calls.__getitem__), scores


def validation_score(model: WorldModel, store: Store) -> float:
    """What ours chooses its checkpoints by: mean PSNR on changed pixels 1, 2, 4 and 8 steps ahead, in dB."""
    window = store.read(window_starts(store, "validation", BURN_IN + 8, 32), BURN_IN + 8)
    film = open_loop(model, window, BURN_IN, torch.Generator().manual_seed(0)).obs[:, 1:]
    true = window.obs[:, BURN_IN + 1 :]
    error, count = squared_error(film, true, changed_pixels(true, window.obs[:, BURN_IN]))
    return float(psnr(error.sum(0), count.sum(0))[[0, 1, 3, 7]].mean())


def best(training: Training) -> Any:
    """The model of the checkpoint that was best on validation episodes."""
    return load_learner(training.log.parent / "best.ckpt").model


def judged(model: WorldModel, store: Store, windows: int, baseline: WorldModel | None = None) -> dict[str, Any]:
    """The figures of `worldmodels quality` on test episodes, but for rewards."""
    options = {"burn_in": BURN_IN, "reward_rows": 0, "progress": False, "baseline": baseline}
    return rollout_quality(model, store, "test", windows, **options)


def compared(quality: dict[str, Any], other: str) -> dict[str, Any]:
    """The figures of ours, of another model and of the static baselines, by horizon."""
    second, static = quality["baseline"], quality["psnr_changed_static_db"]
    figures = {name: quality[name] for name in ("horizons", "episodes", "windows")}
    for film, told in (("ours", quality), (other, second)):
        names = [n for n in told if n.startswith(("psnr_changed_db", "psnr_changed_interval", "psnr_db"))]
        names += [n for n in told if n.endswith(("_hit_rate", "_error_px"))]
        figures |= {f"{film}_{name}": told[name] for name in names}
    figures |= {n: v for n, v in quality.items() if n.endswith(("hit_rate_copy_last", "error_copy_last_px"))}
    figures |= {"copy_last_psnr_changed_db": static["1.0"], "median_psnr_changed_db": static["0.0"]}
    figures["best_blend_psnr_changed_db"] = [max(values) for values in zip(*static.values(), strict=True)]
    return figures | {
        f"gain_over_{other}_db": second["psnr_gain_changed_db"],
        f"gain_over_{other}_interval_db": second["psnr_gain_changed_interval_db"],
        "gain_over_best_blend_db": quality["psnr_gain_changed_db"],
        "gain_over_best_blend_interval_db": quality["psnr_gain_changed_interval_db"],
    }


def picture(path: Path, models: dict[str, Any], store: Store, horizon: int = 32) -> None:
    """A strip of one rollout from the middle of the test episodes: what happened, and each model's dream of it."""
    starts = window_starts(store, "test", BURN_IN + horizon, 3)
    window = store.read(starts[1:2], BURN_IN + horizon)
    rows: dict[str, Tensor] = {"real": window.obs[0, BURN_IN:]}
    for name, model in models.items():
        rows[name] = open_loop(model, window, BURN_IN, torch.Generator().manual_seed(0)).obs[0]
    strip(path, rows, (0, 1, 2, 4, 8, 16, 32))


def by_calls(bench: Bench) -> dict[str, Any]:
    """Rollouts of `tiny` and `small` with 1, 2, 3 and 5 network calls a frame."""
    store = bench.store("pong")
    batches = ("data.batch_size=8", "data.length=6", "learner.schedule=cosine", "learner.lr=5e-4")
    small = ours("pong_small", store.path, bench.folder / "pong-small", bench.scale.small_budget, *batches)
    trainings, figures = {"tiny": bench.tiny("pong", store), "small": small}, {"horizons": list(HORIZONS)}
    take_turns(list(trainings.values()), bench.scale.turn)
    for name, training in trainings.items():
        model = best(training)
        for calls in CALLS:
            model.sampler["steps"] = calls
            quality = judged(model, store, bench.scale.windows)
            for figure in ("psnr_changed_db", "psnr_changed_interval_db", "psnr_db"):
                figures[f"{name}_{calls}_{figure}"] = quality[figure]
    return figures


def changes(bench: Bench) -> dict[str, Any]:
    """Rollouts of `tiny` and of changed ones, trained in turns for the same CPU time, each beside what it changes."""
    store = bench.store("pong")

    def training(name: str, change: Change) -> Training:
        out = bench.folder / f"changed-{name}"
        return ours(change.experiment, store.path, out, bench.scale.change_budget, *change.settings)

    trainings = {name: training(name, change) for name, change in CHANGES.items()}
    take_turns(list(trainings.values()), bench.scale.turn)
    models = {name: best(training) for name, training in trainings.items()}
    figures: dict[str, Any] = {"horizons": list(HORIZONS)}
    for name, training in trainings.items():
        parameters = sum(p.numel() for p in models[name].denoiser.parameters())
        figures |= {f"{name}_steps": training.spent().steps, f"{name}_cpu": round(training.spent().cpu, 1)}
        figures[f"{name}_denoiser_parameters"] = parameters
        if of := CHANGES[name].of:
            pair = compared(judged(models[of], store, bench.scale.windows, models[name]), name)
            pair = {k: v for k, v in pair.items() if "best_blend" not in k or k.startswith("best_blend")}
            figures |= {k.replace("ours_", f"{of}_").replace("gain_over", f"{of}_over"): v for k, v in pair.items()}
    return figures


def against_ddpm(bench: Bench) -> dict[str, Any]:
    """EDM beside DDPM."""
    torch.set_num_threads(1)  # the networks are too small for more
    folder = bench.folder / f"ddpm-{bench.scale.ddpm['steps']}"
    figures = ddpm.evidence(few_step.play(bench.folder.parent, 20_000), folder, **bench.scale.ddpm)
    for name in ("ddpm.png", "strip_ddpm.png"):
        shutil.copyfile(folder / name, bench.folder / name)
    return figures


class Change(NamedTuple):
    """What differs from `tiny`, and beside which other run it is judged, if any."""

    of: str | None = None
    settings: tuple[str, ...] = ()
    experiment: str = "pong_tiny"


DENOISER = "model.sizes.tiny.denoiser"
NETWORK = f"{DENOISER}.network"
NO_MEMORY = (f"{DENOISER}.memory=null", "data.length=6", "data.left_padding=0")
UNET2D = (f"{NETWORK}.backbone=unet2d", f"{NETWORK}.channels=[48,48]", f"+{NETWORK}.depths=[1,1]")
CHANGES = {
    "tiny": Change(),
    "no_memory": Change("tiny", NO_MEMORY),
    "regressor": Change("tiny", experiment="pong_tiny_regressor"),
    "unet2d": Change("no_memory", (*NO_MEMORY, *UNET2D, f"+{NETWORK}.attention=[false,false]")),
}

Part = Callable[[Bench], dict[str, Any]]
PARTS: dict[str, dict[str, Part]] = {
    "reference": {game: partial(against_reference, game=game) for game in ("pong", "breakout")},
    "ddpm": {"pong": against_ddpm},
    "calls": {"pong": by_calls},
    "changes": {"pong": changes},
}


def show(name: str, figures: dict[str, Any]) -> None:
    """A table for people: what has a value for each horizon, at three of them; the rest as it is."""
    columns = figures.get("steps") or figures.get("horizons") or []
    at = [k for k, h in enumerate(columns) if "steps" in figures or h in SHOWN]
    print(f"\n{name:<40}" + "".join(f"{f't+{columns[k]}':>16}" for k in at))
    for key, value in figures.items():
        if not isinstance(value, list):
            print(f"{key:<40} {value}")
        elif key not in ("steps", "horizons"):
            print(f"{key:<40}" + "".join(f"{_cell(value[k]):>16}" for k in at))


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{_cell(value[0])} to {_cell(value[1])}"
    return "none" if value is None else f"{value:.2f}"


def main() -> None:
    """Do what is not done yet, print the figures, and the same as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of github.com/eloialonso/diamond")
    parser.add_argument("--part", choices=PARTS, help="one part alone")
    parser.add_argument("--game", choices=("pong", "breakout"), help="one game alone")
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the training")
    parser.add_argument("--out", type=Path, help="folder for evidence.json and the pictures")
    options = parser.parse_args()
    tune_allocator()
    folder = Path("data", "benchmarks", "evidence-quick" if options.quick else "evidence").absolute()
    bench = Bench(folder, QUICK if options.quick else FULL, options.reference and options.reference.absolute())
    figures: dict[str, Any] = {}
    for part, games in PARTS.items():
        for game, run in games.items():
            if options.part in (None, part) and options.game in (None, game):
                name = f"{part}_{game}"
                figures[name] = result(folder / f"{name}.json", bench, run)
                show(name, figures[name])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.png"):
            shutil.copy(path, options.out)
    publish("evidence", figures, options.out, anchor="self" if options.reference is None else "reference")


def result(path: Path, bench: Bench, run: Part) -> dict[str, Any]:
    """The figures of a part, from its file where it was done at this scale."""
    scale = {**bench.scale._asdict()}
    if path.exists() and (kept := read_json(path))["scale"] == scale:
        return kept["figures"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if figures := run(bench):
        write_json(path, {"scale": scale, "figures": figures})
    return figures


if __name__ == "__main__":
    main()

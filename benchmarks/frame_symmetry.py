"""What symmetry is worth to the diffusion model: none, windows turned at random, and a symmetric denoiser.

`python -m benchmarks.frame_symmetry [--quick] [--only RUN ...] [--out DIR]`. The game is MiniPacman in square mazes,
which all of D4 turns and flips exactly. All runs learn from one log, of mazes that stand one way, for an equal time of
one core, which is counted by the process, so that what else runs matters little:

- none: as it is; turned: each training window moved by an element drawn for it (`model.turned=d4`);
- symmetric: the denoiser's output is the mean over all eight (`model.symmetry=d4`), so that a step costs several times
  as much; turned_mean: what `turned` has learned, dreamt with that mean, which has no parameters of its own.

Judged are rollouts of held-out play with the logged actions, by their error on changed pixels: in mazes as they stood,
in the same mazes turned, and in mazes never seen. Runs and seeds that are finished are found so the next time.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.results import publish
from worldmodels.config import build, conf_dir, sized
from worldmodels.data.datamodule import StoreDataModule
from worldmodels.data.sampling import even_windows
from worldmodels.data.store import Store
from worldmodels.evaluation.frames import changed_pixels, psnr, squared_error
from worldmodels.imagination import LoggedActions, imagine
from worldmodels.learners.base import decay_groups

RUNS = {"none": {}, "turned": {"turned": "d4"}, "symmetric": {"symmetry": "d4"}}
MEAN = "turned_mean"
PLACES = {"as logged": (), "turned": ("source.orientation=1",), "unseen": ("source.unseen=true",)}
"""Of held-out play, by what differs from the log."""
HORIZONS = (1, 2, 4, 8)
SIZE, BURN_IN, RATE, BATCH = 15, 4, 3e-3, 16
MODEL = {
    "size": "tiny",
    "image_size": SIZE,
    "sizes": {
        "tiny": {
            "denoiser": {
                "network": {"context": 2, "cond_channels": 64, "patch": 1, "channels": [32], "dilations": [1, 2, 1]},
                "centre": "last",  # motion of whole cells is nothing to be followed by thirds of a pixel
                "memory": None,
            },
            "reward_model": {"channels": [16], "patch": 3, "lstm": 64, "projection": 64},
        }
    },
}
"""A model of frames of 15x15 pixels, one for each cell of a maze."""


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Args:
        log: steps of play that is learned from.
        mazes: in it.
        held_out: steps of play in each place.
        windows: rollouts in each place.
        seconds: of one core, for each run.
        seeds: of training.
    """

    log: int
    mazes: int
    held_out: int
    windows: int
    seconds: float
    seeds: int


FULL = Budget(20_000, mazes=10, held_out=4000, windows=256, seconds=300, seeds=3)
QUICK = Budget(4000, mazes=10, held_out=600, windows=96, seconds=40, seeds=1)


def log(path: Path, steps: int, mazes: int, *settings: str) -> Path:
    """A log of play, made where it is not there."""
    if not (path / "metrics.json").exists():
        shared = ["game=maze", f"source.mazes={mazes}", f"steps={steps}", f"store={path}"]
        command = [sys.executable, "-m", "worldmodels", "collect", *shared, *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def model(seed: int, **settings: str) -> Any:
    """The model with the weights that a seed gives."""
    torch.manual_seed(seed)
    merged = OmegaConf.merge(OmegaConf.load(conf_dir() / "model" / "diffusion.yaml"), MODEL, settings)
    return build(sized(OmegaConf.to_container(merged)))  # pyrefly: ignore


def train(world: Any, store: Path, seconds: float, seed: int) -> int:
    """Learn for so many seconds of one core, at a rate that falls to 0; returns the number of steps."""
    data = StoreDataModule(str(store), batch_size=BATCH, length=6, left_padding=2, seed=seed)
    optimizer = torch.optim.AdamW(decay_groups(world, 1e-2), lr=RATE, fused=True)
    generator, began, steps = torch.Generator().manual_seed(seed), time.process_time(), 0
    world.train()
    for segment in data.train_dataloader():
        spent = (time.process_time() - began) / seconds
        if spent >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (steps + 1) / 50) * 0.5 * (1 + np.cos(np.pi * spent))
        loss, _ = world.loss(segment, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(world.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


def judge(world: Any, store: Path, windows: int) -> list[float]:
    """PSNR in dB on changed pixels of rollouts of held-out play, at each of the horizons.

    Windows count alike, however much changes in them: where a level begins anew, all its food comes back at once.
    """
    length = BURN_IN + max(HORIZONS)
    held_out = Store.open(store)
    segment = held_out.read(even_windows(held_out, range(len(held_out.lengths)), windows, length), length)
    context, last = segment.steps(0, BURN_IN), segment.obs[:, BURN_IN]
    generator = torch.Generator().manual_seed(0)
    policy = LoggedActions(segment.action[:, BURN_IN:])
    dream = imagine(world.eval(), policy, context, max(HORIZONS), generator).obs[:, 1:]
    true = segment.obs[:, BURN_IN + 1 :]
    moved = changed_pixels(true, last) & segment.next_mask[:, BURN_IN:, None, None, None]
    error, count = squared_error(dream, true, moved)
    each = (error / count.clamp(min=1)).sum(0)
    return psnr(each, (count > 0).sum(0))[[h - 1 for h in HORIZONS]].tolist()


def runs(root: Path, budget: Budget, only: list[str]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """What each run of each seed has come to, trained and judged where it is not yet; the seeds in turn."""
    logged = log(root / "log", budget.log, budget.mazes)
    tests: dict[str, Path] = {}
    for place, settings in PLACES.items():
        tests[place] = log(root / place.replace(" ", "_"), budget.held_out, budget.mazes, "seed=1", *settings)
    for seed in range(budget.seeds):
        for name, settings in {name: RUNS[name] for name in RUNS if name in (only or RUNS)}.items():
            file = root / f"{name}_{seed}.json"
            if not file.exists():
                world = model(seed, **settings)
                steps = train(world, logged, budget.seconds, seed)
                judged = {name: {place: judge(world, path, budget.windows) for place, path in tests.items()}}
                if name == "turned":
                    mean = model(seed, symmetry="d4")
                    mean.load_state_dict(world.state_dict())
                    judged[MEAN] = {place: judge(mean, path, budget.windows) for place, path in tests.items()}
                file.write_text(json.dumps({"steps": steps, "psnr": judged}), encoding="utf-8")
                print(f"{name}, seed {seed}: {steps} steps", flush=True)
            yield name, seed, json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    """Make what is missing, and print every figure and the same as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the time")
    parser.add_argument("--only", nargs="*", default=[], choices=[*RUNS], metavar="RUN", help="such as turned")
    parser.add_argument("--out", type=Path, default=Path("runs/frame_symmetry"), help="where logs and results are kept")
    options = parser.parse_args()
    root, budget = options.out.absolute() / ("quick" if options.quick else "full"), QUICK if options.quick else FULL
    root.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    steps: dict[str, list[int]] = {}
    found: dict[str, list[Any]] = {}
    for name, _, result in runs(root, budget, options.only):
        steps.setdefault(name, []).append(result["steps"])
        for judged, places in result["psnr"].items():
            found.setdefault(judged, []).append([places[place] for place in PLACES])
    figures: dict[str, Any] = {}
    print(f"\nPSNR on changed pixels in dB, mean of horizons {HORIZONS}, [least, greatest] of {budget.seeds} seeds")
    print(f"{'':<12}" + "".join(f"{place:>22}" for place in PLACES))
    for name, values in found.items():
        each = np.array(values)  # (seeds, places, horizons)
        means = each.mean(2)
        figures[name] = {
            place: {
                "psnr_changed_db": round(float(means[:, p].mean()), 3),
                "range": [round(float(means[:, p].min()), 3), round(float(means[:, p].max()), 3)],
                "by_horizon_db": [round(float(x), 3) for x in each[:, p].mean(0)],
            }
            for p, place in enumerate(PLACES)
        } | ({"steps": round(float(np.mean(steps[name])))} if name in steps else {})
        cells = [figures[name][place] for place in PLACES]
        texts = [f"{c['psnr_changed_db']:.2f} [{c['range'][0]:.2f}, {c['range'][1]:.2f}]" for c in cells]
        print(f"{name:<12}" + "".join(f"{text:>22}" for text in texts))
    publish("frame_symmetry", figures | {"budget": asdict(budget)}, options.out, quick=options.quick)


if __name__ == "__main__":
    main()

"""What one network call of a few-step denoiser is worth beside three of an EDM denoiser, and how long its dreams last.

Each denoiser is `small` in DIAMOND's setting (the frame itself is denoised, three Euler calls), smaller still: for
frames of 32x32, their pixels folded by two, on three levels. It is trained for equal CPU time on the same windows of
Pong, one after the other on one thread: `edm` as it is; `few_step` learns to jump as well; `few_step_noise` has noisy
context besides. Judged are open-loop rollouts of held-out play by PSNR on changed pixels, and films of 1,000 imagined
steps under logged actions by how far they are from real frames. Pictures of these are written to --out: a film that
stays near real frames may still show no ball. The store and each denoiser that is trained are kept in data/benchmarks:
what is killed goes on with the model that it was at.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.results import publish
from worldmodels import hardware
from worldmodels.config import build, conf_dir, plain, sized
from worldmodels.data.collecting import collect
from worldmodels.data.disk import atomic
from worldmodels.data.sampling import WindowSampler
from worldmodels.data.sources.atari_play import atari_card, atari_play
from worldmodels.data.store import Store
from worldmodels.evaluation.frames import changed_pixels, psnr, squared_error
from worldmodels.evaluation.pictures import strip
from worldmodels.evaluation.rollouts import median_frame, open_loop, window_starts
from worldmodels.learners.base import decay_groups
from worldmodels.models.diffusion import DiffusionWorldModel
from worldmodels.types import Episode, Segment

FEW_STEP = {"doublings": 1, "share": 0.25}
MODELS: dict[str, dict[str, Any]] = {
    "edm": {},
    "few_step": {"few_step": FEW_STEP},
    "few_step_noise": {"few_step": FEW_STEP, "context_noise": 0.2},
}
CALLS = {"edm": (3, 1), "few_step": (3, 1), "few_step_noise": (3, 1)}  # network calls a frame
QUICK, SECONDS = 180, 1200  # of CPU time for each model
SIZE, LEVELS = 32, {"channels": [32] * 3, "depths": [1] * 3, "attention": [False] * 3, "patch": 2}
BATCH, RATE, WARMUP = 8, 1e-3, 100
HORIZONS, BURN_IN, WINDOWS = (1, 8, 16), 8, 64
STEPS, FILMS, SHOWN = 1000, 4, (1, 10, 50, 100, 300, 1000)
OFF_PALETTE = 16  # levels of 255, in the channel that is furthest off


def play(root: Path, steps: int) -> Store:
    """A store of Pong in the game's own mixture of behaviours."""
    path, settings = root / f"pong-mixture-{SIZE}-{steps}", {"game": "pong", "size": SIZE, "colour": "rgb"}

    def more(steps: int, start: int) -> Iterator[Episode]:
        return atari_play(steps, 0, start, processes=hardware.cores(), **settings)

    collect(path, atari_card(0, **settings), more, steps)
    return Store.open(path)


def model_of(changes: dict[str, Any]) -> DiffusionWorldModel:
    """`small` with these changes of the denoiser, untrained; its reward model is not judged and as small as can be."""
    torch.manual_seed(0)
    reward = {
        "cond_channels": 8,
        "channels": [8],
        "depths": [0],
        "attention": [False],
        "middle": 0,
        "lstm": 8,
        "patch": 8,
    }
    small = {"denoiser": {"network": LEVELS, **changes}, "reward_model": reward}
    settings = {"size": "small", "image_size": SIZE, "sizes": {"small": small}}
    cfg = OmegaConf.merge(OmegaConf.load(conf_dir() / "model" / "diffusion.yaml"), settings)
    return build(sized(plain(cfg)))


def train(store: Store, changes: dict[str, Any], seconds: float, kept: Path) -> tuple[DiffusionWorldModel, int]:
    """A denoiser after so many seconds of CPU time, its rate falling to 0 with them, and the number of its steps.

    It is read from the file `kept` where that is there, and left there otherwise.
    """
    model, bf16 = model_of(changes), hardware.precision("auto") == "bf16-mixed"
    if kept.exists():
        state, steps = torch.load(kept, weights_only=True)
        model.denoiser.load_state_dict(state)
        return (model.quicken() if bf16 else model.eval()), steps
    sampler = WindowSampler(store, store.splits["train"], BATCH, model.min_length)
    optimizer = torch.optim.AdamW(decay_groups(model.denoiser, 1e-2), lr=RATE, fused=True)
    generator, steps = torch.Generator().manual_seed(0), 0
    start = time.process_time()
    while (spent := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = (
            RATE * min(1, (steps + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * spent))
        )
        segment = store.read(sampler(steps), model.min_length)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, *_ = model.denoiser.loss(segment, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 100 == 0:
            print(f"  step {steps}, {100 * spent:.0f} %, loss {loss.item():.4f}", flush=True)
    with atomic(kept) as temporary:
        torch.save((model.denoiser.state_dict(), steps), temporary)
    return (model.quicken() if bf16 else model.eval()), steps


def rollout_psnr(model: DiffusionWorldModel, window: Segment) -> list[float]:
    """PSNR in dB on changed pixels at each of the horizons, open loop from the first BURN_IN transitions."""
    dream = open_loop(model, window, BURN_IN, torch.Generator().manual_seed(0))
    return changed_psnr(dream.obs[:, 1:], window.obs)


def changed_psnr(film: Tensor, obs: Tensor) -> list[float]:
    """The same of any film (B, T, C, H, W) of what comes after the first BURN_IN transitions of obs."""
    true, last = obs[:, BURN_IN + 1 :], obs[:, BURN_IN]
    error, count = squared_error(film, true, changed_pixels(true, last))
    return [psnr(error[:, h - 1].sum(), count[:, h - 1].sum()).item() for h in HORIZONS]


class Real(NamedTuple):
    """Frames (N, C, H, W) uint8 of the training split, and their colours (K, 3) float32."""

    frames: Tensor
    palette: Tensor


def real_frames(store: Store) -> Real:
    """2,000 evenly spaced frames; colours that are less than 4 levels apart may count as one."""
    frames = store.read(window_starts(store, "train", 1, 2000), 1).obs[:, 0]
    return Real(frames, colours(frames // 4 * 4)[0])


def colours(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The different colours of frames (N, 3, H, W) uint8, (K, 3) float32, and how many pixels have each."""
    weights = torch.tensor([65536, 256, 1])
    codes, count = (frames.movedim(1, -1).long() * weights).sum(-1).unique(return_counts=True)
    return (codes[:, None] // weights % 256).float(), count


def far_from_real(frames: Tensor, real: Real) -> tuple[float, float]:
    """How unlike real frames the frames (B, C, H, W) uint8 are, as means over B.

    Returns:
        The mean absolute distance in levels of 255 to the nearest real frame; and the share in percent of the pixels
        whose colour is more than OFF_PALETTE levels from every real colour.
    """
    size = frames[0].numel()
    distance = torch.cdist(frames.flatten(1).float(), real.frames.flatten(1).float(), p=1).amin(1) / size
    own, count = colours(frames)
    off = torch.cdist(own, real.palette, p=torch.inf).amin(1) > OFF_PALETTE
    return distance.mean().item(), 100 * count[off].sum().item() / count.sum().item()


def baselines(store: Store, real: Real) -> dict[str, float]:
    """The same figures of films that need no model: the last frame held, the median frame, and what really came."""
    window = store.read(window_starts(store, "test", BURN_IN + max(HORIZONS), WINDOWS), BURN_IN + max(HORIZONS))
    shape, figures = window.obs[:, BURN_IN + 1 :].shape, {}
    still = {"copy_last": window.obs[:, BURN_IN, None], "median": median_frame(store)}
    for name, film in still.items():
        for h, value in zip(HORIZONS, changed_psnr(film.expand(shape), window.obs), strict=True):
            figures[f"psnr_changed_{name}_{h}"] = value
    figures["distance_real"], figures["off_palette_percent_real"] = far_from_real(window.obs[:, -1], real)
    return figures


def judge(model: DiffusionWorldModel, store: Store, real: Real, pictures: Path | None, name: str) -> dict[str, float]:
    """Rollouts and long dreams of one model, with a picture of two of these."""
    window = store.read(window_starts(store, "test", BURN_IN + max(HORIZONS), WINDOWS), BURN_IN + max(HORIZONS))
    figures = dict(zip((f"psnr_changed_{name}_{h}" for h in HORIZONS), rollout_psnr(model, window), strict=True))
    window = store.read(window_starts(store, "test", BURN_IN + STEPS, FILMS), BURN_IN + STEPS)
    film = open_loop(model, window, BURN_IN, torch.Generator().manual_seed(0)).obs
    told = {t: far_from_real(film[:, t], real) for t in sorted({*SHOWN, *range(0, STEPS + 1, 50)} - {0})}
    for t in SHOWN:
        figures[f"distance_{name}_{t}"], figures[f"off_palette_percent_{name}_{t}"] = told[t]
    figures[f"distance_{name}_worst"], figures[f"off_palette_percent_{name}_worst"] = map(
        max, zip(*told.values(), strict=True)
    )
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        rows = {
            f"{label} {k}": x for k in range(2) for label, x in (("dream", film[k]), ("real", window.obs[k, BURN_IN:]))
        }
        strip(pictures / f"few_step_{name}.png", rows, SHOWN)
    return figures


def main() -> None:
    """Print the figures, and the same as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} seconds of training each in place of {SECONDS}")
    parser.add_argument("--out", type=Path, help="folder for few_step.json and the pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hardware.tune_allocator()
    root, seconds = Path("data", "benchmarks"), QUICK if options.quick else SECONDS
    store = play(root, 20_000)
    real = real_frames(store)
    figures = baselines(store, real)
    for name, changes in MODELS.items():
        kept = root / f"few-step-{name}-{seconds}.pt"
        model, figures[f"{name}_train_steps"] = train(store, changes, seconds, kept)
        for calls in CALLS[name]:
            model.sampler["steps"] = calls
            figures |= judge(model, store, real, options.out, f"{name}_{calls}_calls")
    for h in HORIZONS:
        ours, theirs = (figures[f"psnr_changed_{name}_{h}"] for name in ("few_step_1_calls", "edm_3_calls"))
        figures[f"one_call_gain_db_{h}"] = ours - theirs
    for name, value in figures.items():
        print(f"{name:<48} {value:>10.4g}  {'at least 0' if name.startswith('one_call_gain') else ''}")
    publish("few_step", {name: round(value, 3) for name, value in figures.items()}, options.out)


if __name__ == "__main__":
    main()

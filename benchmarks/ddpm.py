"""EDM against DDPM: the same network, batches and number of steps, dreaming 200 steps with the same network calls.

DIAMOND (Alonso et al. 2024, section 5.1) says that with few network calls a frame dreams by DDPM (Ho et al. 2020) drift
away from the game and dreams by EDM (Karras et al. 2022) do not. Both are taken plainly here: the frame itself is
denoised, every pixel counts alike, no target follows the model's own output. Noise schedule and samplers of DDPM
are diffusers' (its ancestral sampler and DDIM, whichever is better). Learning rates, and that choice, are made on
validation episodes. Each training and each part of the judging is kept when it is done.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.frames_only import FramesOnly
from worldmodels import hardware
from worldmodels.data.disk import atomic
from worldmodels.data.sampling import WindowSampler
from worldmodels.data.store import Store
from worldmodels.evaluation.frames import psnr, squared_error
from worldmodels.evaluation.pictures import Curve, plot, strip
from worldmodels.evaluation.rollouts import open_loop, window_starts
from worldmodels.evaluation.stats import plain
from worldmodels.learners.base import decay_groups
from worldmodels.models.denoiser import FRAME_STD, Denoiser
from worldmodels.models.frames import to_float, to_uint8
from worldmodels.nn.denoiser_network import DenoiserNetwork
from worldmodels.ops.edm import karras_sigmas, sample
from worldmodels.types import Metrics, Segment

# of frames of 32x32 in patches of 12 values: 32 channels can hand on all of the noise, which is to be told
NETWORK = {
    **{"num_actions": 18, "image_channels": 3, "context": 4, "cond_channels": 64},
    **{"patch": 2, "backbone": "dilated", "channels": [32], "dilations": [1, 2, 4, 1]},
}
BURN_IN, BATCH = 8, 16
RATES = (1e-3, 3e-3, 1e-2)
CALLS = {"edm": (1, 3, 10), "ddpm": (1, 3, 10, 50)}
TUNED_ON = (1, 3, 10)  # network calls, with the mean of which learning rates are chosen
SAMPLERS = {"edm": ("euler",), "ddpm": ("ddpm", "ddim")}
SHOWN = (1, 10, 50, 100, 200)


class Edm(FramesOnly):
    """Next frame by EDM; `calls` network calls."""

    def __init__(self, calls: int = 3, sampler: str = "euler") -> None:
        super().__init__()
        self.calls = calls
        self.denoiser = Denoiser(NETWORK, sigma_offset=0.0, rollout=0, rounding=True, padding="black")

    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """EDM's loss of the last frame."""
        loss, *_ = self.denoiser.loss(segment.steps(segment.length - self.context, segment.length), generator)
        return loss, {"loss": loss.detach()}

    def next_frame(self, frames: Tensor, action: Tensor, generator: torch.Generator | None) -> Tensor:
        """By Euler steps from sigma 5, as DIAMOND."""
        context, sigmas = to_float(frames), karras_sigmas(self.calls, 2e-3, 5.0)
        x = sigmas[0] * torch.randn(context[:, -1].shape, generator=generator)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return self.denoiser.predict(x, sigma, context, action, torch.zeros_like(x))[0].clamp(-1, 1)

        return to_uint8(sample(denoise, x, sigmas))


class Ddpm(FramesOnly):
    """Next frame by DDPM, which predicts the noise; `calls` network calls by the ancestral sampler or DDIM."""

    def __init__(self, calls: int = 3, sampler: str = "ddpm") -> None:
        super().__init__()
        from diffusers import DDIMScheduler, DDPMScheduler

        # 1,000 levels and betas of 1e-4 to 0.02 (Ho et al. 2020); few calls must begin at the last level
        kind: Any = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]
        self.scheduler = kind(1000, 1e-4, 0.02, "linear", clip_sample=True, timestep_spacing="trailing")
        self.scheduler.set_timesteps(calls)
        self.network = DenoiserNetwork(**NETWORK)

    def noise_of(self, noisy: Tensor, t: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """The noise in `noisy` (B, C, H, W) at levels t (B,); the network is told them as EDM's is."""
        alpha = self.scheduler.alphas_cumprod[t]
        c_noise = ((1 - alpha) / alpha).log() / 8  # ln(sigma) / 4
        return self.network(noisy, c_noise, context.flatten(1, 2) / FRAME_STD, action, {}).float()

    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Mean squared error of the noise in the last frame (Ho et al. 2020, eq. 14)."""
        *_, last = range(segment.length + 1)
        images, rows = to_float(segment.obs), len(segment.obs)
        t = torch.randint(1000, (rows,), generator=generator)
        noise = torch.randn(images[:, -1].shape, generator=generator)
        noisy = self.scheduler.add_noise(images[:, -1], noise, t)
        context, action = images[:, last - self.context : last], segment.action[:, last - self.context : last]
        real = segment.next_mask[:, -1].float()
        error = (self.noise_of(noisy, t, context, action) - noise).square().mean((1, 2, 3))
        loss = (error * real).sum() / real.sum().clamp(min=1)
        return loss, {"loss": loss.detach()}

    def next_frame(self, frames: Tensor, action: Tensor, generator: torch.Generator | None) -> Tensor:
        """From unit noise down diffusers' levels."""
        context = to_float(frames)
        x = torch.randn(context[:, -1].shape, generator=generator)
        for t in self.scheduler.timesteps:
            noise = self.noise_of(x, t.expand(len(x)), context, action)
            x = self.scheduler.step(noise, t, x, generator=generator).prev_sample
        return to_uint8(x)


KINDS: dict[str, Any] = {"edm": Edm, "ddpm": Ddpm}


def trained(kind: str, rate: float, seed: int, store: Store, steps: int, folder: Path) -> Path:
    """The file of weights after `steps` steps of AdamW, the learning rate rising for 100 and falling as a cosine."""
    path = folder / f"{kind}-{rate:g}-{seed}.pt"
    if path.exists():
        return path
    torch.manual_seed(seed)
    model, generator = KINDS[kind](), torch.Generator().manual_seed(seed)
    sampler = WindowSampler(store, store.splits["train"], BATCH, model.context, seed=seed)
    optimizer = torch.optim.AdamW(decay_groups(model, 1e-2), lr=rate, fused=True)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bf16 = hardware.precision("auto") == "bf16-mixed"
    for k in range(steps):
        segment = store.read(sampler(k), model.context)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = model.loss(segment, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm.step()
        fall.step()
        if (k + 1) % max(1, steps // 4) == 0:
            print(f"{path.stem}: step {k + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    _save(path, model.state_dict())
    return path


def load_model(path: Path, calls: int, sampler: str) -> FramesOnly:
    """A model that `trained` wrote, in evaluation mode."""
    model = KINDS[path.stem.partition("-")[0]](calls, sampler)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval().requires_grad_(False)


def statistics(frames: Tensor) -> Tensor:
    """Mean, contrast and roughness of frames (..., C, H, W) uint8, in 8-bit levels: (..., 3).

    Contrast is the standard deviation over the pixels of a channel, roughness the mean difference of neighbours.
    """
    x = frames.float()
    rough = x.diff(dim=-1).abs().mean((-1, -2, -3)) + x.diff(dim=-2).abs().mean((-1, -2, -3))
    return torch.stack([x.mean((-1, -2, -3)), x.std((-1, -2)).mean(-1), rough / 2], -1)


def judge(film: Tensor, true: Tensor, usual: Tensor) -> dict[str, Tensor]:
    """By step (T,): PSNR on all pixels in dB, and how far the frames' statistics are from the data's, in levels.

    Args:
        film: (B, T, C, H, W) uint8.
        true: what happened.
        usual: (3,) mean statistics of the data.
    """
    error, count = squared_error(film, true)
    return {"psnr": psnr(error.sum(0), count.sum(0)), "drift": (statistics(film) - usual).abs().mean((0, 2)).double()}


def evidence(store: Store, folder: Path, steps: int, seeds: int, windows: int, horizon: int) -> dict[str, Any]:
    """Every figure of the comparison; pictures are written to `folder`.

    Args:
        store: of colour play.
        folder: of what is kept.
        steps: of each training.
        seeds: number of trainings with the chosen learning rate.
        windows: dreams judged.
        horizon: steps of a dream.
    """
    usual = statistics(store.read(window_starts(store, "train", 1, 500), 1).obs[:, 0]).mean(0)

    def dreamed(path: Path, calls: int, sampler: str, split: str, length: int) -> dict[str, Tensor]:
        window = store.read(window_starts(store, split, BURN_IN + horizon, windows), BURN_IN + length)
        model, generator = load_model(path, calls, sampler), torch.Generator().manual_seed(0)
        film = open_loop(model, window, BURN_IN, generator).obs
        return judge(film[:, 1:], window.obs[:, BURN_IN + 1 :], usual) | {"film": film[0]}

    make = partial(trained, store=store, steps=steps, folder=folder)
    chosen = {kind: _tuned(kind, make, partial(dreamed, split="validation", length=horizon // 4)) for kind in KINDS}
    found: dict[str, list[dict[str, Tensor]]] = {}
    for kind, (rate, samplers) in chosen.items():
        for calls in CALLS[kind]:
            for seed in range(seeds):
                path, kept = make(kind, rate, seed), folder / f"dreams-{kind}-{calls}-{seed}.pt"
                if not kept.exists():
                    _save(kept, dreamed(path, calls, samplers[min(calls, max(TUNED_ON))], "test", horizon))
                found.setdefault(f"{kind}_{calls}", []).append(torch.load(kept, weights_only=True))
    real = store.read(window_starts(store, "test", BURN_IN + horizon, windows), BURN_IN + horizon).obs[:, BURN_IN:]
    copied = judge(real[:, :1].expand_as(real[:, 1:]), real[:, 1:], usual)
    found |= {"copy_last": [copied], "real": [judge(real[:, 1:], real[:, 1:], usual)]}
    draw(folder, found, real[0])
    choices = {f"{kind}_learning_rate": rate for kind, (rate, _) in chosen.items()}
    return choices | {"ddpm_samplers": chosen["ddpm"][1]} | figures_of(found)


def _tuned(kind: str, make: Any, dreamed: Any) -> tuple[float, dict[int, str]]:
    """The learning rate, and the sampler for each number of calls, that give the best mean PSNR."""
    best: tuple[float, float, dict[int, str]] = (-torch.inf, 0.0, {})
    for rate in RATES:
        path = make(kind, rate, 0)
        kept = path.with_suffix(".validation.pt")
        if not kept.exists():
            runs = {f"{c}_{s}": dreamed(path, c, s)["psnr"].mean() for c in TUNED_ON for s in SAMPLERS[kind]}
            _save(kept, runs)
        scores = torch.load(kept, weights_only=True)
        print(f"{path.stem}: " + ", ".join(f"{name} {value:.2f} dB" for name, value in scores.items()), flush=True)
        samplers = {c: max(SAMPLERS[kind], key=lambda s: scores[f"{c}_{s}"]) for c in TUNED_ON}  # noqa: B023
        total = float(sum(scores[f"{c}_{s}"] for c, s in samplers.items()))
        best = max(best, (total, rate, samplers), key=lambda b: b[0])
    return best[1], best[2]


def figures_of(found: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> dict[str, Any]:
    """Means over seeds, and the range of the seeds, at the steps of `SHOWN`."""
    figures: dict[str, Any] = {"steps": [h for h in SHOWN if h <= len(found["real"][0]["drift"])]}
    at = torch.tensor(figures["steps"]) - 1
    for name, runs in found.items():
        for figure in ("psnr", "drift"):
            values = torch.stack([run[figure][at] for run in runs])
            unit = {"psnr": "db", "drift": "levels"}[figure]
            figures[f"{name}_{figure}_{unit}"] = plain(values.mean(0))
            figures[f"{name}_{figure}_range_{unit}"] = plain(torch.stack([values.amin(0), values.amax(0)], 1))
    return figures


def draw(folder: Path, found: Mapping[str, Sequence[Mapping[str, Tensor]]], real: Tensor) -> None:
    """ddpm.png, curves over the steps with the range of the seeds, and strip_ddpm.png, the first dream of each."""
    panels: dict[str, dict[str, Curve]] = {}
    for figure, title in {"psnr": "PSNR, dB", "drift": "statistics off by, levels"}.items():
        beside = {"psnr": "copy_last", "drift": "real"}[figure]  # the PSNR of what happened is without bound
        for kind in KINDS:
            curves = panels.setdefault(f"{kind.upper()}: {title}", {})
            for name in (n for n in found if n.startswith(kind) or n == beside):
                values = torch.stack([run[figure] for run in found[name]])
                x = list(range(1, values.shape[1] + 1))
                band = torch.stack([values.amin(0), values.amax(0)], 1).tolist()
                curves[name.replace("_", " ")] = (x, values.mean(0).tolist(), band)
    plot(folder / "ddpm.png", panels, "imagined step", "")
    films = {name.replace("_", " "): runs[0]["film"] for name, runs in found.items() if "film" in runs[0]}
    strip(folder / "strip_ddpm.png", {"real": real, **films}, (0, *SHOWN))


def _save(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        torch.save(content, temporary)

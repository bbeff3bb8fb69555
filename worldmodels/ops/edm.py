"""EDM diffusion as pure functions: noise levels, preconditioning, and a sampler over any denoiser callable.

Source: Karras et al. 2022 (EDM), with the offset noise that DIAMOND (Alonso et al. 2024, appendix) adds.
Images are float tensors (B, C, H, W) in [-1, 1]; sigma is the standard deviation of the noise on that scale.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worldmodels.types import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]
HIGH_RANGE = (1.0, 7.0)
SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


class Preconditioners(NamedTuple):
    """c_in, c_skip, c_out (B, 1, 1, 1) and c_noise (B,) of EDM table 1."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    c_noise: Tensor


def preconditioners(sigma: Tensor, sigma_data: float, sigma_offset: float = 0.0) -> Preconditioners:
    """Scalings that keep the network's input and target at unit variance (EDM section 5).

    Args:
        sigma: (B,) noise level.
        sigma_data: standard deviation of what the noise is added to.
        sigma_offset: standard deviation of the offset noise; it adds to sigma in quadrature, as in DIAMOND's code.
    """
    s = (sigma**2 + sigma_offset**2).sqrt()
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_in, c_out = 1 / (s**2 + sigma_data**2).sqrt(), s * c_skip.sqrt()
    per_image = (slice(None), None, None, None)
    return Preconditioners(c_in[per_image], c_skip[per_image], c_out[per_image], s.log() / 4)


def add_noise(x: Tensor, sigma: Tensor, sigma_offset: float, generator: torch.Generator | None = None) -> Tensor:
    """Noise an image: x + sigma n + sigma_offset o, n drawn per pixel and o per image and channel."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    offset = torch.randn(x.shape[:2], generator=generator, device=x.device, dtype=x.dtype)
    return x + sigma[:, None, None, None] * noise + sigma_offset * offset[:, :, None, None]


def training_sigmas(
    n: int,
    loc: float,
    scale: float,
    sigma_min: float,
    sigma_max: float,
    high_share: float = 0.0,
    high_range: tuple[float, float] = HIGH_RANGE,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise levels (n,) to train on: log-normal, and a share of them log-uniform over `high_range`.

    The log-normal alone is EDM's. The high share is for small budgets: motion is learned only where the noise hides
    the sprites, and the first network call of a sampler starts there.
    """
    normal = torch.randn(n, generator=generator, device=device)
    uniform = torch.rand(2, n, generator=generator, device=device)
    sigma = (normal * scale + loc).exp().clamp(sigma_min, sigma_max)
    low, high = map(math.log, high_range)
    return torch.where(uniform[0] < high_share, (low + (high - low) * uniform[1]).exp(), sigma)


def check_noise(noise: Mapping[str, Any], name: str) -> None:
    """Refuse settings that `training_sigmas` cannot take.

    Raises:
        UserError: a setting is missing or unknown, levels do not rise from above 0, or a share is outside 0..1.
    """
    needed, more = {"loc", "scale", "sigma_min", "sigma_max"}, {"high_share", "high_range"}
    if wrong := needed.difference(noise) | set(noise).difference(needed | more):
        raise UserError(
            f"{name} needs loc, scale, sigma_min and sigma_max and may have high_share and high_range, "
            f"but {min(wrong)!r} is {'missing' if min(wrong) in needed else 'unknown'}."
        )
    low, high = noise["sigma_min"], noise["sigma_max"]
    if not 0 < low <= high < math.inf:
        raise UserError(f"{name}.sigma_min={low} and sigma_max={high} must rise, and be above 0.")
    if not 0 <= (share := noise.get("high_share", 0.0)) <= 1:
        raise UserError(f"{name}.high_share={share} must be from 0 to 1.")
    if share and (len(span := list(noise.get("high_range", HIGH_RANGE))) != 2 or not low <= span[0] < span[1] <= high):
        raise UserError(
            f"{name}.high_range={span} must be two rising levels within sigma_min={low} to sigma_max={high}."
        )


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels of a sampler of `steps` network calls, (steps + 1,) float32 from sigma_max to 0 (EDM eq. 5).

    `karras_sigmas(3, 2e-3, 5.0)` is [5.0, 0.283082, 0.002, 0.0], DIAMOND's schedule.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)]).float()


class Churn(NamedTuple):
    """Noise that is added on the way (EDM algorithm 2): for 0 none is.

    Args:
        amount: S_churn, over all steps.
        low: S_tmin, the least noise level at which it is added.
        high: S_tmax, the greatest.
        noise: S_noise, its standard deviation.
    """

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def most(self, steps: int) -> float:
        """By what share of itself a noise level is raised, at most, where there are so many."""
        return min(self.amount / steps, math.sqrt(2) - 1)


NO_CHURN = Churn()


def sample(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    order: int = 1,
    churn: Churn = NO_CHURN,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Follow the probability-flow ODE from sigmas[0] to sigmas[-1] (EDM algorithm 1; with churn, algorithm 2).

    Args:
        denoise: maps noisy images (B, C, H, W) and sigma (B,) to the denoised images.
        x: (B, C, H, W) start, noise at level sigmas[0].
        sigmas: (steps + 1,) falling noise levels; where the last is 0 the last call's output is returned unchanged.
        order: 1 for Euler (one call a step), 2 for Heun (two, but one where the next level is 0).
        churn: noise added before each step.
        generator: of that noise.

    Raises:
        ValueError: if order is neither 1 nor 2.
    """
    if order not in (1, 2):
        raise ValueError(f"order is {order}; allowed are 1 (Euler) and 2 (Heun)")
    levels = sigmas.tolist()
    gamma = churn.most(len(levels) - 1)
    for sigma, after in zip(levels[:-1], levels[1:], strict=True):
        if gamma > 0 and churn.low <= sigma <= churn.high:
            raised = sigma * (1 + gamma)
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + churn.noise * math.sqrt(raised**2 - sigma**2) * noise
            sigma = raised
        denoised = denoise(x, x.new_full(x.shape[:1], sigma))
        if after == 0:
            # (x - D) / sigma * (0 - sigma) + x is D itself; returned as it is, so that an 8-bit frame stays one
            x = denoised
            continue
        slope = (x - denoised) / sigma
        x_next = x + slope * (after - sigma)
        if order == 2:
            slope_next = (x_next - denoise(x_next, x.new_full(x.shape[:1], after))) / after
            x_next = x + (slope + slope_next) / 2 * (after - sigma)
        x = x_next
    return x


def sample_with(scheduler: Any, denoise: Denoise, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The same by one of `diffusers_scheduler`.

    Args:
        scheduler: with its steps set; each frame needs a fresh one, since it counts its steps.
        denoise: as in `sample`.
        x: (B, C, H, W) start, noise at the scheduler's first level.
        generator: of its noise, where it adds any.
    """
    for sigma, t in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        denoised = denoise(x, x.new_full(x.shape[:1], sigma))
        scheduler.is_scale_input_called = True  # the denoiser scales its input itself
        x = scheduler.step(denoised, t, x, generator=generator).prev_sample
    return x


def diffusers_scheduler(
    name: str, steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0, **settings: Any
) -> Any:
    """One of diffusers' EDM schedulers, for a denoiser that has its own preconditioning (and its offset noise).

    What it is given is the denoised image, so that its `precondition_outputs`, which knows no offset noise, is the
    identity.

    Args:
        name: "EDMEulerScheduler" or "EDMDPMSolverMultistepScheduler" (DPM-Solver++ of order 2).
        steps: network calls.
        sigma_min: as in `karras_sigmas`.
        sigma_max: as in `karras_sigmas`.
        rho: as in `karras_sigmas`.
        settings: further arguments of the scheduler.

    Raises:
        ValueError: another name.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise ValueError(f"scheduler is {name!r}; allowed are {' and '.join(SCHEDULERS)}")

    class OfDenoised(getattr(diffusers, name)):  # pyrefly: ignore
        def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: Any) -> Tensor:
            return model_output

    scheduler = OfDenoised(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, **settings)
    scheduler.set_timesteps(steps)
    return scheduler

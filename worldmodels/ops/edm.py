"""EDM diffusion as pure functions: noise levels, preconditioning, and a sampler over any denoiser callable.

Source: Karras et al. 2022 (EDM), with the offset noise that DIAMOND (Alonso et al. 2024, appendix) adds.
Images are float tensors (B, C, H, W) in [-1, 1]; sigma is the standard deviation of the noise on that scale.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


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
    high_range: tuple[float, float] = (1.0, 7.0),
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


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels of a sampler of `steps` network calls, (steps + 1,) float32 from sigma_max to 0 (EDM eq. 5).

    `karras_sigmas(3, 2e-3, 5.0)` is [5.0, 0.283082, 0.002, 0.0], DIAMOND's schedule.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)]).float()


def sample(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor, order: int = 1) -> Tensor:
    """Follow the probability-flow ODE from sigmas[0] to sigmas[-1] (EDM algorithm 1, without churn).

    Args:
        denoise: maps noisy images (B, C, H, W) and sigma (B,) to the denoised images.
        x: (B, C, H, W) start, noise at level sigmas[0].
        sigmas: (steps + 1,) falling noise levels; where the last is 0 the last call's output is returned unchanged.
        order: 1 for Euler (one call a step), 2 for Heun (two, but one where the next level is 0).

    Raises:
        ValueError: if order is neither 1 nor 2.
    """
    if order not in (1, 2):
        raise ValueError(f"order is {order}; allowed are 1 (Euler) and 2 (Heun)")
    levels = sigmas.tolist()
    for sigma, after in zip(levels[:-1], levels[1:], strict=True):
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

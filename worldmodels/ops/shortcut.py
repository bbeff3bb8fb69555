"""Shortcut models as pure functions: one network call that jumps over several noise levels of a sampler.

Source: Frans et al. 2024, "One Step Diffusion via Shortcut Models" (arXiv 2410.12557), equations 3 to 5, carried from
flow matching over to the noise levels and the denoiser of EDM (Karras et al. 2022). Told how far it is to jump, from
level s to r, the denoiser gives the D with which the Euler step x_r = x_s + (x_s - D) (r - s) / s lands where two
jumps of half as far do. Without a jump it is EDM's denoiser, the slope of the flow at s itself.

Images are float tensors (B, C, H, W), levels (B,), falling and on the scale of `ops.edm`.
"""

import torch
from torch import Tensor

from worldmodels.ops.edm import Denoise


def jump_levels(jumps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels that `jumps` equal jumps visit, (jumps + 1,) float32 from sigma_max to 0.

    They are equally far apart on EDM's ramp (eq. 5), whose end, sigma_min, is taken for 0: so every second level of
    twice as many jumps is one of these, as `karras_sigmas` has it not. For 2 jumps they are [5.0, 0.283082, 0.0], the
    first two of DIAMOND's three.
    """
    ramp = torch.linspace(0, 1, jumps + 1, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    levels = (high + ramp * (low - high)) ** rho
    levels[-1] = 0
    return levels.float()


def land(x: Tensor, denoised: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
    """Where the Euler step from level sigma to level after leads (EDM algorithm 1, line 5)."""
    return denoised + (x - denoised) * (after / sigma)[:, None, None, None]


def jump_target(denoise: Denoise, x: Tensor, sigma: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """The D whose jump from sigma to after lands where two jumps by way of middle do (Frans et al. eq. 4).

    Args:
        denoise: maps images and their level to the D of a jump half as far.
        x: images at level sigma.
        sigma: level that they are at.
        middle: level between.
        after: level to arrive at; where it is 0 the target is what the second jump gives, as it is.
    """
    first = denoise(x, sigma)
    second = denoise(land(x, first, sigma, middle), middle)
    share = (sigma - middle) * after / (middle * (sigma - after))  # solves land(x, D, sigma, after) for D
    return torch.lerp(second, first, share[:, None, None, None])

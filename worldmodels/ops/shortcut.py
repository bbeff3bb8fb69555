"""Shortcut models as pure functions: one network call that jumps over several noise levels of a sampler.

Source: Frans et al. 2024, "One Step Diffusion via Shortcut Models" (arXiv 2410.12557), equations 3 to 5, carried from
flow matching over to the noise levels and the denoiser of EDM (Karras et al. 2022). Told how far it is to jump, from
level s to r, the denoiser gives the D with which the Euler step x_r = x_s + (x_s - D) (r - s) / s lands where two
jumps of half as far do. Without a jump it is EDM's denoiser, the slope of the flow at s itself.

Images are float tensors (B, C, H, W), levels (B,), falling and on the scale of `ops.edm`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from worldmodels.ops.edm import Denoise
from worldmodels.types import UserError


class FewStep(NamedTuple):
    """How a denoiser learns to do in one call, or a few, what its sampler does in many (see above).

    Args:
        doublings: one call is to do the work of 2**doublings.
        share: of the rows of a batch, learns jumps in place of denoising the true frame (Frans et al.: 1/4).
        sigma_min: of the sampler, as in `jump_levels`.
        sigma_max: of the sampler.
        rho: of the sampler.

    Raises:
        UserError: there is no doubling, or the share is none or all.
    """

    doublings: int = 2
    share: float = 0.25
    sigma_min: float = 2e-3
    sigma_max: float = 5.0
    rho: float = 7.0

    def check(self) -> "FewStep":
        """Itself, if its settings can be used; raises UserError otherwise."""
        if type(self.doublings) is not int or self.doublings < 1:
            raise UserError(f"denoiser.few_step.doublings is {self.doublings!r}; it must be a whole number above 0.")
        if not 0 < self.share < 1:
            raise UserError(f"denoiser.few_step.share is {self.share}; it must be between 0 and 1.")
        return self


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

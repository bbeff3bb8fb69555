"""Numbers as distributions over bins, so that a network learns them by cross-entropy whatever their scale.

Source: the two-hot code over symlog bins of Hafner et al. 2023 (DreamerV3), with the expectation taken over the bins
themselves, so that encoding keeps it.
"""

import math

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


def symlog_bins(doublings: int) -> Tensor:
    """Bins (2n + 1,) float32 of equal distance ln 2 in symlog: 0, +-1, +-3, +-7, ... +-(2^n - 1).

    With this distance the commonest rewards of games, 0, 1 and -1, are bins of their own.
    """
    return symexp(math.log(2) * torch.arange(-doublings, doublings + 1, dtype=torch.float64)).round().float()


def two_hot(x: Tensor, bins: Tensor) -> Tensor:
    """Weights (..., K) on the two bins around x (...), whose expectation is x; beyond the bins it is the outermost.

    Args:
        x: any shape.
        bins: (K,) rising, K >= 2.
    """
    x = x.to(bins.dtype).clamp(bins[0], bins[-1])
    upper = torch.searchsorted(bins, x.contiguous()).clamp(1, len(bins) - 1)
    share = (x - bins[upper - 1]) / (bins[upper] - bins[upper - 1])
    weights = torch.zeros(*x.shape, len(bins), dtype=bins.dtype, device=x.device)
    weights.scatter_(-1, upper[..., None] - 1, 1 - share[..., None])
    return weights.scatter_(-1, upper[..., None], share[..., None])


def expectation(probability: Tensor, bins: Tensor) -> Tensor:
    """What weights (..., K) on bins (K,) stand for: (...). Of `two_hot` it is the inverse."""
    return probability @ bins

"""Numbers as distributions over bins, so that a network learns them by cross-entropy whatever their scale.

Sources: the two-hot code over symlog bins of Hafner et al. 2023 (DreamerV3), with the expectation taken over the bins
themselves, so that encoding keeps it; HL-Gauss of Imani and White 2018 as in Farebrother et al. 2024 ("Stop
Regressing"), appendix A; the projection of Bellemare et al. 2017 (C51); h(x) of Pohlen et al. 2018 as MuZero has it.
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


def value_transform(x: Tensor, eps: float = 1e-3) -> Tensor:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + eps x, the square root that MuZero learns values and rewards in."""
    u = x.abs()
    return x.sign() * (u / ((u + 1).sqrt() + 1) + eps * u)


def inverse_value_transform(x: Tensor, eps: float = 1e-3) -> Tensor:
    """The inverse of `value_transform`.

    The usual form subtracts nearly equal numbers and errs by 1e-4 in float32 near 0. Here v = sqrt(|x| + 1) - 1 is the
    root of eps v^2 + (1 + 2 eps) v = |h|, written so that nothing cancels.
    """
    h, b = x.abs(), 1 + 2 * eps
    v = 2 * h / (b + (b * b + 4 * eps * h).sqrt())
    return x.sign() * v * (v + 2)


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
    return project(x[..., None], torch.ones_like(x, dtype=bins.dtype)[..., None], bins)


def project(values: Tensor, probability: Tensor, bins: Tensor) -> Tensor:
    """Weights (..., K) on `bins` of a distribution over other values, each shared by the two bins around it.

    This is C51's projection; of a single sure value it is the two-hot code. It keeps the expectation of what lies
    between the outermost bins.

    Args:
        values: (..., N), such as reward + discount * bins.
        probability: (..., N) of these values.
        bins: (K,) rising, K >= 2.
    """
    values = values.to(bins.dtype).clamp(bins[0], bins[-1])
    upper = torch.searchsorted(bins, values.contiguous()).clamp(1, len(bins) - 1)
    share = (values - bins[upper - 1]) / (bins[upper] - bins[upper - 1])
    weights = torch.zeros(*values.shape[:-1], len(bins), dtype=bins.dtype, device=values.device)
    weights.scatter_add_(-1, upper - 1, probability * (1 - share))
    return weights.scatter_add_(-1, upper, probability * share)


def hl_gauss(x: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Weights (..., K) on the bins between `edges` of a Gaussian around x (...), cut off at the outermost edges.

    With sigma of 0.75 bin widths the expectation over the bins' centres is x to 2e-6 of a bin further than 3 sigma from
    the ends, and is drawn inwards nearer to them. x beyond the edges counts as at them: the Gaussian's whole mass
    would lie outside, and 0 / 0 come out.

    Args:
        x: any shape.
        edges: (K + 1,) rising.
        sigma: standard deviation, in the unit of the edges.
    """
    x = x.to(edges.dtype).clamp(edges[0], edges[-1])
    below = torch.erf((edges - x[..., None]) / (math.sqrt(2) * sigma))
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])


def expectation(probability: Tensor, bins: Tensor) -> Tensor:
    """What weights (..., K) on bins (K,) stand for: (...). Of `two_hot` it is the inverse.

    A sum and no product of matrices, which autocast would take in half precision.
    """
    return (probability * bins).sum(-1)


def sign_probabilities(probability: Tensor, bins: Tensor) -> Tensor:
    """(..., 2): how much of the weights (..., K) lies on bins (K,) below 0, and how much on those above."""
    return torch.stack([(probability * side).sum(-1) for side in (bins < 0, bins > 0)], dim=-1)

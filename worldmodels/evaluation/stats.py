"""Intervals by bootstrap over episodes: windows of one game resemble each other, so whole games are drawn again.

Shapes: W windows (or rows), E episodes, R resamples; weights are (1 + R, W) and the first is the sample itself.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000


class Resamples(NamedTuple):
    """How often each episode was drawn, (1 + R, E) float64 with ones in the first row, and each row's episode (W,).

    It takes room by episodes; the weights of the rows would take a thousand times that of the rows.
    """

    counts: Tensor
    episode: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """The sum of `values` (W,) in each resample, (1 + R,) float64."""
        by_episode = self.counts.new_zeros(self.counts.shape[1]).index_add_(0, self.episode, values.double())
        return self.counts @ by_episode


def resample_episodes(episode: np.ndarray | Tensor, seed: int = 0) -> Resamples:
    """Draw as many episodes as there are, with replacement, R times.

    Args:
        episode: (W,) the episode of each window.
        seed: of the draws.
    """
    _, row = torch.unique(torch.as_tensor(episode), return_inverse=True)
    episodes = int(row.max()) + 1 if len(row) else 0
    if not episodes:
        return Resamples(torch.ones(1 + RESAMPLES, 0, dtype=torch.float64), row)
    draws = torch.randint(episodes, (RESAMPLES, episodes), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())
    return Resamples(torch.cat([torch.ones(1, episodes, dtype=torch.float64), counts]), row)


def episode_weights(episode: np.ndarray | Tensor, seed: int = 0) -> Tensor:
    """How often each window counts in each resample: (1 + R, W) float64; arguments as in `resample_episodes`."""
    counts, row = resample_episodes(episode, seed)
    return counts[:, row]


def weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    """(1 + R, ...) mean of `values` (W, ...) that are not NaN in every resample; NaN where there are none."""
    known = ~values.isnan()
    total = torch.tensordot(weights, values.double().nan_to_num(0), 1)
    return total / torch.tensordot(weights, known.double(), 1)


def interval(values: Tensor) -> list[Any]:
    """95 % intervals of `values` (1 + R, ...), [low, high] for each entry, as JSON wants them."""
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return plain(values[1:].nanquantile(ends, dim=0).movedim(0, -1))


def plain(values: Tensor) -> list[Any]:
    """Nested lists of numbers of four digits, None for NaN and infinity, as JSON wants them."""
    return [plain(v) if v.ndim else round(float(v), 4) if v.isfinite() else None for v in values]


def number(value: Tensor | float) -> float | None:
    """One number of four digits, None for NaN and infinity."""
    return plain(torch.as_tensor(value)[None])[0]

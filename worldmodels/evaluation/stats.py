"""Intervals by bootstrap, of figures over episodes and of scores over games and runs.

Windows of one game resemble each other, so whole episodes are drawn again; runs are drawn again within each game.

Shapes: W windows (or rows), E episodes, R resamples; weights are (1 + R, W) and the first is the sample itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmodels.types import UserError

RESAMPLES = 1000
SCORE_RESAMPLES = 2000


class Resamples(NamedTuple):
    """How often each episode was drawn, (1 + R, E) float64 with ones in the first row, and each row's episode (W,).

    It takes room by episodes; the weights of the rows would take a thousand times that of the rows.
    """

    counts: Tensor
    episode: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """The sum of `values` (W, ...) in each resample, (1 + R, ...) float64."""
        by_episode = self.counts.new_zeros(self.counts.shape[1], *values.shape[1:])
        return torch.tensordot(self.counts, by_episode.index_add_(0, self.episode, values.double()), 1)


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


def aggregate(scores: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """What an agent is worth over several games, as Agarwal et al. 2021 ("statistical precipice") recommend.

    Args:
        scores: (games, runs) normalised scores, one a run: 0 is random play, 1 a human's.
        seed: of the resamples.

    Returns:
        `mean` over all, `median` of the games' means, `iqm` (mean of the middle half of all runs), `optimality_gap`
        (mean of how far a run falls short of 1), and beside each its 95 % interval [low, high] as `mean_interval` and
        so on, by stratified bootstrap: runs are drawn again within their game, and the games stay. The intervals are
        None where there is one run a game.

    Raises:
        UserError: the scores are no table of finite numbers.
    """
    scores = _table(scores)
    names, values = ("mean", "median", "iqm", "optimality_gap"), _aggregates(*scores)
    ends = _stratified(scores, _aggregates, seed)
    figures: dict[str, Any] = {}
    for k, name in enumerate(names):
        figures |= {name: float(values[k]), f"{name}_interval": None if ends is None else [float(e[k]) for e in ends]}
    return figures


def probability_of_improvement(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How probable it is that a run of agent a scores higher than one of b in a game drawn at random; ties count half.

    Args:
        a: (games, runs) scores.
        b: (games, runs) scores in the same games; there may be more or fewer runs.
        seed: of the resamples.

    Returns:
        `probability_of_improvement` and its 95 % interval `probability_of_improvement_interval`, None where there is
        one run a game.

    Raises:
        UserError: the scores are no tables of finite numbers, or of different numbers of games.
    """
    a, b = _table(a), _table(b)
    if len(a) != len(b):
        raise UserError(f"scores of {len(a)} games and of {len(b)} cannot be compared; give those of the same games")

    def improvement(*games: np.ndarray, axis: int = -1) -> np.ndarray:
        x, y = np.stack(games[: len(a)])[..., :, None], np.stack(games[len(a) :])[..., None, :]
        return ((x > y) + 0.5 * (x == y)).mean((0, -2, -1))

    ends, name = _stratified([*a, *b], improvement, seed), "probability_of_improvement"
    return {name: float(improvement(*a, *b)), f"{name}_interval": None if ends is None else [float(e) for e in ends]}


def _table(scores: Any) -> np.ndarray:
    table = np.asarray(scores, float)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise UserError(f"scores must be finite numbers of shape (games, runs), not {table.shape}")
    return table


def _aggregates(*games: np.ndarray, axis: int = -1) -> np.ndarray:
    """The four figures (4, ...) of games (..., runs)."""
    from scipy.stats import trim_mean

    table = np.stack(games)
    runs = np.moveaxis(table, 0, -2).reshape(*table.shape[1:-1], -1)
    means = table.mean(-1)
    shortfall = 1 - np.minimum(runs, 1).mean(-1)
    return np.stack([means.mean(0), np.median(means, 0), trim_mean(runs, 0.25, axis=-1), shortfall])


def _stratified(games: Any, statistic: Callable[..., np.ndarray], seed: int) -> Any:
    """Ends of the 95 % interval of a statistic of several samples, each of which is drawn again by itself.

    None where a sample has one value only: there is nothing to draw.
    """
    from scipy.stats import bootstrap

    if any(len(runs) < 2 for runs in games):
        return None
    drawn = bootstrap(
        tuple(games), statistic, n_resamples=SCORE_RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    )
    return drawn.confidence_interval

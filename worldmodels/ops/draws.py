"""Random numbers that depend on what they are for, and not on when they are drawn."""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def row_gumbel(rows: np.ndarray, count: int, *key: int) -> Tensor:
    """Standard Gumbel noise of rows: a function of the key, the row's number and the place alone.

    Args:
        rows: (N,) int64 of at least 0.
        count: numbers a row, A.
        key: whole numbers of at least 0, such as a seed and the number of a pass.

    Returns:
        (N, A) float32.
    """
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    counter = rows.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    bits = mixed(word ^ mixed((counter + np.uint64(1)) * _GOLDEN))
    uniform = ((bits >> np.uint64(40)).astype(np.float64) + 0.5) / 2**24
    return torch.from_numpy(-np.log(-np.log(uniform))).float()


def mixed(x: np.ndarray) -> np.ndarray:
    """64 bits that each depend on every bit of `x`: the last steps of the generator SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""A permutation of 0..n-1 that a key decides and that takes no memory: a shuffled list without the list."""

from math import isqrt

import numpy as np

from worldmodels.ops.draws import mixed

_ROUNDS = 8  # fewer leave traces of the order where n is a handful


def permuted(index: np.ndarray, size: int, key: int, number: int) -> np.ndarray:
    """What stands at places `index` of a shuffled 0..size-1.

    A Feistel network permutes a rectangle of hardly more than `size` integers; where it leads outside, it is walked on
    until it comes back inside (Black and Rogaway 2002: generalised Feistel ciphers and cycle-walking).

    Args:
        index: (n,) integers below `size`.
        size: how many integers are shuffled, at least one.
        key: non-negative; with `number` it decides the permutation.
        number: which one of the key's permutations, non-negative.

    Returns:
        (n,) int64.
    """
    keys = np.random.SeedSequence((key, number)).generate_state(_ROUNDS, np.uint64)
    width = isqrt(size - 1) + 1
    height = -(-size // width)
    out = np.asarray(index).astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        out[outside] = _feistel(out[outside], np.uint64(height), np.uint64(width), keys)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, height: np.uint64, width: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A bijection of the integers below height * width: row and column in turn are moved by what the other one says."""
    row, column = x // width, x % width
    for k in range(0, _ROUNDS, 2):
        row = (row + mixed(column ^ keys[k]) % height) % height
        column = (column + mixed(row ^ keys[k + 1]) % width) % width
    return row * width + column

"""Drawing in proportion to priorities that a learner changes while it trains, in blocks of neighbouring windows."""

from collections import deque
from typing import Any

import numpy as np
import torch

from worldmodels.types import UserError

BLOCK = 64  # windows that share one priority by default: neighbours overlap, and the tree stays small


class SumTree:
    """Float32 sums over the leaves of a binary tree, so that drawing and changing cost the logarithm of its size.

    Node i has the children 2i and 2i + 1, node 1 is the root, and the n leaves are nodes n to 2n - 1 (at two depths
    where n is no power of two). A sum is always added up from below, so that rounding does not gather.

    Args:
        leaves: (n,) float32, none negative.
    """

    def __init__(self, leaves: np.ndarray) -> None:
        n = len(leaves)
        self._tree = np.zeros(2 * n, np.float32)
        self._tree[n:] = leaves
        stop = n
        while stop > 1:  # level by level, the deepest first
            start = 1 << ((stop - 1).bit_length() - 1)
            below = self._tree[2 * start : 2 * stop]
            np.add(below[::2], below[1::2], out=self._tree[start:stop])
            stop = start

    @property
    def leaves(self) -> np.ndarray:
        """(n,) float32, to be read only."""
        return self._tree[len(self._tree) // 2 :]

    @property
    def total(self) -> float:
        """Sum of all leaves."""
        return float(self._tree[1])

    def set(self, index: np.ndarray, values: np.ndarray) -> None:
        """Make `values` (m,) the leaves `index` (m,), which differ."""
        n = len(self._tree) // 2
        nodes = index + n
        self._tree[nodes] = values
        for _ in range((n - 1).bit_length()):  # from the deepest leaf to the root, which others reach a step before
            nodes = np.maximum(nodes >> 1, 1)
            self._tree[nodes] = self._tree[2 * nodes] + self._tree[2 * nodes + 1]

    def find(self, points: np.ndarray) -> np.ndarray:
        """The leaves (m,) in which `points` (m,) of [0, total) lie when they are laid end to end; none is zero."""
        n = len(self._tree) // 2
        nodes, points = np.ones(len(points), np.int64), points.astype(np.float64)
        for _ in range(n.bit_length() - 1):  # to the highest leaves
            nodes = self._descend(nodes, points)
        return np.where(nodes < n, self._descend(np.minimum(nodes, n - 1), points), nodes) - n

    def _descend(self, nodes: np.ndarray, points: np.ndarray) -> np.ndarray:
        """The children of `nodes` in which `points` lie, which are changed to what they are in those."""
        left = 2 * nodes
        mass = self._tree[left]
        # rounding may put a point past its node's sum, but must not lead to a leaf that is never to be drawn
        right = (points >= mass) & (self._tree[left + 1] > 0)
        points -= mass * right
        return left + right


class Priorities:
    """Windows drawn in proportion to priority ** alpha, with importance weights (Schaul et al. 2016).

    The windows of a block share the mean of the priorities that came last for any of them, 1 before that. Batches are
    drawn ahead of training, so what a learner says of batch n counts from batch n + `lag` on, never before, whatever
    the timing: batch k is a function of (seed, rank, k) and the updates of batches 0 to k - lag.

    Args:
        windows: number of windows.
        alpha: 0 is uniform, 1 in proportion to the priorities.
        beta: 0 is no importance weight, 1 makes up for the priorities in full.
        beta_batches: over which `beta` grows evenly to 1, as published; None keeps it.
        lag: at least the greatest number of batches between drawing one and updating it.
        block: windows in a block; 8 bytes of memory each.

    Raises:
        UserError: alpha, beta, beta_batches or block is out of range.
    """

    def __init__(
        self,
        windows: int,
        alpha: float,
        beta: float,
        lag: int,
        block: int = BLOCK,
        beta_batches: int | None = None,
    ) -> None:
        if not (0 <= alpha < np.inf and 0 <= beta < np.inf):
            raise UserError(f"data.priority.alpha={alpha} and beta={beta} must be numbers of 0 or more")
        if type(block) is not int or block < 1:
            raise UserError(f"data.priority.block={block} must be a whole number of at least 1")
        if beta_batches is not None and (type(beta_batches) is not int or beta_batches < 1 or not beta <= 1):
            raise UserError(
                f"data.priority.beta_batches={beta_batches} must be a whole number of batches of at least 1, with a "
                f"beta of at most 1 to grow from and not {beta}, or null"
            )
        self._beta_batches = beta_batches
        self._windows, self._alpha, self._beta, self._lag, self._block = windows, alpha, beta, lag, block
        sizes = np.full(-(-windows // block), block, np.float32)
        sizes[-1:] = self._sizes(np.array([len(sizes) - 1]))
        self._tree = SumTree(sizes)
        self._waiting: deque[tuple[int, np.ndarray, np.ndarray]] = deque()  # batch, blocks, leaves
        self._applied: deque[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = deque()  # with the former leaves

    def draw(self, k: int, rng: np.random.Generator, size: int) -> np.ndarray:
        """Windows (size,) int64 of batch `k`; the batches are drawn in order."""
        while self._waiting and self._waiting[0][0] <= k - self._lag:
            number, blocks, leaves = self._waiting.popleft()
            self._applied.append((number, blocks, leaves, self._tree.leaves[blocks]))
            self._tree.set(blocks, leaves)
        block = self._tree.find(rng.random(size) * self._tree.total)
        return block * self._block + rng.integers(self._sizes(block))

    def importance(self, k: int, windows: np.ndarray) -> np.ndarray:
        """Weights (B,) float32 of the `windows` of batch `k`, which was drawn last; the greatest of them is 1."""
        grown = 0.0 if self._beta_batches is None else min(1.0, k / self._beta_batches)
        block = windows // self._block
        chance = self._tree.leaves[block].astype(np.float64) / self._sizes(block) / self._tree.total
        weights = (self._windows * chance) ** -(self._beta + grown * (1 - self._beta))
        return (weights / weights.max()).astype(np.float32)

    def update(self, k: int, windows: np.ndarray, priorities: np.ndarray) -> None:
        """Take the `priorities` (B,) of the `windows` (B,) of batch `k`.

        Raises:
            UserError: a priority is not a finite number above 0, with which it would never be drawn again.
        """
        fine = np.isfinite(priorities) & (priorities > 0)
        if not fine.all():
            raise UserError(
                f"batch {k} was given a priority of {priorities[~fine][0]}; priorities are finite and above 0, so add "
                "a small constant to them"
            )
        blocks, place, count = np.unique(windows // self._block, return_inverse=True, return_counts=True)
        mean = np.bincount(place, priorities) / count
        self._waiting.append((k, blocks, (mean**self._alpha * self._sizes(blocks)).astype(np.float32)))
        while self._applied and self._applied[0][0] <= k - self._lag:
            self._applied.popleft()  # batch k is out, so nothing goes back behind it

    def rewind(self, k: int) -> None:
        """Take back what only batches after `k` were to see, so that `k` is drawn next."""
        while self._applied and self._applied[-1][0] > k - self._lag:
            number, blocks, leaves, former = self._applied.pop()
            self._tree.set(blocks, former)
            self._waiting.appendleft((number, blocks, leaves))

    def state_dict(self, k: int) -> dict[str, Any]:
        """Tensors and plain numbers, for going on with batch `k`."""
        self.rewind(k)
        waiting = [(n, torch.from_numpy(b), torch.from_numpy(v)) for n, b, v in self._waiting]
        return {"leaves": torch.from_numpy(self._tree.leaves.copy()), "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            UserError: it is of another number of windows.
        """
        if len(state["leaves"]) != len(self._tree.leaves):
            raise UserError(
                f"the checkpoint has priorities of {len(state['leaves'])} blocks of windows and the data has "
                f"{len(self._tree.leaves)}; resume on the data and window length that it was trained on, or begin anew"
            )
        self._tree = SumTree(state["leaves"].numpy())
        self._waiting = deque((n, b.numpy(), v.numpy()) for n, b, v in state["waiting"])
        self._applied.clear()

    def _sizes(self, blocks: np.ndarray) -> np.ndarray:
        """Number of windows in each block: the last one may be smaller."""
        return np.minimum(self._block, self._windows - blocks * self._block)

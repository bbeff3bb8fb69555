"""How things went on after each row of a log: the rewards of the next steps, which no window is long enough to tell."""

from dataclasses import replace

import numpy as np
import torch

from worldmodels.data.mixing import Mixture
from worldmodels.data.store import Store
from worldmodels.types import Segment


class Outcomes:
    """Adds `side["ahead"]` (B, T) float32 to windows: the sum of the rewards of a row and of those after it.

    Args:
        store: where windows are read from.
        steps: how many rows are summed, its own among them; fewer where the episode ends before. Padding has 0.
    """

    def __init__(self, store: Store | Mixture, steps: int) -> None:
        lengths = store.lengths
        self._first = np.concatenate([[0], lengths.cumsum()])
        reward = store.column("reward")[: self._first[-1]]
        total = np.concatenate([[0.0], reward.cumsum(dtype=np.float64)])
        rows, ends = np.arange(len(reward)), np.repeat(self._first[1:], lengths)
        self._ahead = (total[np.minimum(rows + steps, ends)] - total[rows]).astype(np.float32)

    def __call__(self, segment: Segment, starts: np.ndarray) -> Segment:
        """The windows read at `starts` (B, 2) int64, with the column."""
        begin, end = self._first[starts[:, 0]], self._first[starts[:, 0] + 1]
        rows = begin[:, None] + starts[:, 1:] + np.arange(segment.length)
        inside = (rows >= begin[:, None]) & (rows < end[:, None])
        ahead = np.where(inside, self._ahead[np.where(inside, rows, 0)], np.float32(0))
        return replace(segment, side={**segment.side, "ahead": torch.from_numpy(ahead)})

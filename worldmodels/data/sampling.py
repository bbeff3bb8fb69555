"""Which windows make batch k: a pure function of (seed, rank, world size, k), so that resuming needs one number."""

from collections.abc import Sequence

import numpy as np

from worldmodels.data.segments import TERMINATED
from worldmodels.data.store import Store
from worldmodels.types import UserError


class WindowSampler:
    """Draws batches of windows from chosen episodes, uniformly over all windows, or around events.

    A window starts at `left_padding` steps before its episode at the earliest, and ends with it at the latest (where
    the episode is long enough).

    Args:
        store: the store; what it holds now is what is drawn from.
        episodes: (n,) numbers of the episodes to draw from.
        batch_size: windows a batch.
        length: transitions T a window.
        left_padding: how many steps before its episode a window may start, below `length`.
        event_share: share of the batch that is drawn around a row with a nonzero reward or a termination, at a random
            place in the window; all of it is uniform where there is no such row.
        seed: of the stream of batches.
        rank: of this process; every rank draws its own batches.
        world: number of processes.

    Raises:
        UserError: there are no episodes, or a setting is out of range.
    """

    def __init__(
        self,
        store: Store,
        episodes: Sequence[int] | np.ndarray,
        batch_size: int,
        length: int,
        left_padding: int = 0,
        event_share: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not len(episodes):
            raise UserError(f"the store {store.path} has no episodes to draw from; collect more of them")
        if batch_size < 1 or length < 1 or not 0 <= left_padding < length or not 0 <= event_share <= 1:
            raise UserError(
                f"batch_size={batch_size}, length={length}, left_padding={left_padding}, event_share={event_share} do"
                " not fit: at least one window of one transition, 0 <= left_padding < length, 0 <= event_share <= 1"
            )
        self.episodes = np.asarray(episodes, np.int64)
        self.batch_size, self.length, self.left_padding = batch_size, length, left_padding
        self.last = _last_start(store.lengths[self.episodes], length, -left_padding)
        self._windows = (self.last + left_padding + 1).cumsum()
        self._key = [seed % 2**64, rank + (world << 32)]
        self._events = _event_rows(store, self.episodes) if event_share else np.zeros((0, 2), np.int64)
        self._n_events = round(event_share * batch_size) if len(self._events) else 0

    def __call__(self, k: int) -> np.ndarray:
        """Windows of batch `k`: (B, 2) int64, episode and first step."""
        # the batch number is not in word 0 of the counter, which drawing counts up: batches would share their draws
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=[0, k, 0, 0]))
        window = rng.integers(self._windows[-1], size=self.batch_size - self._n_events)
        which = np.searchsorted(self._windows, window, side="right")
        start = self.last[which] - (self._windows[which] - 1 - window)
        uniform = np.stack([which, start], 1)
        which, row = self._events[rng.integers(max(1, len(self._events)), size=self._n_events)].T
        start = row - rng.integers(self.length, size=self._n_events)
        events = np.stack([which, np.clip(start, -self.left_padding, self.last[which])], 1)
        starts = np.concatenate([events, uniform])
        starts[:, 0] = self.episodes[starts[:, 0]]
        return starts


def even_windows(store: Store, episodes: Sequence[int] | np.ndarray, count: int, length: int) -> np.ndarray:
    """Fixed windows, evenly spaced over all that lie wholly inside the episodes: (at most `count`, 2) int64.

    An episode shorter than `length` counts with its one padded window.
    """
    episodes = np.asarray(episodes, np.int64)
    windows = (_last_start(store.lengths[episodes], length, 0) + 1).cumsum()
    total = int(windows[-1]) if len(windows) else 0
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
    which = np.searchsorted(windows, chosen, side="right")
    return np.stack([episodes[which], chosen - np.concatenate([[0], windows])[which]], 1)


def _last_start(lengths: np.ndarray, length: int, first: int) -> np.ndarray:
    return np.maximum(lengths - length, first)


def _event_rows(store: Store, episodes: np.ndarray) -> np.ndarray:
    """(position in `episodes`, step) of each row with a nonzero reward or a termination, (n, 2) int64."""
    rows = np.flatnonzero((store.column("reward") != 0) | (store.column("flags") & TERMINATED > 0))
    episode = np.searchsorted(store.offsets, rows, side="right") - 1
    place = np.full(len(store.lengths), -1)
    place[episodes] = np.arange(len(episodes))
    events = np.stack([place[episode], rows - store.offsets[episode]], 1)
    return events[events[:, 0] >= 0]

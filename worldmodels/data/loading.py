"""Batches that are read while the learner is busy with the last one, by one thread or by worker processes."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from worldmodels.data.outcomes import Outcomes
from worldmodels.data.store import Store
from worldmodels.types import PER_WINDOW, Segment, UserError

Relabel = Callable[[Segment, np.ndarray, Store, np.random.Generator], Segment]
"""What adds goals to a batch, given its windows, the store and all randomness; see `relabel.future_goals`."""


class Windows(Dataset):
    """batch(0) to batch(length - 1)."""

    def __init__(self, batch: Callable[[int], Segment], length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Segment:
        return self.batch(index)


class Draw(NamedTuple):
    """What a batch is made of: windows (B, 2) int64, their importance weights (B,) float32, chance for relabelling."""

    starts: np.ndarray
    importance: np.ndarray | None
    rng: np.random.Generator


class Reader(Dataset):
    """Reads the batch that a draw asks for; any thread or process may do so.

    Args:
        store: read from.
        length: transitions a window.
        relabel: called on every batch.
        outcomes: tells what rows led to.
        keep_starts: tell where windows begin, in `side["starts"]`, also where they are not drawn by priority.
        lengths: (E,) how many rows of each episode are read, as if it had been cut behind them; by default all.
    """

    def __init__(
        self,
        store: Any,
        length: int,
        relabel: Relabel | None,
        outcomes: Outcomes | None = None,
        keep_starts: bool = False,
        lengths: np.ndarray | None = None,
    ) -> None:
        self.store, self.length, self.relabel = store, length, relabel
        self.outcomes, self.keep_starts, self.lengths = outcomes, keep_starts, lengths

    def read(self, draw: Draw) -> Segment:
        """The batch, with what is asked for beside it."""
        segment = self.store.read(draw.starts, self.length)
        if self.lengths is not None:
            _cut(segment, draw.starts, self.lengths)
        if draw.importance is not None:
            segment.side["importance"] = torch.from_numpy(draw.importance)
        if draw.importance is not None or self.keep_starts:
            segment.side["starts"] = torch.from_numpy(draw.starts)
        if self.outcomes:
            segment = self.outcomes(segment, draw.starts)
        return self.relabel(segment, draw.starts, self.store, draw.rng) if self.relabel else segment

    def __getitem__(self, draw: Draw) -> Segment | UserError:
        """As `read`, for a worker: torch would send a raised exception on as a page of text."""
        try:
            return self.read(draw)
        except UserError as error:
            return error


def _cut(segment: Segment, starts: np.ndarray, lengths: np.ndarray) -> None:
    """Make what is behind the first rows of an episode, and the frame after them, padding; in place, and by numpy.

    Args:
        segment: windows as read.
        starts: (B, 2) int64, where they were read.
        lengths: (E,) int64, rows of each episode that stay.
    """
    behind = starts[:, 1:] + np.arange(segment.length + 1) - lengths[starts[:, 0], None]  # the first such row is 0
    segment.obs.numpy()[behind > 0] = 0
    columns = [segment.action, segment.reward, segment.terminated, segment.truncated, segment.mask, segment.next_mask]
    for column in columns + [values for name, values in segment.side.items() if name not in PER_WINDOW]:
        column.numpy()[behind[:, :-1] >= 0] = 0


class Batches(IterableDataset):
    """One batch for each of `draws`, several of them read early; draws are made by who iterates, in order."""

    def __init__(
        self, draws: Callable[[], Iterator[Draw]], reader: Reader, ahead: int, workers: int, pin: bool
    ) -> None:
        self.draws, self.reader, self.ahead, self.workers, self.pin = draws, reader, ahead, workers, pin

    def __iter__(self) -> Iterator[Segment]:
        return self._by_workers() if self.workers else self._by_thread()

    def _by_thread(self) -> Iterator[Segment]:
        draws = self.draws()
        with ThreadPoolExecutor(1, "read-ahead") as thread:
            waiting = deque(thread.submit(self._read, next(draws)) for _ in range(self.ahead))
            while True:
                segment = waiting.popleft().result()
                waiting.append(thread.submit(self._read, next(draws)))
                yield segment

    def _read(self, draw: Draw) -> Segment:
        return self._pinned(self.reader.read(draw))

    def _by_workers(self) -> Iterator[Segment]:
        loader = DataLoader(
            self.reader,
            sampler=self.draws(),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=self.ahead,
            multiprocessing_context="fork",  # they share the open stores, which hold no position
            generator=torch.Generator(),  # workers use no seed, and drawing one must not change the training's
        )
        for segment in loader:
            if isinstance(segment, UserError):
                raise segment
            yield self._pinned(segment)

    def _pinned(self, segment: Segment) -> Segment:
        return segment.map(torch.Tensor.pin_memory) if self.pin else segment

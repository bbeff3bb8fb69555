"""Which windows make batch k: a pure function of (seed, rank, world size, k), so that resuming needs one number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from worldmodels.data.mixing import Mixture
from worldmodels.data.permutation import permuted
from worldmodels.data.priorities import BLOCK, Priorities
from worldmodels.data.scan import episode_returns, event_steps
from worldmodels.data.store import Store
from worldmodels.data.weights import ALIKE, Choice, EpisodeWeights, checked
from worldmodels.types import UserError


class WindowSampler:
    """Draws batches of windows from chosen episodes: uniformly over all windows, or as the settings say.

    A window starts at `left_padding` steps before its episode at the earliest, and ends `right_padding` steps behind it
    at the latest (where the episode is long enough).

    Args:
        store: the store, or several in one; what it holds now is what is drawn from.
        episodes: (n,) numbers of the episodes to draw from.
        batch_size: windows a batch.
        length: transitions T a window.
        left_padding: how many steps before its episode a window may start, below `length`.
        event_share: share of the batch that is drawn around a row with a nonzero reward or a termination, at a random
            place in the window, as `share_before` has it; all is drawn as the rest where there is no such row.
        seed: of the stream of batches.
        rank: of this process; every rank draws its own batches.
        world: number of processes.
        replacement: false walks through all windows, each once a pass over all ranks, in an order that the seed and
            the number of the pass decide; the share around events is drawn besides.
        weights: of games, recent and successful episodes, as `EpisodeWeights` has them.
        games: (n,) number of the game that each of `episodes` is of; by default all are of one.
        priority: `alpha`, `beta`, `beta_batches` and `block` of `Priorities`, which are off where `alpha` is None. Only
            with a beta that stays 0 there may be a share around events as well, of which importance weights know
            nothing.
        lag: of `Priorities`.
        right_padding: how many steps behind its episode a window may end, below `length`.
        event_rows: only the last so many rows of a window hold the event that it is drawn around, where those before
            are for a model's memory alone; by default all.
        lengths: (E,) how many rows of each episode of the store are drawn from, its first ones; by default all. A
            weight by `return` is still by that of the whole episode.

    Raises:
        UserError: there are no episodes, or settings are out of range or do not go together.
    """

    def __init__(
        self,
        store: Store | Mixture,
        episodes: Sequence[int] | np.ndarray,
        batch_size: int,
        length: int,
        left_padding: int = 0,
        event_share: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        replacement: bool = True,
        weights: Mapping[str, float | None] | None = None,
        games: np.ndarray | None = None,
        priority: Mapping[str, Any] | None = None,
        lag: int = 1,
        event_rows: int | None = None,
        right_padding: int = 0,
        lengths: np.ndarray | None = None,
    ) -> None:
        if not len(episodes):
            raise UserError(f"the store {store.path} has no episodes to draw from; collect more of them")
        padded = 0 <= left_padding < length and 0 <= right_padding < length
        if batch_size < 1 or length < 1 or not padded or not 0 <= event_share <= 1:
            raise UserError(
                f"batch_size={batch_size}, length={length}, left_padding={left_padding}, right_padding={right_padding},"
                f" event_share={event_share} do not fit: at least one window of one transition, 0 <= left_padding <"
                " length, 0 <= right_padding < length, 0 <= event_share <= 1"
            )
        event_rows = length if event_rows is None else min(event_rows, length)
        if event_rows < 1:
            raise UserError(f"event_rows={event_rows} does not fit: at least 1, or null for the whole window")
        priority = {"alpha": None, "beta": None, "beta_batches": None, "block": BLOCK, **(priority or {})}
        prioritised = priority["alpha"] is not None
        given = checked(weights or {})
        alike = given["games"] is None and given == ALIKE
        weighed_events = event_share and (priority["beta"] or priority["beta_batches"])
        if (prioritised and (weighed_events or not replacement)) or not (alike or (replacement and not prioritised)):
            raise UserError(
                "data.priority and data.replacement=false each decide alone what is drawn: with either there are no "
                "data.weights, with priorities no data.event_share unless data.priority.beta=0, and not both of them"
            )
        order = np.argsort(episodes)
        self.episodes = np.asarray(episodes, np.int64)[order]
        self.batch_size, self.length, self.left_padding, self.event_rows = batch_size, length, left_padding, event_rows
        rows = (store.lengths if lengths is None else lengths)[self.episodes]
        self._last = _last_start(rows + right_padding, length, -left_padding)
        games = np.zeros(len(order), np.int64) if games is None else np.asarray(games)[order]
        counts = self._last + left_padding + 1
        returns = episode_returns(store)[self.episodes] if weights and weights.get("return") else None
        weigh = EpisodeWeights(counts, games, returns, weights or {})
        self._windows = Choice(counts, weigh.of(counts))
        self._event_share = 0.0
        counts, self._steps = event_steps(store, self.episodes) if event_share else (np.zeros(0, np.int64), np.zeros(0))
        if lengths is not None and event_share:
            of = np.arange(len(rows)).repeat(counts)
            there = self._steps < rows[of]
            counts, self._steps = np.bincount(of[there], minlength=len(rows)), self._steps[there]
        if len(self._steps):
            self._events, self._event_share = Choice(counts, weigh.of(counts)), event_share
        self._seed, self._rank, self._world, self._walks = seed % 2**64, rank, world, not replacement
        self.priorities: Priorities | None = None
        if prioritised:
            self.priorities = Priorities(self._windows.size, lag=lag, **priority)

    def __call__(self, k: int) -> np.ndarray:
        """Windows of batch `k`: (B, 2) int64, episode and first step."""
        rng, before = self.generator(k), share_before(self._event_share, self.batch_size, k)
        events = share_before(self._event_share, self.batch_size, k + 1) - before
        size = self.batch_size - events
        if self.priorities:
            which, window = self._windows.find(self.priorities.draw(k, rng, size))
        elif self._walks:
            which, window = self._windows.find(self._walked(k * self.batch_size - before, size))
        else:
            which, window = self._windows(rng, size)
        starts = np.stack([which, window - self.left_padding], 1)
        if events:
            which, event = self._events(rng, events)
            row = self.length - self.event_rows + rng.integers(self.event_rows, size=events)
            start = self._steps[self._events.number(which, event)] - row
            around = np.stack([which, np.clip(start, -self.left_padding, self._last[which])], 1)
            starts = np.concatenate([around, starts])
        starts[:, 0] = self.episodes[starts[:, 0]]
        return starts

    def generator(self, k: int, stream: int = 0) -> np.random.Generator:
        """Random numbers for batch `k`; those of stream 0 choose the windows."""
        key = [self._seed, self._rank + (self._world << 32)]
        # the batch number is not in word 0 of the counter, which drawing counts up: batches would share their draws
        return np.random.Generator(np.random.Philox(key=key, counter=[0, k, stream, 0]))

    def windows(self, starts: np.ndarray) -> np.ndarray:
        """Numbers (B,) of the windows at `starts` (B, 2), among all that can be drawn."""
        which = np.searchsorted(self.episodes, starts[:, 0])
        return self._windows.number(which, starts[:, 1] + self.left_padding)

    def _walked(self, before: int, size: int) -> np.ndarray:
        """The next `size` of a walk through all windows, as often as it takes, of which each rank has had `before`."""
        place = before * self._world + self._rank * size + np.arange(size)
        number, place = np.divmod(place, self._windows.size)
        for n in np.unique(number):
            place[number == n] = permuted(place[number == n], self._windows.size, self._seed, int(n))
        return place


def share_before(share: float, size: int, k: int) -> int:
    """How many windows of the first `k` batches, of `size` each, make a share of them, to within one window.

    A batch has what is between two of these: the same number in all where the share of one is whole, and otherwise
    sometimes one more, so that a share of less than one window is not none.
    """
    exact = share * size
    return k * round(exact) if math.isclose(exact, round(exact)) else math.floor(k * exact)


def even_windows(
    store: Store | Mixture,
    episodes: Sequence[int] | np.ndarray,
    count: int,
    length: int,
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """Fixed windows, evenly spaced over all that lie wholly inside the episodes: (at most `count`, 2) int64.

    An episode shorter than `length` counts with its one padded window. Of each the first `lengths` rows (E,) are used,
    by default all.
    """
    episodes = np.asarray(episodes, np.int64)
    windows = Choice(_last_start((store.lengths if lengths is None else lengths)[episodes], length, 0) + 1)
    total = windows.size if len(episodes) else 0
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
    which, start = windows.find(chosen)
    return np.stack([episodes[which], start], 1)


def shared_windows(
    store: Store | Mixture,
    games: np.ndarray,
    episodes: np.ndarray,
    count: int,
    length: int,
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """As `even_windows` of each game alike, one at least, and so that every batch of them is of all games.

    Args:
        store: of the episodes.
        games: (n,) int64, number of the game of each.
        episodes: (n,) int64.
        count: windows at most, where it is not less than there are games.
        length: of each.
        lengths: as in `even_windows`.
    """
    each, left = divmod(count, max(1, len(np.unique(games))))
    shares = [(episodes[games == game], max(1, each + (k < left))) for k, game in enumerate(np.unique(games))]
    parts = [even_windows(store, mine, share, length, lengths) for mine, share in shares]
    place = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
    return np.concatenate(parts)[place.argsort(kind="stable")]


def _last_start(lengths: np.ndarray, length: int, first: int) -> np.ndarray:
    return np.maximum(lengths - length, first)

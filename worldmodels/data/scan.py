"""Looks through whole stores, one segment in memory at a time: where something happens, and what episodes gave."""

from collections.abc import Iterator

import numpy as np

from worldmodels.data.mixing import Mixture
from worldmodels.data.segments import TERMINATED, read_attributes, read_column
from worldmodels.data.store import Store


def event_steps(store: Store | Mixture, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows with a nonzero reward or a termination, 4 bytes each.

    Args:
        store: one store, or several in one.
        episodes: (n,) int64, numbers of episodes, sorted.

    Returns:
        Number of such rows in each episode (n,) int64, and their steps, int32, one episode after another.
    """
    counts, steps = np.zeros(len(episodes), np.int64), [np.zeros(0, np.int32)]
    for member, first, offsets in _members(store):
        for rows in _event_rows(member, offsets):
            episode = np.searchsorted(offsets, rows, side="right") - 1
            place = np.searchsorted(episodes, episode + first)
            mine = episodes[np.minimum(place, len(episodes) - 1)] == episode + first
            counts += np.bincount(place[mine], minlength=len(episodes))
            steps.append((rows - offsets[episode])[mine].astype(np.int32))
    return counts, np.concatenate(steps)


def episode_returns(store: Store | Mixture) -> np.ndarray:
    """Sum of the rewards of each episode, (E,) float64."""
    returns: list[float] = []
    for member, first, offsets in _members(store):
        for path in member.segments_now():
            returns += read_attributes(path)["returns"]
        del returns[first + len(offsets) - 1 :]  # those added since we looked
        returns += [member.episode_info(i)["return"] for i in range(len(returns) - first, len(offsets) - 1)]
    return np.array(returns)


def greatest_reward(store: Store | Mixture, episodes: np.ndarray, lengths: np.ndarray) -> float:
    """The greatest absolute reward that some episodes have.

    Args:
        store: one store, or several in one.
        episodes: (n,) int64, their numbers.
        lengths: (E,) int64, of how many rows of each episode of the store, its first ones.
    """
    reward, offsets = np.abs(store.column("reward")), store.offsets
    return max((float(reward[offsets[i] : offsets[i] + lengths[i]].max(initial=0)) for i in episodes), default=0.0)


def _members(store: Store | Mixture) -> Iterator[tuple[Store, int, np.ndarray]]:
    """Each store with the number of its first episode, and the rows at which its episodes begin."""
    if not isinstance(store, Mixture):
        yield store, 0, store.offsets
        return
    for member, first, end in zip(store.stores, store.firsts, store.ends, strict=True):
        yield member, int(first), member.offsets[: end - first + 1]


def _event_rows(store: Store, offsets: np.ndarray) -> Iterator[np.ndarray]:
    """Row numbers of events, segment by segment, then of the staged episodes, which were in no segment."""
    done = 0
    for path in store.segments_now():
        count = sum(read_attributes(path)["lengths"])
        reward, flags = (read_column(path, name, count) for name in ("reward", "flags"))
        rows = np.flatnonzero((reward != 0) | (flags & TERMINATED > 0)) + done
        done += len(reward)
        yield rows[rows < offsets[-1]]  # without those added since we looked
    for i in range(np.searchsorted(offsets, done), len(offsets) - 1):
        episode = store.episode(i)
        yield np.flatnonzero((episode.reward != 0) | episode.terminated) + offsets[i]

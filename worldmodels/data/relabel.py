"""Hindsight goals: what an episode reached later becomes the goal of a window (Andrychowicz et al. 2017, HER)."""

from dataclasses import replace

import numpy as np
import torch

from worldmodels.data.store import Store
from worldmodels.types import Segment


def future_goals(segment: Segment, starts: np.ndarray, store: Store, rng: np.random.Generator) -> Segment:
    """Give every window a goal that lies in the future of all its rows: HER's strategy `future`, one goal a window.

    With t the last real row of the window and L the episode's length, the goal is a frame g drawn uniformly from t+1 to
    L, where frame L is the one after the last action; it is left out where the log does not have it. A window of one
    transition is HER's own draw: any t, then any later frame. Goals are drawn anew each time and never stored; the
    rewards stay as logged, for what counts as reaching a goal is the learner's to say.

    Args:
        segment: windows as read.
        starts: (B, 2) int64, where they were read.
        store: where from; it is read once more, and again for those whose last frame is missing.
        rng: all randomness.

    Returns:
        The segment with two more columns in `side`: `goal` (B, C, H, W) uint8, and `goal_offset` (B,) int64, the steps
        from row t to the goal; an offset of 0 says that there is no later frame, and the goal is zero.
    """
    episode, length = starts[:, 0], store.lengths[starts[:, 0]]
    t = np.minimum(starts[:, 1] + segment.length, length) - 1
    goal = rng.integers(t + 1, length + 1)
    again = rng.integers(t + 1, np.maximum(length, t + 2))  # drawn for all rows, so that none depends on the others

    def frames(rows: np.ndarray) -> Segment:
        # frame g is the one after row g - 1, so that the last frame of an episode is found as any other
        return store.read(np.stack([episode, goal - 1], 1)[rows], 1)

    found = frames(np.arange(len(goal)))
    goals, there = found.obs[:, 1].numpy().copy(), found.next_mask[:, 0].numpy()
    if len(missing := np.flatnonzero(~there & (t + 1 < length))):
        goal[missing] = again[missing]
        goals[missing] = frames(missing).obs[:, 1].numpy()
        there[missing] = True
    offset = torch.from_numpy(np.where(there, goal - t, 0))
    return replace(segment, side={**segment.side, "goal": torch.from_numpy(goals), "goal_offset": offset})

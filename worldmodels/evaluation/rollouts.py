"""Which rollouts are judged, and how they are made: evenly spaced held-out windows, open loop."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from worldmodels.data.mixing import Mixture
from worldmodels.data.sampling import even_windows
from worldmodels.data.store import Store
from worldmodels.imagination import LoggedActions, imagine
from worldmodels.types import Segment, UserError, WorldModel


def split_episodes(store: Store | Mixture, split: str) -> np.ndarray:
    """The episode numbers of a split.

    Raises:
        UserError: there is no such split.
    """
    if split not in store.splits:
        raise UserError(f"split={split} is unknown; choose one of {', '.join(store.splits)}")
    return store.splits[split]


def window_starts(store: Store | Mixture, split: str, length: int, windows: int) -> np.ndarray:
    """At most `windows` evenly spaced (episode, first step) of windows of `length` transitions that hold no padding.

    Raises:
        UserError: if the split has no episode that long.
    """
    episodes = split_episodes(store, split)
    episodes = episodes[store.lengths[episodes] > length]
    if not len(episodes):
        raise UserError(
            f"the {split} split of the store {store.path} has no episode of more than {length} steps, the length of a "
            "rollout; lower the horizon or burn_in, choose another split=..., or collect longer episodes"
        )
    # one step longer than needed: the frame after an episode's last action may not have been kept
    return even_windows(store, episodes, windows, length + 1)


def median_frame(store: Store | Mixture, split: str = "train", frames: int = 2000) -> Tensor:
    """Per-pixel median (C, H, W) float32 of at most `frames` evenly spaced frames of a split."""
    starts = window_starts(store, split, 1, frames)
    return torch.from_numpy(np.median(store.read(starts, 1).obs[:, 0].numpy(), axis=0).astype(np.float32))


def open_loop(
    model: WorldModel, window: Segment, burn_in: int, generator: torch.Generator | None = None, device: str = "cpu"
) -> Segment:
    """Dream the rest of `window` (B, burn_in + horizon transitions) from its first `burn_in`, with its actions."""
    policy = LoggedActions(window.action[:, burn_in:].to(device))
    context = window.steps(0, burn_in).to(device)
    return imagine(model, policy, context, window.length - burn_in, generator).to("cpu")


def batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """`rows` in parts of nearly equal length, at most `size` each."""
    return np.array_split(rows, max(1, -(-len(rows) // size)))


def track(parts: Sequence[np.ndarray], description: str, progress: bool = True) -> Iterable[np.ndarray]:
    """`parts`, under a bar that shows the remaining time."""
    from rich.progress import track as bar

    return bar(parts, description, disable=not progress)

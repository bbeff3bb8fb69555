"""Other ways to read the windows that a sampler draws: frames (32, 20, ...) of batch k."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodels.data.sampling import WindowSampler
from worldmodels.data.segments import read_attributes
from worldmodels.data.store import Store

FRAMES = 20  # of a window
Read = Callable[[int], torch.Tensor]


def pt_files(files: Sequence[Path], sampler: WindowSampler) -> Read:
    """Whole episodes by torch.load, without mmap, and the windows cut from them; all columns, as in a segment."""

    def read(k: int) -> torch.Tensor:
        parts = []
        for episode, start in sampler(k).tolist():
            loaded = torch.load(files[episode], weights_only=True)
            parts.append({name: column[start : start + FRAMES] for name, column in loaded.items()})
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}["obs"]

    return read


def _places(path: Path) -> tuple[Sequence[Path], np.ndarray]:
    """The segments of a store, and the segment and first row of each episode (E, 2)."""
    segments, places = Store.open(path).sealed, []
    for k, segment in enumerate(segments):
        lengths = np.array(read_attributes(segment)["lengths"])
        places.append(np.stack([np.full(len(lengths), k), lengths.cumsum() - lengths], 1))
    return segments, np.concatenate(places)


def zarr_python(path: Path, sampler: WindowSampler) -> Read:
    """One read of zarr-python a window."""
    import zarr

    segments, places = _places(path)
    arrays: list[Any] = [zarr.open_group(s, mode="r")["obs"] for s in segments]

    def read(k: int) -> torch.Tensor:
        parts = []
        for episode, start in sampler(k).tolist():
            segment, row = places[episode]
            parts.append(arrays[segment][row + start : row + start + FRAMES])
        return torch.from_numpy(np.stack(parts))

    return read


def tensorstore_reads(path: Path, sampler: WindowSampler) -> Read:
    """One asynchronous read of TensorStore a window, all of a batch at the same time."""
    import tensorstore

    segments, places = _places(path)
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 64_000_000}})
    arrays = [
        tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{s.absolute()}/obs/"}}, context=context
        ).result()
        for s in segments
    ]

    def read(k: int) -> torch.Tensor:
        waiting = []
        for episode, start in sampler(k).tolist():
            segment, row = places[episode]
            waiting.append(arrays[segment][row + start : row + start + FRAMES].read())
        return torch.from_numpy(np.stack([w.result() for w in waiting]))

    return read

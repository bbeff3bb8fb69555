"""Episodes and windows of them, read from where a catalog has them: in segments, and in staged files behind these."""

import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from worldmodels.data.card import Card
from worldmodels.data.catalog import Catalog, StagedReader, split_flags
from worldmodels.data.segments import (
    COLUMNS,
    TABLE,
    Decoder,
    SegmentReader,
    columns,
    describe,
    read_attributes,
    read_column,
)
from worldmodels.types import Episode, Segment, game_key

T = TypeVar("T")
_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # that a process may open: 1024 on most systems, 256 on macOS


@lru_cache(128 if _FILES < 0 else min(128, _FILES // 10))
def _reader(store: object, kind: type[Any], path: Path) -> Any:
    """An open segment (five files, and 64 kB for its index), kept open among the latest ones of all stores together."""
    return kind(path)


class Episodes(ABC):
    """What a store holds, by the number of the episode. Nothing that a catalog tells of ever changes.

    Args:
        card: of the store.
    """

    _segment_reader, _decoder = SegmentReader, Decoder  # those of a store behind a URL are in remote.py
    _catalog: Catalog

    def __init__(self, card: Card) -> None:
        self.card, obs = card, card["obs"]
        self._frame = (obs["height"], obs["width"]) + ((3,) if obs["channels"] == 3 else ())
        self._opened = object()  # tells the segments that this store opened from those of others
        # what is at a path never changes
        self._table = lru_cache(8)(read_attributes)
        self._staged = lru_cache(16)(StagedReader)

    @abstractmethod
    def refresh(self) -> None:
        """Look again at what there is; episodes that were there keep their numbers."""

    @property
    def lengths(self) -> np.ndarray:
        """Number of transitions of each episode, (E,) int64."""
        return self._catalog.length

    def column(self, name: str) -> np.ndarray:
        """All rows of `action` (uint8), `reward` (float32) or `flags` (uint8, bits as in segments.py), (N,)."""

        def read(catalog: Catalog) -> np.ndarray:
            rows = [int(catalog.length[catalog.segment == k].sum()) for k in range(len(catalog.sealed))]
            parts = [read_column(p, name, n) for p, n in zip(catalog.sealed, rows, strict=True)]
            parts += [columns(self._staged(p).episode)[name] for p in catalog.staged]
            return np.concatenate([np.empty(0, COLUMNS[name]), *parts])

        return self._steady(read)

    def episode_info(self, i: int) -> dict[str, Any]:
        """What is known of episode `i`: id, length, return, end (terminal, truncated, open or gap) and its info."""

        def read(catalog: Catalog) -> dict[str, Any]:
            segment, path = int(catalog.segment[i]), catalog.path(i)
            if segment < 0:
                return describe(path.stem, self._staged(path).episode)
            table, k = self._table(path), i - int(np.argmax(catalog.segment == segment))
            return {name: table[column][k] for name, column in TABLE.items()}

        return self._steady(read)

    def episode(self, i: int) -> Episode:
        """The whole of episode `i`, as it was appended."""

        def read(catalog: Catalog) -> Episode:
            n = int(catalog.length[i])
            obs, decoder = np.empty((n, *self._frame), np.uint8), self._decoder()
            column = {name: np.empty(n, dtype) for name, dtype in COLUMNS.items()}
            final = int(catalog.final[i])
            reader, row = self._at(catalog, int(catalog.segment[i]), int(catalog.row[i]))
            reader.frames(row, obs, decoder)
            for name, out in column.items():
                reader.column(name, row, out, decoder)
            last = np.empty((1, *self._frame), np.uint8)
            if final >= 0:
                reader.final(final, last, decoder)
            decoder.finish()
            info = self.episode_info(i)["info"]
            flags = split_flags(column["flags"])
            return Episode(obs, column["action"], column["reward"], *flags, last[0] if final >= 0 else None, info)

        return self._steady(read)

    def read(self, starts: np.ndarray | Sequence[Sequence[int]], length: int) -> Segment:
        """A batch of windows.

        Args:
            starts: (B, 2) int64, episode and first step of each window; the step may be negative, and the window may
                run past the end: such rows are zero and masked.
            length: number of transitions T of each window.

        Returns:
            A segment with T+1 frames a row. `next_mask` is true at an episode's last row only where the source logged
            the frame after it, which is then the next row of `obs`. `side` holds `life_loss` (B, T) bool and
            `game` (B,) int64 (`types.game_key`).

        Raises:
            IndexError: there is no such episode.
            UserError: the stored bytes do not match their checksum.
        """
        starts = np.asarray(starts, np.int64).reshape(-1, 2)
        return self._steady(lambda catalog: self._read(catalog, starts, length))

    def _steady(self, read: Callable[[Catalog], T]) -> T:
        while True:
            try:
                return read(self._catalog)
            except FileNotFoundError:  # the writer has sealed a staged episode since we looked
                self.refresh()

    def _read(self, catalog: Catalog, starts: np.ndarray, length: int) -> Segment:
        b, episodes = len(starts), starts[:, 0]
        for i in episodes[(episodes < 0) | (episodes >= len(catalog.length))]:
            raise IndexError(f"episode {i} of a store with {len(catalog.length)} episodes")
        rgb = len(self._frame) == 3
        obs = np.empty((b, length + 1, 3 if rgb else 1, *self._frame[:2]), np.uint8)
        # As they are stored. Copied by numpy: a parallel torch operation in the read-ahead thread would start a second
        # team of OpenMP threads, and with more threads than cores the training's own team sleeps between operations.
        frames = obs.transpose(0, 1, 3, 4, 2) if rgb else obs[:, :, 0]
        column = {name: np.zeros((b, length), dtype) for name, dtype in COLUMNS.items()}
        mask, next_mask = np.zeros((2, b, length), bool)
        decoder = self._decoder()
        places = zip(starts[:, 1].tolist(), *(values[episodes].tolist() for values in catalog[2:]), strict=True)
        for k, (start, end, segment, row, final) in enumerate(places):
            lo, hi = max(start, 0), min(start + length + 1, end)  # frames that are stored as rows
            if lo >= hi:
                frames[k] = 0
                continue
            a, z = lo - start, hi - start
            n = min(z, length)
            reader, row = self._at(catalog, segment, row)
            reader.frames(row + lo, frames[k, a:z], decoder)
            for name, values in column.items():
                reader.column(name, row + lo, values[k, a:n], decoder)
            mask[k, a:n], next_mask[k, a : z - 1] = True, True
            if a or z <= length:
                frames[k, :a], frames[k, z:] = 0, 0
            if hi == end and z <= length and final >= 0:
                reader.final(final, frames[k, z : z + 1], decoder)
                next_mask[k, z - 1] = True
        decoder.finish()
        fields = (column["action"].astype(np.int64), column["reward"], *split_flags(column["flags"]), mask, next_mask)
        action, reward, terminated, truncated, life_loss, mask, next_mask = map(torch.from_numpy, fields)
        segment = (torch.from_numpy(obs), action, reward, terminated, truncated, mask, next_mask)
        game = torch.from_numpy(np.full(b, game_key(self.card["game"])))
        return Segment(*segment, side={"life_loss": life_loss, "game": game})

    def _at(self, catalog: Catalog, segment: int, row: int) -> tuple[Any, int]:
        """What reads the episode that the catalog has there, and its first row for that reader."""
        if segment < 0:
            return self._staged(catalog.staged[row]), 0
        return _reader(self._opened, self._segment_reader, catalog.sealed[segment]), row

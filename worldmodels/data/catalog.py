"""What a store holds at one moment: which episodes there are, and where each of them lies."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from worldmodels.data.disk import damaged
from worldmodels.data.segments import LIFE_LOSS, TERMINATED, TRUNCATED, Decoder, columns, read_attributes
from worldmodels.types import Episode

_DAMAGE = (ValueError, KeyError, EOFError, BadZipFile, zlib.error)


class Catalog(NamedTuple):
    """Never changed once made, so that threads may share it.

    The arrays are (E,) int64. A sealed episode is `length` rows from `row` onwards of segment number `segment`, and its
    last frame is number `final` of the segment's; a staged one has segment -1 and is file number `row`. Where there is
    no last frame `final` is -1.
    """

    sealed: tuple[Path, ...]
    staged: tuple[Path, ...]
    length: np.ndarray
    segment: np.ndarray
    row: np.ndarray
    final: np.ndarray

    def path(self, i: int) -> Path:
        """The segment or staged file that episode `i` lies in."""
        segment = self.segment[i]
        return self.staged[self.row[i]] if segment < 0 else self.sealed[segment]

    def with_staged(self, path: Path, length: int, has_final: bool) -> "Catalog":
        """One staged episode more."""
        more = (length, -1, len(self.staged), has_final - 1)
        arrays = (np.append(a, b) for a, b in zip(self[2:], more, strict=True))
        return Catalog(self.sealed, (*self.staged, path), *arrays)


def look(staging: Path, segments: Path, seen: Catalog | None = None) -> Catalog:
    """List the episodes: those of the segments in order, then the staged ones.

    Segments that are in `seen`, an earlier look, are not read again.

    Raises:
        UserError: a file is damaged.
    """
    # staging first: an episode that is sealed meanwhile is then seen twice, never missed
    staged = sorted(staging.glob("*.npz"))
    sealed = tuple(sorted(segments.glob("*.zarr")))
    known = seen.sealed if seen and seen.sealed == sealed[: len(seen.sealed)] else ()
    parts = [np.array(seen[2:])[:, seen.segment >= 0] if seen and known else np.zeros((4, 0), np.int64)]
    for i, path in enumerate(sealed[len(known) :], len(known)):
        parts.append(places(read_attributes(path), i))
    catalog = Catalog(sealed, (), *np.concatenate(parts, 1))
    count = len(catalog.length)
    for path in staged:
        if path.stem < f"{count:09d}":  # named by the episode's number: a segment has it
            continue
        try:
            with np.load(path, allow_pickle=False) as f:
                catalog = catalog.with_staged(path, len(f["action"]), "final_obs" in f.files)
        except FileNotFoundError:  # sealed just now
            return look(staging, segments, catalog)
        except _DAMAGE as e:
            raise damaged(path, e) from e
    return catalog


def places(table: Mapping[str, Any], segment: int) -> np.ndarray:
    """The arrays of a catalog (4, E) for the episodes of one segment, given its number and attributes."""
    length, final = np.array(table["lengths"], np.int64), np.array(table["has_final"], bool)
    row, final = length.cumsum() - length, np.where(final, final.cumsum() - 1, -1)
    return np.stack([length, np.full_like(length, segment), row, final])


class StagedReader:
    """Reads windows of one staged episode as `SegmentReader` does of a segment, from memory.

    Raises:
        FileNotFoundError: it has been sealed.
        UserError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as f:
                final, info = f["final_obs"] if "final_obs" in f.files else None, json.loads(str(f["info"]))
                self.episode = Episode(f["obs"], f["action"], f["reward"], *split_flags(f["flags"]), final, info)
        except _DAMAGE as e:
            raise damaged(path, e) from e
        self._columns = columns(self.episode)

    def frames(self, start: int, out: np.ndarray, decoder: Decoder) -> None:
        """Rows `start` to `start + len(out)` of `obs` into `out`."""
        out[:] = self.episode.obs[start : start + len(out)]

    def final(self, number: int, out: np.ndarray, decoder: Decoder) -> None:
        """The last frame into `out` (1, H, W[, C])."""
        out[0] = self.episode.final_obs

    def column(self, name: str, start: int, out: np.ndarray, decoder: Decoder) -> None:
        """Rows `start` to `start + len(out)` of `action`, `reward` or `flags` into `out`."""
        out[:] = self._columns[name][start : start + len(out)]


def split_flags(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`terminated`, `truncated` and `life_loss`, bool, from the bits that are stored."""
    return flags & TERMINATED > 0, flags & TRUNCATED > 0, flags & LIFE_LOSS > 0

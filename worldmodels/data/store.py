"""Logged episodes on disk: durable one by one, sealed into immutable Zarr segments, read in batches of windows.

    ROOT/store.json                      format, version, min_reader, uuid
    ROOT/sources/<source>.json           dataset card
    ROOT/staging/<source>/<id>.npz       one finished episode = one file = one commit
    ROOT/segments/<source>/000123.zarr   immutable, about 65,536 frames (segments.py)
    ROOT/side/<name>/<version>/          further columns, row by row (side.py)
    ROOT/splits/default.json             train, validation and test by episode, written once

Every file carries its checksum or is listed with it (checksums.py). Stores of format 1 have files without; they can be
read, and what is added to them carries its checksum while their header stays as it is.

An episode's number never changes: segments in order, then staged episodes in order. Readers take no locks and never
block the one writer, because nothing that they can see is ever changed.
"""

import json
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from worldmodels.data import side
from worldmodels.data.card import Card, check_compatible, check_episode, validate_card
from worldmodels.data.catalog import Catalog, StagedReader, look, split_flags
from worldmodels.data.checksums import mark_zip
from worldmodels.data.disk import (
    alone_in,
    atomic,
    disk_errors,
    is_url,
    lock,
    make_folder,
    on_disk,
    remove,
    sync_entry,
)
from worldmodels.data.header import FILL, make_store, read_header, stored_card
from worldmodels.data.segments import (
    COLUMNS,
    TABLE,
    Decoder,
    SegmentReader,
    SegmentWriter,
    columns,
    describe,
    read_attributes,
    read_column,
)
from worldmodels.data.splits import kept_splits
from worldmodels.types import Episode, Segment, UserError, game_key

SEGMENT_FRAMES = 65_536
T = TypeVar("T")
_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # that a process may open: 1024 on most systems, 256 on macOS


@lru_cache(128 if _FILES < 0 else min(128, _FILES // 10))
def _reader(store: object, kind: type[Any], path: Path) -> Any:
    """An open segment (five files, and 64 kB for its index), kept open among the latest ones of all stores together."""
    return kind(path)


class Store:
    """Episodes of one source under one dataset card. Make one with `Store.create` or `Store.open`.

    Used as a context manager it seals what is staged when the block ends without an error, and releases its lock.
    """

    _segment_reader, _decoder = SegmentReader, Decoder  # those of a store behind a URL are in remote.py

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self._lock = None
        with disk_errors(self.path):
            header = read_header(self.path)
            self.uuid: str = header["uuid"]
            self.card: Card = self._read_card(header)
            obs, source = self.card["obs"], self.card["source"]
            self._frame = (obs["height"], obs["width"]) + ((3,) if obs["channels"] == 3 else ())
            self._staging, self.segments = self.path / "staging" / source, self.path / "segments" / source
            self._opened = object()  # tells the segments that this store opened from those of others
            # what is at a path never changes
            self._table = lru_cache(8)(read_attributes)
            self._staged = lru_cache(16)(StagedReader)
            if write:
                self._lock = lock(self.path / "sources" / f"{source}.lock")
                for folder in (self._staging, self.segments):
                    folder.mkdir(parents=True, exist_ok=True)
                    sync_entry(folder.parent)
                sync_entry(self.path)
            self._catalog: Catalog = self._look()
            if write:
                self._recover()

    @classmethod
    def create(cls, path: str | Path, card: Mapping[str, Any]) -> "Store":
        """Open the store at `path` for writing, making it first where there is none.

        Raises:
            UserError: the store's card disagrees with `card`, the folder holds something else, another process is
                writing, or the disk refuses.
        """
        card, root = validate_card(card), on_disk(path)
        with disk_errors(root):
            make_folder(root)
            with alone_in(root):  # or two makers would each write a header and a card of their own
                make_store(root, card)
        have = stored_card(root)
        if have["source"] != card["source"]:
            raise UserError(
                f"the store {root} is of source {have['source']}, not {card['source']}; give another store="
            )
        check_compatible(have, card, "what is to be added to it", mend=f"give another store than {root}")
        return cls(root, write=True)

    @classmethod
    def open(cls, path: str | Path, write: bool = False) -> "Store":
        """Open the store at `path`, a folder or a URL (remote.py), for reading unless `write` is set.

        Raises:
            UserError: there is no store, it is of a newer version, it is empty (when reading), or it is out of reach.
        """
        if is_url(path) and not write:
            from worldmodels.data.remote import RemoteStore

            return RemoteStore(str(path))
        store = cls(on_disk(path), write)
        if not write and not len(store.lengths):
            raise UserError(f"the store {path} holds no episodes; {FILL}")
        return store

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._lock:
                self.seal()
        finally:
            self.close()

    def close(self) -> None:
        """Release the writer's lock. What was appended is safe with or without this."""
        if self._lock:
            self._lock.close()
            self._lock = None

    # Writing

    def append(self, episode: Episode) -> None:
        """Add one episode; it is on the disk when this returns.

        Raises:
            UserError: the episode does not fit the card or is malformed, or the disk refuses (nothing stored is lost).
        """
        self._must_write()
        check_episode(self.card, episode, f"episode {len(self.lengths)} of the store {self.path}")
        path = self._staging / f"{len(self.lengths):09d}.npz"
        arrays = {"obs": episode.obs, **columns(episode), "info": np.array(json.dumps(dict(episode.info)))}
        if episode.final_obs is not None:
            arrays["final_obs"] = episode.final_obs
        with disk_errors(self.path), atomic(path) as tmp:
            with open(tmp, "wb") as f:
                np.savez_compressed(f, allow_pickle=False, **arrays)
            mark_zip(tmp)
        self._catalog = self._catalog.with_staged(path, len(episode), episode.final_obs is not None)
        if self._catalog.length[self._catalog.segment < 0].sum() >= SEGMENT_FRAMES:
            self.seal()

    def seal(self) -> None:
        """Move the staged episodes into one immutable segment.

        Raises:
            UserError: the disk refuses; the episodes stay staged.
        """
        self._must_write()
        staged = self._catalog.staged
        if not staged:
            return
        with disk_errors(self.path):
            with SegmentWriter(self.segments, self.card["source"]) as writer:
                for p in staged:
                    writer.append(p.stem, StagedReader(p).episode)
                writer.finish()
                self.commit(writer.path)  # within: a segment that a full disk does not let in is removed
            for p in staged:
                p.unlink()

    def commit(self, segment: Path) -> None:
        """Add the episodes of a segment that is whole, in the folder `segments` under another name.

        Raises:
            UserError: the disk refuses.
        """
        self._must_write()
        with disk_errors(self.path):
            number = max((int(p.stem) for p in self._catalog.sealed), default=-1) + 1
            segment.rename(self.segments / f"{number:06d}.zarr")
            self.refresh()
            sync_entry(self.segments)

    def _read_card(self, header: Mapping[str, Any]) -> Card:
        return stored_card(self.path)

    def _must_write(self) -> None:
        if not self._lock:
            raise ValueError("this store was opened for reading; use Store.create or Store.open(path, write=True)")

    def _recover(self) -> None:
        """Tidy what a killed writer left: half-written files, and staged episodes that a segment already holds."""
        folders = (self.path, self.path / "sources", self.path / "splits", self._staging, self.segments)
        for tmp in list(chain(*(folder.glob("*.tmp*") for folder in folders))):
            with suppress(OSError):  # a worker that was killed with its import may not have ended yet
                remove(tmp)
        for p in set(self._staging.glob("*.npz")).difference(self._catalog.staged):
            p.unlink()

    # Reading

    def refresh(self) -> None:
        """Look again at what the store holds; episodes that were there keep their numbers."""
        self._catalog = self._look(self._catalog)

    def _look(self, seen: Catalog | None = None) -> Catalog:
        return look(self._staging, self.segments, seen)

    @property
    def lengths(self) -> np.ndarray:
        """Number of transitions of each episode, (E,) int64."""
        return self._catalog.length

    @property
    def sealed_lengths(self) -> np.ndarray:
        """Of the episodes that are in segments, which are the first, (S,) int64."""
        return self._catalog.length[self._catalog.segment >= 0]

    @property
    def sealed(self) -> tuple[Path, ...]:
        """The segments, in order."""
        return self._catalog.sealed

    def segments_now(self) -> list[Path]:
        """The segments that are there by now, in order; it may be more than were there when we looked."""
        return sorted(self.segments.glob("*.zarr"))

    @property
    def offsets(self) -> np.ndarray:
        """First row of each episode among all rows, and last the number of rows, (E+1,) int64."""
        return np.concatenate([[0], self.lengths.cumsum()])

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

    # Splits and side columns

    @property
    def splits(self) -> dict[str, np.ndarray]:
        """Episode numbers of `train`, `validation` and `test`, int64, sorted; about 80, 10 and 10 % of the episodes.

        Drawn when first asked for, from the card's seed, and kept: episodes added later belong to `train`. With two
        episodes there is no `test`, with one no `validation` either.
        """
        return kept_splits(self.path / "splits" / "default.json", len(self.lengths), self.card["seed"] or 0)

    def write_side(
        self,
        name: str,
        version: str,
        rows: Sequence[int] | np.ndarray,
        array: np.ndarray,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep a further column beside the frames, under a name and a version that is never overwritten.

        Args:
            name: such as `value`.
            version: such as the hash of the model that made it.
            rows: (R,) int64, numbers of the rows (`offsets`) that the values belong to; they must be sealed.
            array: (R, ...) of any plain dtype.
            about: plain data that tells what made it, kept with it (`side_about`).

        Raises:
            UserError: this version exists, a row does not, the shapes disagree, or the disk refuses.
        """
        with disk_errors(self.path):
            side.write(
                self.path / "side" / name / version, self.card["source"], self._catalog.sealed, rows, array, about
            )

    def side(self, name: str, version: str | None = None) -> np.ma.MaskedArray:
        """A further column over all rows, (N, ...), masked where it has no value; the newest version by default.

        Raises:
            UserError: there is no such column or version.
        """
        values = side.read(self.path / "side" / name, version, self.card["source"], self._catalog.sealed)
        missing = int(self.offsets[-1]) - len(values)  # rows that are still staged
        return np.ma.concatenate([values, np.ma.masked_all((missing, *values.shape[1:]), values.dtype)])

    def side_about(self, name: str, version: str | None = None) -> dict[str, Any]:
        """What made a version of a further column, by default the newest, as `write_side` was told.

        Raises:
            UserError: there is no such column or version.
        """
        return side.about(self.path / "side" / name, version)

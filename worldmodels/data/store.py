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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data import side
from worldmodels.data.card import Card, check_compatible, check_episode, validate_card
from worldmodels.data.catalog import Catalog, StagedReader, look
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
from worldmodels.data.episodes import Episodes
from worldmodels.data.header import FILL, make_store, read_header, stored_card
from worldmodels.data.segments import (
    SegmentWriter,
    columns,
)
from worldmodels.data.splits import kept_splits
from worldmodels.types import Episode, UserError

SEGMENT_FRAMES = 65_536


class Store(Episodes):
    """Episodes of one source under one dataset card. Make one with `Store.create` or `Store.open`.

    Used as a context manager it seals what is staged when the block ends without an error, and releases its lock.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self._lock = None
        with disk_errors(self.path):
            header = read_header(self.path)
            self.uuid: str = header["uuid"]
            super().__init__(self._read_card(header))
            source = self.card["source"]
            self._staging, self.segments = self.path / "staging" / source, self.path / "segments" / source
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

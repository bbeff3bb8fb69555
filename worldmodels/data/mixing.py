"""Several stores read as one: their episodes numbered through, their frames brought to one form where that is asked."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodels.data.card import Card, check_compatible
from worldmodels.data.store import Store
from worldmodels.data.transforms import COLOURS, Transform
from worldmodels.types import Segment, UserError

_FIELDS = [f.name for f in fields(Segment) if f.name != "side"]


def open_stores(paths: str | Path | Sequence[str | Path], transform: Transform) -> "Store | Mixture":
    """Open one store, or several as one, for reading.

    Raises:
        UserError: there is no store at a path, or the stores do not fit together.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if len(paths) == 1 and transform == Transform():
        return Store.open(paths[0])
    return Mixture(paths, transform)


class Mixture:
    """Stores under one dataset card, read as if they were one; what they hold when it is made is what it holds.

    Episodes are numbered through the stores in the order given. Where there are several, a batch has one more side
    column, `store` (B,) int64: the place in that order of the store that each window is from.

    Args:
        paths: folders of the stores.
        transform: what is done to all frames.

    Raises:
        UserError: no path, a store twice or none at a path, or what a frame, a step or a reward means differs.
    """

    def __init__(self, paths: Sequence[str | Path], transform: Transform) -> None:
        self.path, self._paths = ", ".join(map(str, paths)), list(paths)
        self.stores, self._transform = [Store.open(path) for path in paths], transform
        uuids = [store.uuid for store in self.stores]
        if not uuids or len(set(uuids)) < len(uuids):
            raise UserError(f"store=[{self.path}] must name at least one store, and none of them twice")
        cards = [transform.card(store.card) for store in self.stores]
        for path, card in zip(paths[1:], cards[1:], strict=True):
            what, mend = f"{paths[0]}, which {path} is to be mixed with,", "no setting brings the two together"
            check_fits(card, cards[0], what, same_game=False, mend=f"{mend}; train on one")
        games = list(dict.fromkeys(card["game"] for card in cards))
        actions = sorted({action for card in cards for action in card["action_set"]})
        self.uuid = "+".join(uuids)
        self.card: Card = {**cards[0], "games": games, "action_set": actions}
        counts = [len(store.lengths) for store in self.stores]
        self.ends = np.cumsum(counts)
        self.firsts = self.ends - counts
        """Number of each store's first episode, (S,) int64, and, in `ends`, of the one after its last."""
        self.lengths = np.concatenate([store.lengths for store in self.stores])
        """Number of transitions of each episode, (E,) int64."""
        self.games = np.repeat([games.index(card["game"]) for card in cards], counts)
        """Place of each episode's game in the card's `games`, (E,) int64."""

    def parts(self) -> "dict[str, Mixture]":
        """Each store by itself, by its path, transformed as here."""
        return {str(path): Mixture([path], self._transform) for path in self._paths}

    @property
    def offsets(self) -> np.ndarray:
        """First row of each episode among all rows, and last the number of rows, (E+1,) int64."""
        return np.concatenate([[0], self.lengths.cumsum()])

    @property
    def splits(self) -> dict[str, np.ndarray]:
        """Episode numbers of `train`, `validation` and `test`: those of all stores."""
        own = [store.splits for store in self.stores]
        firsts = zip(own, self.firsts, self.ends, strict=True)
        moved = [{name: i[i < end - first] + first for name, i in split.items()} for split, first, end in firsts]
        return {name: np.concatenate([split[name] for split in moved]) for name in own[0]}

    def column(self, name: str) -> np.ndarray:
        """All rows of `action`, `reward` or `flags`, (N,), as `Store.column`."""
        rows = self.offsets[self.ends] - self.offsets[self.firsts]
        return np.concatenate([store.column(name)[:n] for store, n in zip(self.stores, rows, strict=True)])

    def episode_info(self, i: int) -> dict[str, Any]:
        """What is known of episode `i`, as `Store.episode_info`."""
        store = int(np.searchsorted(self.ends, i, side="right"))
        return self.stores[store].episode_info(i - int(self.firsts[store]))

    def read(self, starts: np.ndarray | Sequence[Sequence[int]], length: int) -> Segment:
        """A batch of windows, as `Store.read`, with transformed frames and the side column `store`.

        Raises:
            IndexError: there is no such episode.
            UserError: the stored bytes do not match their checksum.
        """
        starts = np.asarray(starts, np.int64).reshape(-1, 2)
        if ((starts[:, 0] < 0) | (starts[:, 0] >= self.ends[-1])).any():
            raise IndexError(f"an episode below 0 or above {self.ends[-1] - 1}, the last of {self.path}")
        if len(self.stores) == 1:
            return self._transform(self.stores[0].read(starts, length))
        which = np.searchsorted(self.ends, starts[:, 0], side="right")
        columns: dict[str, np.ndarray] = {}
        for i in np.unique(which):
            rows = np.flatnonzero(which == i)
            windows = starts[rows] - [self.firsts[i], 0]
            # Each part is let go before the next is read: memory that is freed by the megabyte goes back to the system,
            # and to have it again for every batch takes longer than the reading.
            _place(self._transform(self.stores[i].read(windows, length)), rows, len(starts), columns)
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        plain = {name: tensors.pop(name) for name in _FIELDS}
        return Segment(**plain, side={**tensors, "store": torch.from_numpy(which)})


def _place(part: Segment, rows: np.ndarray, count: int, columns: dict[str, np.ndarray]) -> None:
    """Put a part of a batch of `count` windows in its `rows` of the columns of the whole."""
    for name, tensor in ({name: getattr(part, name) for name in _FIELDS} | part.side).items():
        values = tensor.numpy()  # copied by numpy, for the reason told in Episodes._read
        if name not in columns:
            columns[name] = np.empty((count, *values.shape[1:]), values.dtype)
        columns[name][rows] = values


def logged_actions(store: "Store | Mixture") -> dict[str, list[int]]:
    """The actions that the log of each game holds, by its name, as sorted indices into the 18-action set."""
    found: dict[str, set[int]] = {}
    for part in store.stores if isinstance(store, Mixture) else [store]:
        found.setdefault(part.card["game"], set()).update(np.unique(part.column("action")).tolist())
    return {game: sorted(actions) for game, actions in sorted(found.items())}


def check_fits(data: Card, other: Card, what: str, same_game: bool = True, mend: str | None = None) -> None:
    """As `check_compatible`, and for each of several games; tells of the setting that mends it where there is one.

    Raises:
        UserError: data of a meaning or a game that `other` does not have.
    """
    wanted = other["obs"]
    size = wanted["height"] if wanted["height"] == wanted["width"] else "PIXELS"
    colour = next(name for name, (channels, _) in COLOURS.items() if channels == wanted["channels"])
    for names, setting in (
        (("height", "width"), f"size={size}, to which all frames are then resized"),
        (("channels", "colour"), f"colour={colour}, to which all frames are then converted"),
    ):
        obs = wanted | {name: data["obs"][name] for name in names}
        check_compatible({**other, "obs": obs}, other, what, mend=f"give data.transform.{setting}")
    for game in data.get("games", [data["game"]]):
        check_compatible({**data, "game": game}, other, what, same_game, mend)

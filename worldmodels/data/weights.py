"""How likely each episode is when windows or events are drawn: all alike, or by game, recency and return."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from worldmodels.types import UserError

ALIKE = {"game": 1.0, "games": None, "recency": None, "return": None}


class Choice:
    """Draws things that lie in groups: a group by weight times number of its things, then any thing of it.

    Args:
        counts: (n,) int64, number of things of each group; one at least in all.
        weights: (n,) of one thing of each group; by default all are alike.
    """

    def __init__(self, counts: np.ndarray, weights: np.ndarray | None = None) -> None:
        self._counts, self._ends = counts, counts.cumsum()
        alike = weights is None or np.ptp(weights[counts > 0]) == 0
        self._mass = None if alike else (counts * weights).cumsum()

    @property
    def size(self) -> int:
        """Number of things."""
        return int(self._ends[-1])

    def __call__(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups (size,) and numbers of the things in them (size,), int64, drawn with replacement."""
        if self._mass is None:
            return self.find(rng.integers(self.size, size=size))
        # below the total even when rounded, for random() is 1 - 2**-53 at most
        group = np.searchsorted(self._mass, rng.random(size) * self._mass[-1], side="right")
        return group, rng.integers(self._counts[group])

    def find(self, thing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Group of, and number in it of, things (n,) that are numbered through all groups."""
        group = np.searchsorted(self._ends, thing, side="right")
        return group, thing - (self._ends[group] - self._counts[group])

    def number(self, group: np.ndarray, thing: np.ndarray) -> np.ndarray:
        """The opposite of `find`."""
        return self._ends[group] - self._counts[group] + thing


class EpisodeWeights:
    """Weights of episodes, which hold for windows and for events alike.

    Args:
        windows: (n,) int64, number of windows of each episode.
        games: (n,) int64, number of the game of each.
        returns: (n,) float64; needed where `settings` has a `return`.
        settings: `game`: a game is drawn in proportion to (number of its windows) ** game, so 1 is uniform over windows
            and 0 over games; `games`: times so much, by the number of the game, where it is not None; `recency`:
            episodes (or, below 1, share of the game's episodes) after which an older one counts half; `return`:
            temperature t at which a window of the game's best episode is exp(1/t) times as likely as one of its worst,
            the others in between by rank. The latter two are off where they are None.

    Raises:
        UserError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        windows: np.ndarray,
        games: np.ndarray,
        returns: np.ndarray | None,
        settings: Mapping[str, Any],
    ) -> None:
        settings = checked(settings)
        recency, temperature = settings["recency"], settings["return"]
        self._games, self._inside = games, np.ones(len(games))
        for game in np.unique(games):
            mine = np.flatnonzero(games == game)
            if recency:
                half = recency if recency >= 1 else recency * len(mine)
                self._inside[mine] *= 0.5 ** (np.arange(len(mine))[::-1] / half)
            if temperature and returns is not None:
                self._inside[mine] *= np.exp((_ranks(returns[mine]) - 1) / temperature)
        shares = np.bincount(games, windows) ** settings["game"]
        self._shares = shares if settings["games"] is None else shares * settings["games"][: len(shares)]

    def of(self, counts: np.ndarray) -> np.ndarray:
        """Weight of one thing of each episode (n,), where the episodes have `counts` (n,) of them."""
        mass = np.bincount(self._games, counts * self._inside)
        factor = np.divide(self._shares, mass, out=np.zeros_like(mass), where=mass > 0)
        return self._inside * factor[self._games]


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with what they leave out.

    Raises:
        UserError: one is unknown or out of range.
    """
    given = {**ALIKE, **settings}
    if unknown := set(given) - set(ALIKE):
        raise UserError(f"data.weights has no setting {min(unknown)!r}; it has {', '.join(ALIKE)}")
    for name, value in given.items():
        if name == "games":  # by number; whoever knows their names looks after the values
            continue
        number = isinstance(value, int | float) and 0 <= value < np.inf
        if not (number if name == "game" else value is None or (number and value > 0)):
            allowed = "a number of 0 or more" if name == "game" else "a number above 0, or null"
            raise UserError(f"data.weights.{name}={value} is out of range; it must be {allowed}")
    return given


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value from 0, the least, to 1, the greatest; equal ones share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    middle = count.cumsum() - (count + 1) / 2
    return middle[place] / max(1, len(values) - 1)

"""A new game from little of it, beside what is known: a budget of transitions, and replay of other games."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data.loading import Draw
from worldmodels.data.mixing import Mixture
from worldmodels.data.sampling import WindowSampler
from worldmodels.data.store import Store
from worldmodels.data.transforms import Transform
from worldmodels.types import UserError


def few_shot(store: Store | Mixture, budget: int, share: float, seed: int, least: int = 1) -> dict[str, np.ndarray]:
    """Episodes to learn from and to choose by, of the train split of each game and within a budget; test is as it was.

    Whole episodes are taken in an order that the seed decides, those that no longer fit being passed over. Of a game of
    which no two fit, the first rows of two episodes are taken, as many as the budget has.

    Args:
        store: the store, or several in one.
        budget: transitions of each game that may be used, for both purposes together.
        share: of the chosen episodes, held out as validation; at least one, and at most all but one. Where no two fit,
            of the rows.
        seed: of the order.
        least: rows that either purpose needs where no two fit.

    Returns:
        Numbers of the episodes of `train`, `validation` and `test`, int64, and `lengths`, (E,) int64: how many rows of
        each episode of the store may be used, its first ones.

    Raises:
        UserError: the budget is too small for a game, which has one episode alone, or a setting is out of range.
    """
    if type(budget) is not int or budget < 1:
        raise UserError(f"budget={budget} must be a whole number of transitions of at least 1, or null for all")
    if not 0 < share < 1:
        raise UserError(f"validation_share={share} must be between 0 and 1")
    rng, own = np.random.default_rng((seed % 2**64, budget)), store.splits["train"]
    games = store.games[own] if isinstance(store, Mixture) else np.zeros(len(own), np.int64)
    train, held, lengths = [], [], store.lengths.copy()
    for game in np.unique(games):
        left, chosen, order = budget, [], rng.permutation(own[games == game])
        for episode in order:
            if store.lengths[episode] <= left:
                chosen.append(episode)
                left -= store.lengths[episode]
        if len(chosen) < 2:
            if len(order) < 2 or budget < 2 * least:
                shortest = int(np.sort(store.lengths[order])[:2].sum())
                raise UserError(
                    f"budget={budget} holds no two whole episodes of the train split of {store.path}, one to learn "
                    f"from and one to choose by (the two shortest have {shortest} transitions), and no {least} "
                    "transitions of each of two; give a larger budget=..., or a store of more episodes"
                )
            chosen = list(order[:2])
            first, second = store.lengths[chosen]  # together more than the budget, as no two fit in this order
            rows = np.clip(round(share * budget), max(least, budget - second), min(budget - least, first))
            lengths[chosen] = rows, min(budget - rows, second)
        count = min(max(1, round(share * len(chosen))), len(chosen) - 1)
        held += chosen[:count]
        train += chosen[count:]
    return {"train": np.sort(train), "validation": np.sort(held), "test": store.splits["test"], "lengths": lengths}


class Replay:
    """A share of every training batch from stores of other games, all games alike, so that they are not forgotten.

    Args:
        new: paths of the stores that are learned from.
        old: path of a store that is replayed, or several.
        share: of a batch; at least one window of it is replayed, and one is not.
        batch_size: windows in a batch.
        transform: of all frames.

    Raises:
        UserError: the share is out of range, there is no such store, or the stores do not fit together.
    """

    def __init__(
        self,
        new: str | Path | Sequence[str | Path],
        old: str | Path | Sequence[str | Path],
        share: float,
        batch_size: int,
        transform: Transform,
    ) -> None:
        first, further = ([paths] if isinstance(paths, str | Path) else list(paths) for paths in (new, old))
        if not 0 < share < 1 or batch_size < 2:
            raise UserError(
                f"replay.share={share} must be between 0 and 1, and data.batch_size={batch_size} at least 2: a batch "
                "has windows of either kind"
            )
        if not further:
            raise UserError("replay.store names no store; give one, or null for no replay")
        self.store = Mixture([*first, *further], transform)
        self.first = int(self.store.firsts[len(first)])
        """Number of the first episode that is replayed."""
        self.count = min(max(1, round(share * batch_size)), batch_size - 1)
        """Windows of a batch that are."""

    @property
    def episodes(self) -> np.ndarray:
        """Numbers of those that windows are replayed from, (n,) int64."""
        own = self.store.splits["train"]
        return own[own >= self.first]

    def sampler(self, seed: int, **settings: Any) -> WindowSampler:
        """Draws the replayed windows; settings as of `WindowSampler`."""
        own = self.episodes
        further = {"weights": {"game": 0.0}, "games": self.store.games[own], "seed": seed + 1}
        return WindowSampler(self.store, own, self.count, **settings, **further)

    def joined(self, draws: Iterator[Draw], sampler: WindowSampler, first: int) -> Iterator[Draw]:
        """Batches from number `first` on, with replayed windows behind those of `draws`."""
        for k, draw in enumerate(draws, first):
            yield draw._replace(starts=np.concatenate([draw.starts, sampler(k)]))

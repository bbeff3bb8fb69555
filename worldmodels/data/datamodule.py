"""Feeds a learner with windows of stores, and resumes at exactly the batch where training stopped."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from worldmodels.data.card import Card
from worldmodels.data.disk import is_url
from worldmodels.data.few_shot import Replay, few_shot
from worldmodels.data.loading import Batches, Draw, Reader, Relabel, Windows
from worldmodels.data.mixing import Mixture, open_stores
from worldmodels.data.outcomes import Outcomes
from worldmodels.data.priorities import BLOCK
from worldmodels.data.relabel import future_goals
from worldmodels.data.sampling import WindowSampler, shared_windows
from worldmodels.data.scan import episode_returns, greatest_reward
from worldmodels.data.transforms import Transform
from worldmodels.types import Segment, UserError

RELABEL: dict[str, Relabel] = {"future": future_goals}
"""What a batch may be relabelled with, by the name that a setting gives; see `future_goals`."""


class StoreDataModule(LightningDataModule):
    """Endless training batches and fixed validation and test windows of one store or several, each a whole `Segment`.

    Training batch k is a pure function of (seed, rank, world size, k), and of what `update` was told where windows are
    drawn by priority; how many were used is read from the trainer, so that a resumed run goes on with the next one. The
    stream never ends: give the trainer `max_steps` and an integer `val_check_interval`.

    The settings add to a segment's `side`: `store` where there are several, `goal` and `goal_offset` where batches are
    relabelled, `ahead` (B, T) float32 where outcomes are asked for, `importance` (B,) float32 and `starts` (B, 2) int64
    where windows are drawn by priority.

    Args:
        store: folder of the store, or a list of them.
        batch_size: windows a batch on each device.
        length: transitions T a window.
        left_padding: how many steps before its episode a training window may start.
        event_share: share of a training batch drawn around rewards and terminations.
        seed: of the stream of training batches.
        validation: `windows` (how many, each game having as many), `length` and `batch_size` of validation and test
            windows; the latter two are as in training where they are not given.
        prefetch: batches that are read ahead, by one thread or by each worker.
        replacement: false shows every training window once before any comes again.
        weights: `game`, `recency` and `return`, as in `EpisodeWeights`, and `games`, by their names (others count 1).
        best_share: share of the episodes of each game and split, the best by return, that windows are from.
        priority: `alpha` (None: off), `beta`, `beta_batches` and `block`, as in `Priorities`; `update` is told them.
        relabel: `future`, or a function as those in `RELABEL`, called on every training batch.
        transform: `size` and `colour` of the frames, as in `Transform`.
        workers: processes that read training batches in place of the thread; the batches are the same.
        event_rows: as in `WindowSampler`.
        right_padding: how many steps behind its episode a training window may end.
        ahead: steps over which the rewards to come are summed, as in `Outcomes`; None: they are not.
        budget: transitions of each game that training and validation may use together, as in `few_shot`; None: all.
        validation_share: share of the episodes within the budget, or of its rows where no two whole episodes fit, that
            validation windows are from.
        replay: `store`, of other games, and `share` of a training batch that is from there, as in `Replay`.

    Raises:
        UserError: no store, or one without episodes, at `store`; stores that do not fit; a setting out of range.
    """

    def __init__(
        self,
        store: str | Sequence[str],
        batch_size: int = 32,
        length: int = 8,
        left_padding: int = 0,
        event_share: float = 0.0,
        seed: int = 0,
        validation: Mapping[str, int] | None = None,
        prefetch: int = 2,
        replacement: bool = True,
        weights: Mapping[str, float | None] | None = None,
        best_share: float | None = None,
        priority: Mapping[str, float | None] | None = None,
        relabel: str | Relabel | None = None,
        transform: Mapping[str, Any] | None = None,
        workers: int = 0,
        event_rows: int | None = None,
        right_padding: int = 0,
        ahead: int | None = None,
        budget: int | None = None,
        validation_share: float = 0.2,
        replay: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.validation = _settings(
            "validation", validation, {"windows": 64, "length": length, "batch_size": batch_size}
        )
        self.priority = _settings(
            "priority", priority, {"alpha": None, "beta": 0.4, "beta_batches": None, "block": BLOCK}
        )
        self.transform = _settings("transform", transform, {"size": None, "colour": None})
        if isinstance(relabel, str) and relabel not in RELABEL:
            raise UserError(f"data.relabel={relabel} is unknown; choose one of {', '.join(RELABEL)}, or null")
        if type(workers) is not int or workers < 0:
            raise UserError(f"data.workers={workers} must be a whole number of at least 0")
        if type(replacement) is not bool:
            raise UserError(f"data.replacement={replacement} must be true or false")
        if best_share is not None and not (isinstance(best_share, int | float) and 0 < best_share <= 1):
            raise UserError(f"data.best_share={best_share} must be above 0 and at most 1, or null for all episodes")
        if ahead is not None and (type(ahead) is not int or ahead < 1):
            raise UserError(
                f"data.ahead={ahead} must be a whole number of steps of at least 1, or null for no outcomes"
            )
        self.store: Any = open_stores(store, Transform(**self.transform))
        self.budget, self.validation_share = budget, validation_share
        self.splits, self.lengths = None, None
        if budget is not None:
            self.splits = few_shot(self.store, budget, validation_share, seed, self.validation["length"])
            if (self.splits["lengths"] < self.store.lengths).any():
                self.lengths = self.splits["lengths"]
                whole = {"ahead": ahead, "relabel": relabel, "best_share": best_share}
                whole["weights.return"] = (weights or {}).get("return")
                if given := [name for name, value in whole.items() if value is not None]:
                    raise UserError(
                        f"budget={budget} holds no two whole episodes, which data.{given[0]} looks at; set it to null, "
                        "or give a larger budget=..."
                    )
        self.replay = _settings("replay", replay, {"store": None, "share": 0.25})
        self._replay = None
        if self.replay["store"] is not None:
            if self.priority["alpha"] is not None or ahead is not None:
                raise UserError("replay.store cannot go with data.priority.alpha or data.ahead; set them to null")
            old, share = self.replay["store"], self.replay["share"]
            self._replay = Replay(store, old, share, batch_size, Transform(**self.transform))
        if workers and is_url(self.store.path):
            raise UserError(
                f"data.workers={workers} cannot be had with {self.store.path}, as what reads a URL does not survive in "
                "forked processes; give data.workers=0, or copy the store to a disk"
            )
        self.batch_size, self.length, self.left_padding = batch_size, length, left_padding
        self.event_share, self.seed, self.prefetch, self.workers = event_share, seed, max(1, prefetch), workers
        self.event_rows, self.right_padding = event_rows, right_padding
        self.replacement, self.relabel = replacement, relabel
        self.weights = {name: value for name, value in (weights or {}).items() if (name, value) != ("games", None)}
        self._by_number = self._weights()
        self.best_share, self.keep_starts = best_share, False
        self.outcomes = None if ahead is None else Outcomes(self.store, ahead)
        self._drawn = 0
        self._sampler: WindowSampler | None = None
        self._priorities: dict[str, Any] | None = None  # of a checkpoint, until they are needed

    @property
    def learned(self) -> Any:
        """The store, or with what is replayed all stores in one: training batches are from there."""
        return (self._replay or self).store

    @property
    def card(self) -> Card:
        """The dataset card of the frames as they are handed out; of several stores that of the first, with `games`.

        What is replayed is among them: a model that goes on learning a game still knows it.
        """
        return self.learned.card

    def greatest_reward(self) -> float:
        """The greatest absolute reward that there is to learn, with what is replayed."""
        lengths = self.store.lengths if self.lengths is None else self.lengths
        found = greatest_reward(self.store, self._best(self._split("train")), lengths)
        if self._replay is None:
            return found
        return max(found, greatest_reward(self._replay.store, self._replay.episodes, self._replay.store.lengths))

    def batches_drawn(self) -> int:
        """Training batches that the trainer has used so far, earlier runs of a resumed training included."""
        # not the number handed out: Lightning fetches one ahead, and an exception leaves one half done
        if self.trainer is None:
            return self._drawn
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
        return max(progress["total"]["processed"], self._drawn)

    def train_dataloader(self) -> Batches:
        """Endless batches, read ahead by one thread (processes cost more than the decoding) or by workers."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        episodes = self._best(self._split("train"))
        # batch k is drawn when the one `prefetch` before it is handed out (for each worker), and that to Lightning,
        # which asks for a batch before it trains on the one that it has
        lag = self.prefetch * max(1, self.workers) + 2
        sampler = WindowSampler(
            self.store,
            episodes,
            self.batch_size - (self._replay.count if self._replay else 0),
            self.length,
            self.left_padding,
            self.event_share,
            self.seed,
            rank,
            world,
            self.replacement,
            self._by_number,
            self._games(episodes),
            self.priority,
            lag,
            self.event_rows,
            self.right_padding,
            self.lengths,
        )
        if sampler.priorities and self._sampler:
            sampler.priorities = self._sampler.priorities
        if sampler.priorities and self._priorities:
            sampler.priorities.load_state_dict(self._priorities)
        self._sampler, self._priorities = sampler, None
        relabel = RELABEL[self.relabel] if isinstance(self.relabel, str) else self.relabel
        pin = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        store, lengths, draws = self.store, self.lengths, lambda: self._draws(sampler)
        if self._replay:
            names = ("length", "left_padding", "event_share", "event_rows", "right_padding")
            drawn = {name: getattr(self, name) for name in names}
            old = self._replay.sampler(self.seed, rank=rank, world=world, **drawn)
            store, draws = self._replay.store, lambda: self._replayed(self._draws(sampler), old)
            if lengths is not None:
                lengths = np.concatenate([lengths, store.lengths[self._replay.first :]])
        reader = Reader(store, self.length, relabel, self.outcomes, self.keep_starts, lengths)
        # bare, since a DataLoader around it would take a tenth of a millisecond for each batch
        return Batches(draws, reader, self.prefetch, self.workers, pin)

    def _replayed(self, draws: Iterator[Draw], old: WindowSampler) -> Iterator[Draw]:
        assert self._replay is not None
        return self._replay.joined(draws, old, self.batches_drawn())

    def _best(self, episodes: np.ndarray) -> np.ndarray:
        """Those of the best return, of each game alike; one at least of each."""
        if self.best_share is None:
            return episodes
        returns = episode_returns(self.store)[episodes]
        games = self._games(episodes)
        chosen = []
        for game in np.unique(games):
            mine = np.flatnonzero(games == game)
            order = mine[np.argsort(-returns[mine], kind="stable")]
            chosen.append(order[: max(1, round(self.best_share * len(mine)))])
        return np.sort(episodes[np.concatenate(chosen)])

    def _weights(self) -> dict[str, Any]:
        """The weights with those of games by their numbers, as the sampler takes them."""
        named, known = self.weights.get("games"), self.store.card.get("games", [self.store.card["game"]])
        if named is None:
            return self.weights
        if not isinstance(named, Mapping) or not set(named) <= set(known):
            raise UserError(f"data.weights.games={named} must be numbers by the names of games in the log: {known}")
        if not all(type(value) in (int, float) and 0 < value < np.inf for value in named.values()):
            raise UserError(f"data.weights.games={named} must be numbers above 0, such as {{{known[0]}: 2.0}}")
        return {**self.weights, "games": np.array([named.get(game, 1.0) for game in known])}

    def _games(self, episodes: np.ndarray) -> np.ndarray:
        """Number of the game of each episode."""
        return self.store.games[episodes] if isinstance(self.store, Mixture) else np.zeros(len(episodes), np.int64)

    def _draws(self, sampler: WindowSampler) -> Iterator[Draw]:
        """What the batches from the first unused one on are made of."""
        first = self.batches_drawn()
        if sampler.priorities:
            sampler.priorities.rewind(first)
        for k in count(first):
            starts, importance = sampler(k), None
            if sampler.priorities:
                importance = sampler.priorities.importance(k, sampler.windows(starts))
            yield Draw(starts, importance, sampler.generator(k, stream=1))

    def update(self, starts: Tensor, priorities: Tensor) -> None:
        """Tell how much the windows of the present batch matter, e.g. their losses; call it in `training_step`.

        Every rank calls it, with as many windows, and all ranks then draw by the priorities of all.

        Args:
            starts: (B, 2) int64, the batch's `side["starts"]`.
            priorities: (B,), finite and above 0.

        Raises:
            UserError: windows are not drawn by priority, or a priority is out of range.
        """
        if self.trainer is None or self._sampler is None or self._sampler.priorities is None:
            raise UserError("priorities are only taken while a trainer trains with data.priority.alpha set")
        starts, priorities = starts.detach(), priorities.detach().double()
        if self.trainer.world_size > 1:
            starts, priorities = (self.trainer.strategy.all_gather(x).flatten(0, 1) for x in (starts, priorities))
        windows = self._sampler.windows(starts.cpu().numpy())
        self._sampler.priorities.update(self.batches_drawn(), windows, priorities.cpu().numpy())

    def val_dataloader(self) -> DataLoader:
        """The fixed validation windows."""
        return self._windows("validation")

    def test_dataloader(self) -> DataLoader:
        """Fixed windows of the test episodes."""
        return self._windows("test")

    def _windows(self, split: str) -> DataLoader:
        size, length = self.validation["batch_size"], self.validation["length"]
        episodes, windows = self._best(self._split(split)), self.validation["windows"]
        starts = shared_windows(self.store, self._games(episodes), episodes, windows, length, self.lengths)
        batches = [starts[i : i + size] for i in range(0, len(starts), size)]
        reader = Reader(self.store, length, None, self.outcomes, lengths=self.lengths)
        rng = np.random.default_rng(0)  # nothing is drawn from it
        return DataLoader(Windows(lambda i: reader.read(Draw(batches[i], None, rng)), len(batches)), batch_size=None)

    def _split(self, split: str) -> np.ndarray:
        episodes = (self.splits or self.store.splits)[split]
        if not len(episodes):
            raise UserError(
                f"the store {self.store.path} has {len(self.store.lengths)} episodes and none of them in its {split} "
                "split; collect at least 3 episodes into a new store"
            )
        return episodes

    def transfer_batch_to_device(self, batch: Segment, device: torch.device, dataloader_idx: int) -> Segment:
        """Move a segment, without waiting where its memory is pinned."""
        return batch.to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """How many training batches were used, what they were drawn from, and the priorities."""
        state, priorities = {"drawn": self.batches_drawn(), **self._origin()}, self._priorities
        if self._sampler and self._sampler.priorities:
            priorities = self._sampler.priorities.state_dict(state["drawn"])
        return {**state, "priorities": priorities} if priorities else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the batch after the last one used."""
        self._drawn, self._priorities = state_dict["drawn"], state_dict.get("priorities")
        changed = [k for k, v in self._origin().items() if state_dict.get(k, v) != v]
        if changed:
            warnings.warn(f"training resumes on other batches than it left: {', '.join(changed)} changed", stacklevel=2)

    def _origin(self) -> dict[str, Any]:
        keys = ("batch_size", "length", "left_padding", "event_share", "seed")
        keys += ("replacement", "weights", "best_share", "priority", "transform", "event_rows", "right_padding")
        keys += ("budget", "validation_share", "replay")
        return {"store": self.store.uuid, "episodes": len(self.store.lengths)} | {k: getattr(self, k) for k in keys}


def _settings(name: str, given: Mapping[str, Any] | None, defaults: dict[str, Any]) -> dict[str, Any]:
    if unknown := set(given or {}) - set(defaults):
        raise UserError(f"data.{name} has no setting {min(unknown)!r}; it has {', '.join(defaults)}")
    return defaults | dict(given or {})

"""Feeds a learner with windows of a store, and resumes at exactly the batch where training stopped."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, IterableDataset

from worldmodels.data.card import Card
from worldmodels.data.sampling import WindowSampler, even_windows
from worldmodels.data.store import Store
from worldmodels.types import Segment, UserError


class StoreDataModule(LightningDataModule):
    """Endless training batches and fixed validation and test windows of one store, each a whole `Segment`.

    Training batch k is a pure function of (seed, rank, world size, k); how many were used is read from the trainer, so
    that a resumed run goes on with the next one. The stream never ends: give the trainer `max_steps` and an integer
    `val_check_interval`.

    Args:
        store: folder of the store.
        batch_size: windows a batch on each device.
        length: transitions T a window.
        left_padding: how many steps before its episode a training window may start.
        event_share: share of a training batch drawn around rewards and terminations.
        seed: of the stream of training batches.
        validation: `windows` (how many), `length` and `batch_size` of validation and test windows; the latter two are
            as in training where they are not given.
        prefetch: batches that are read ahead by one thread.

    Raises:
        UserError: no store, or one without episodes, at `store`.
    """

    def __init__(
        self,
        store: str,
        batch_size: int = 32,
        length: int = 8,
        left_padding: int = 0,
        event_share: float = 0.0,
        seed: int = 0,
        validation: Mapping[str, int] | None = None,
        prefetch: int = 2,
    ) -> None:
        super().__init__()
        self.store = Store.open(store)
        self.batch_size, self.length, self.left_padding = batch_size, length, left_padding
        self.event_share, self.seed, self.prefetch = event_share, seed, prefetch
        defaults = {"windows": 64, "length": length, "batch_size": batch_size}
        if unknown := set(validation or {}) - set(defaults):
            raise UserError(f"data.validation has no setting {min(unknown)!r}; it has {', '.join(defaults)}")
        self.validation = defaults | dict(validation or {})
        self._drawn = 0

    @property
    def card(self) -> Card:
        """The dataset card of the store."""
        return self.store.card

    def batches_drawn(self) -> int:
        """Training batches that the trainer has used so far, earlier runs of a resumed training included."""
        # not the number handed out: Lightning fetches one ahead, and an exception leaves one half done
        if self.trainer is None:
            return self._drawn
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
        return max(progress["total"]["processed"], self._drawn)

    def train_dataloader(self) -> DataLoader:
        """Endless batches, read ahead by one thread (processes would cost more than the decoding)."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = WindowSampler(
            self.store,
            self._split("train"),
            self.batch_size,
            self.length,
            self.left_padding,
            self.event_share,
            self.seed,
            rank,
            world,
        )
        pin = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

        def batch(k: int) -> Segment:
            segment = self.store.read(sampler(k), self.length)
            return segment.map(torch.Tensor.pin_memory) if pin else segment

        return DataLoader(_Batches(batch, self.batches_drawn, self.prefetch), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """The fixed validation windows."""
        return self._windows("validation")

    def test_dataloader(self) -> DataLoader:
        """Fixed windows of the test episodes."""
        return self._windows("test")

    def _windows(self, split: str) -> DataLoader:
        size, length = self.validation["batch_size"], self.validation["length"]
        starts = even_windows(self.store, self._split(split), self.validation["windows"], length)
        batches = [starts[i : i + size] for i in range(0, len(starts), size)]
        return DataLoader(_Windows(lambda i: self.store.read(batches[i], length), len(batches)), batch_size=None)

    def _split(self, split: str) -> Any:
        episodes = self.store.splits[split]
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
        """How many training batches were used, and what they were drawn from."""
        return {"drawn": self.batches_drawn(), **self._origin()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the batch after the last one used."""
        self._drawn = state_dict["drawn"]
        changed = [k for k, v in self._origin().items() if state_dict.get(k, v) != v]
        if changed:
            warnings.warn(f"training resumes on other batches than it left: {', '.join(changed)} changed", stacklevel=2)

    def _origin(self) -> dict[str, Any]:
        keys = ("batch_size", "length", "left_padding", "event_share", "seed")
        return {"store": self.store.uuid, "episodes": len(self.store.lengths)} | {k: getattr(self, k) for k in keys}


class _Windows(Dataset):
    def __init__(self, batch: Callable[[int], Segment], length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Segment:
        return self.batch(index)


class _Batches(IterableDataset):
    """batch(k), batch(k+1), ... from the k that `first` gives when iterating begins, `ahead` of them read early."""

    def __init__(self, batch: Callable[[int], Segment], first: Callable[[], int], ahead: int) -> None:
        self.batch, self.first, self.ahead = batch, first, ahead

    def __iter__(self) -> Iterator[Segment]:
        numbers = count(self.first())
        with ThreadPoolExecutor(1, "read-ahead") as thread:
            waiting = deque(thread.submit(self.batch, next(numbers)) for _ in range(max(1, self.ahead)))
            while True:
                segment = waiting.popleft().result()
                waiting.append(thread.submit(self.batch, next(numbers)))
                yield segment

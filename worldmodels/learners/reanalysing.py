"""Searches every row of a store again, and keeps the targets beside it: many ranks share the work, and it resumes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, RichProgressBar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from worldmodels.data.disk import atomic, remove
from worldmodels.data.reanalyse import search_rows
from worldmodels.data.side import mark_latest
from worldmodels.data.store import Store
from worldmodels.data.targets import COLUMNS, about_targets
from worldmodels.data.transforms import Transform
from worldmodels.learners.fit import quiet, trainer_of
from worldmodels.models.muzero import MuZero
from worldmodels.ops.draws import row_gumbel
from worldmodels.planning.planners import Planner
from worldmodels.types import Segment, UserError

AS_LOGGED = Transform()
RUN = 16
"""Neighbouring rows that are read together, so that a frame is read once and not once for each row that sees it."""


class Chunk(NamedTuple):
    """Windows of a store whose last `RUN` rows are searched.

    Args:
        index: of the chunk.
        number: (B, RUN) int64, of each row among all of the store.
        segment: the windows.
    """

    index: int
    number: Tensor
    segment: Segment


class Chunks(Dataset):
    """All rows of a store that are sealed, in chunks of a fixed order.

    Args:
        store: read from.
        frames: that a row sees, its own among them.
        windows: of `RUN` rows a chunk.
        transform: of the frames, as the model saw them in training.
        left: which chunks are still to be done; None: all.
    """

    def __init__(
        self,
        store: Store,
        frames: int,
        windows: int,
        transform: Transform = AS_LOGGED,
        left: Sequence[int] | None = None,
    ) -> None:
        lengths = store.sealed_lengths
        counts = -(-lengths // RUN)
        episode = np.repeat(np.arange(len(counts)), counts)
        first = (np.arange(len(episode)) - np.repeat(counts.cumsum() - counts, counts)) * RUN
        self.starts, self.offsets = np.stack([episode, first], 1), np.concatenate([[0], lengths.cumsum()])
        self.store, self.frames, self.windows, self.transform = store, frames, windows, transform
        self.count = -(-len(episode) // windows)
        self.left = list(range(self.count)) if left is None else list(left)

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, place: int) -> Chunk:
        index = self.left[place]
        starts = self.starts[index * self.windows : (index + 1) * self.windows]
        number = self.offsets[starts[:, 0], None] + starts[:, 1, None] + np.arange(RUN)
        before = self.frames - 1
        segment = self.transform(self.store.read(starts - [0, before], before + RUN))
        return Chunk(index, torch.from_numpy(number), segment)


class Reanalyser(L.LightningModule):
    """Searches chunks; kept out of training.

    Args:
        model: that searches.
        search: with its settings; None: the logged action, and the model's own value.
        noise_key: as in `MuZeroLearner.noise_key`.
        chunks: those that are left.
        step: of the training that made the model, for errors.
    """

    def __init__(
        self, model: MuZero, search: Planner | None, noise_key: tuple[int, ...] | None, chunks: Chunks, step: int
    ) -> None:
        super().__init__()
        self.model, self.search, self.noise_key = model.eval(), search, noise_key
        self.chunks, self.step = chunks, step
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader:
        """This rank's share, which may be none: Lightning's own sampler refuses fewer chunks than ranks."""
        own = range(self.trainer.global_rank, len(self.chunks), self.trainer.world_size)
        return DataLoader(Subset(self.chunks, own), batch_size=None)

    def predict_step(self, chunk: Chunk, batch_idx: int) -> dict[str, Any]:
        """Rows, policies and values of a chunk."""
        segment, before = chunk.segment, self.model.frames - 1
        rows = range(before, before + RUN)
        chosen = segment.mask[:, before:]
        if self.search is None:  # the logged action is the policy, and one that the model has not is none
            chosen = chosen & (self.model.places(segment)[:, before:] >= 0)
        number = chunk.number[chosen.cpu()].numpy()
        noise = None
        if self.noise_key is not None:
            noise = row_gumbel(number, len(self.model.actions), *self.noise_key).to(self.device)
        where = f"in chunk {chunk.index} of {self.chunks.store.path}, searched by the model of step {self.step}"
        found = search_rows(self.model, segment, rows, chosen, self.search, noise, where)
        return {"index": chunk.index, "rows": number, "policy": found.policy.cpu(), "value": found.value.cpu()}

    def transfer_batch_to_device(self, batch: Chunk, device: torch.device, dataloader_idx: int) -> Chunk:
        """Move the frames."""
        return batch._replace(segment=batch.segment.to(device, non_blocking=True))


class Parts(BasePredictionWriter):
    """Writes each chunk to a file of its own, whole or not at all.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: dict[str, Any], *_: Any) -> None:
        """Write it."""
        with atomic(self.folder / f"{prediction['index']:07d}.npz") as tmp, tmp.open("wb") as file:
            rows, policy, value = (np.asarray(prediction[name]) for name in ("rows", "policy", "value"))
            np.savez(file, rows=rows, policy=policy, value=value)


def reanalyse(
    store: Store,
    model: MuZero,
    search: Planner | None,
    version: str,
    folder: Path,
    trainer: Mapping[str, Any],
    noise_key: tuple[int, ...] | None = None,
    windows: int = 16,
    transform: Transform = AS_LOGGED,
    *,
    step: int,
    **facts: Any,
) -> int:
    """Write `version` of the side columns `reanalysed_policy` and `reanalysed_value`; what is done is not done again.

    Rows that are still staged get no targets, since the columns of a store are of its segments.

    Args:
        store: whose rows are searched.
        model: that searches.
        search: as in `search_rows`.
        version: name of the targets.
        folder: of this model and this search, where chunks are kept until all are there.
        trainer: arguments of `lightning.Trainer` that say where the work is done.
        noise_key: as in `MuZeroLearner.noise_key`.
        windows: of 16 rows a chunk.
        transform: of the frames, as the model saw them in training.
        step: of the training that made the model.
        facts: what else is kept beside the columns.

    Returns:
        The number of rows that have targets, on rank 0, and 0 on the others.

    Raises:
        UserError: nothing is sealed, the version is there and other, Lightning refuses `trainer`, the disk refuses, or
            the model gives a number that is not finite.
        KeyboardInterrupt: stopped; what is done is kept.
    """
    quiet()
    whole = Chunks(store, model.frames, windows, transform)
    count = int(whole.offsets[-1])
    if not count:
        raise UserError(f"no episode of the store {store.path} is sealed yet; end its writing, or open it for writing")
    folder = folder / f"{store.uuid}-{count}-{windows}"
    engine = trainer_of(
        **trainer,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[Parts(folder), RichProgressBar()],
        default_root_dir=folder,
    )
    about = about_targets(store, version, model.actions, sealed=count, step=step, **facts)
    missing = [name for name in COLUMNS if not _there(store, COLUMNS[name], version, about)]
    if not missing:
        if not engine.is_global_zero:
            return 0
        if folder.exists():  # killed when the columns were there
            _make_newest(store, version)
            remove(folder)
        return int(store.side(COLUMNS["value"], version).count())
    folder.mkdir(parents=True, exist_ok=True)
    left = [k for k in range(whole.count) if not (folder / f"{k:07d}.npz").exists()]
    if left:
        chunks = Chunks(store, model.frames, windows, transform, left)
        try:
            engine.predict(Reanalyser(model, search, noise_key, chunks, step), return_predictions=False)
        except SystemExit as stop:  # Lightning's answer to Ctrl-C and SIGTERM
            raise KeyboardInterrupt from stop
    engine.strategy.barrier()
    if not engine.is_global_zero:
        return 0
    parts = []
    for k in range(whole.count):
        with np.load(folder / f"{k:07d}.npz", allow_pickle=False) as part:
            parts.append([part[name] for name in ("rows", "policy", "value")])
    rows, policy, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    for name in missing:
        store.write_side(COLUMNS[name], version, rows, {"policy": policy, "value": value}[name], about)
    _make_newest(store, version)  # a column may have been written before this call, and not been told of
    remove(folder)
    return len(rows)


def _make_newest(store: Store, version: str) -> None:
    for name in COLUMNS.values():
        mark_latest(store.path / "side" / name / version)


def _there(store: Store, name: str, version: str, about: Mapping[str, Any]) -> bool:
    """Whether a side column has this very version.

    Raises:
        UserError: it has another one of this name.
    """
    if not (store.path / "side" / name / version).exists():
        return False
    if store.side_about(name, version) != json.loads(json.dumps(about)):
        raise UserError(
            f"the store {store.path} has other targets of the name {version}, made by another model or search, or "
            "before it grew; give another version=NAME"
        )
    return True

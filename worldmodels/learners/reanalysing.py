"""Searches every row of a store again, and keeps the targets beside it: many ranks share the work, and it resumes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, RichProgressBar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from worldmodels.data.disk import atomic
from worldmodels.data.reanalyse import COLUMNS, about_targets, search_rows
from worldmodels.data.store import Store
from worldmodels.learners.fit import quiet
from worldmodels.models.muzero import MuZero
from worldmodels.ops.draws import row_gumbel
from worldmodels.planning.planners import Planner
from worldmodels.types import Segment

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
        left: which chunks are still to be done; None: all.
    """

    def __init__(self, store: Store, frames: int, windows: int, left: Sequence[int] | None = None) -> None:
        counts = -(-store.lengths // RUN)
        episode = np.repeat(np.arange(len(counts)), counts)
        first = (np.arange(len(episode)) - np.repeat(counts.cumsum() - counts, counts)) * RUN
        self.starts, self.offsets = np.stack([episode, first], 1), store.offsets
        self.store, self.frames, self.windows = store, frames, windows
        self.count = -(-len(episode) // windows)
        self.left = list(range(self.count)) if left is None else list(left)

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, place: int) -> Chunk:
        index = self.left[place]
        starts = self.starts[index * self.windows : (index + 1) * self.windows]
        number = self.offsets[starts[:, 0], None] + starts[:, 1, None] + np.arange(RUN)
        before = self.frames - 1
        return Chunk(index, torch.from_numpy(number), self.store.read(starts - [0, before], before + RUN))


class Reanalyser(L.LightningModule):
    """Searches chunks; kept out of training.

    Args:
        model: that searches.
        search: with its settings; None: the logged action, and the model's own value.
        noise_key: as in `MuZeroLearner.noise_key`.
    """

    def __init__(self, model: MuZero, search: Planner | None, noise_key: tuple[int, ...] | None) -> None:
        super().__init__()
        self.model, self.search, self.noise_key = model.eval(), search, noise_key

    def predict_step(self, chunk: Chunk, batch_idx: int) -> dict[str, Any]:
        """Rows, policies and values of a chunk."""
        segment, before = chunk.segment, self.model.frames - 1
        rows = range(before, before + RUN)
        chosen = segment.mask[:, before:]
        number = chunk.number[chosen].cpu().numpy()
        noise = None
        if self.noise_key is not None:
            noise = row_gumbel(number, len(self.model.actions), *self.noise_key).to(self.device)
        found = search_rows(self.model, segment, rows, chosen, self.search, noise)
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
    **facts: Any,
) -> int:
    """Write `version` of the side columns `reanalysed_policy` and `reanalysed_value`; what is done is not done again.

    Args:
        store: whose rows are searched.
        model: that searches.
        search: as in `search_rows`.
        version: name of the targets.
        folder: where chunks are kept until all are there.
        trainer: arguments of `lightning.Trainer` that say where the work is done.
        noise_key: as in `MuZeroLearner.noise_key`.
        windows: of 16 rows a chunk.
        facts: what is kept beside the columns, the `step` of the training among it.

    Returns:
        The number of rows that have targets.

    Raises:
        UserError: the disk refuses, or the model gives a number that is not finite.
        KeyboardInterrupt: stopped; what is done is kept.
    """
    quiet()
    folder.mkdir(parents=True, exist_ok=True)
    whole = Chunks(store, model.frames, windows)
    left = [k for k in range(whole.count) if not (folder / f"{k:07d}.npz").exists()]
    engine = L.Trainer(
        **trainer,
        logger=False,
        enable_checkpointing=False,
        callbacks=[Parts(folder), RichProgressBar()],
        default_root_dir=folder,
    )
    loader = DataLoader(Chunks(store, model.frames, windows, left), batch_size=None)
    if left:
        try:
            engine.predict(Reanalyser(model, search, noise_key), loader, return_predictions=False)
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
    about = about_targets(store, version, model, **facts)
    for name, array in (("policy", policy), ("value", value)):
        if not (store.path / "side" / COLUMNS[name] / version).exists():
            store.write_side(COLUMNS[name], version, rows, array, about)
    return len(rows)

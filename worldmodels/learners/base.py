"""What every learner has: a score that chooses its best checkpoint, noise by batch, and a learning rate by step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from worldmodels.types import UserError

SCHEDULES = ("constant", "cosine", "linear")
LOOK_EVERY = {"cpu": 1}  # batches between two looks at their losses; 50 on a device that would be waited for


class Score(NamedTuple):
    """What is measured in validation and chooses the best checkpoint; more is better.

    Args:
        key: under which it is logged.
        figure: its name in metrics.json.
        words: how it is told.
        unit: after the number, with its space.
    """

    key: str
    figure: str
    words: str
    unit: str = ""


class Learner(L.LightningModule):
    """Trains `self.model`, and has `seed`, `warmup`, `schedule` and `max_steps` among its settings.

    Whether losses are finite is looked at in every batch on a CPU, before it touches the weights. Elsewhere the first
    bad one is noted on the device and looked for every 50 batches, and before any checkpoint is written, which is then
    refused: the checkpoints that there are hold what was before the bad batch in either case.
    """

    score: Score
    model: Any
    _bad: tuple[Tensor, Tensor] | None = None  # number and loss of the first bad batch, -1 while there is none

    def check_settings(self) -> None:
        """Refuse an unknown schedule; for after `save_hyperparameters`."""
        if (schedule := self.hparams["schedule"]) not in SCHEDULES:
            raise UserError(f"learner.schedule={schedule} is unknown; choose one of {', '.join(SCHEDULES)}")

    def prepare(self, data: Any, resumed: bool) -> None:
        """Called before training with the data module: refuses data that do not fit, and begins where settings say.

        Raises:
            UserError: the data do not fit the settings.
        """

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these weights of the model, a `state_dict`."""
        self.model.load_state_dict(weights)

    def player(self) -> Any:
        """What plays the real game where its score is asked for."""
        return self.model

    def batch_number(self) -> int:
        """Number of the training batch at hand, over all resumes."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed

    def noise(self) -> torch.Generator:
        """Random numbers of the batch at hand, a function of (seed, rank, batch number), so that resuming is exact."""
        sequence = np.random.SeedSequence((self.hparams["seed"], self.global_rank, self.batch_number()))
        key = sequence.generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(key[0] >> 1))

    def refuse_broken(self, loss: Tensor, now: bool = False) -> None:
        """Refuse to go on from a loss that is not finite, if it is time to look at them.

        Args:
            loss: of the batch at hand.
            now: look at once, where the device is waited for in any case.

        Raises:
            UserError: naming the batch.
        """
        batch = self.batch_number()
        self._note(batch, loss.detach())
        if now or batch % LOOK_EVERY.get(self.device.type, 50) == 0:
            self._refuse_bad(batch)

    def _note(self, batch: int, loss: Tensor) -> None:
        """Keep number and loss of the first bad batch, without waiting for the device."""
        if self._bad is None:
            self._bad = torch.full_like(loss, -1, dtype=torch.int64), torch.zeros_like(loss)
        number, kept = self._bad
        new = (number < 0) & ~loss.isfinite()
        self._bad = torch.where(new, batch, number), torch.where(new, loss, kept)

    def _refuse_bad(self, present: int | None = None) -> None:
        """Raise where a batch was bad; the weights are still whole, and may be kept, where it is the present one."""
        if self._bad is None or (batch := int(self._bad[0])) < 0:
            return
        loss = self._bad[1].item()
        if batch == present:
            self._bad = None
        raise UserError(
            f"the loss of batch {batch} (seed {self.hparams['seed']}, rank {self.global_rank}) is {loss}; "
            "what last.ckpt holds is from before it: go on with trainer.precision=32-true, or begin again with "
            "resume=never and a lower learner.lr"
        )

    def on_train_start(self) -> None:
        """Nothing bad is known of this run."""
        self._bad = None

    def on_train_end(self) -> None:
        """The last batches may not have been looked at."""
        self._refuse_bad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let no state be written that a bad batch had a part in, on this rank or, by its gradients, on another."""
        self._refuse_bad()
        if not torch.stack([p.isfinite().all() for p in self.parameters()]).all():
            raise UserError(
                "some weights are no longer finite, so that no checkpoint is written; what last.ckpt holds is from "
                "before: go on with trainer.precision=32-true, or begin again with resume=never and a lower learner.lr"
            )

    def _lr_factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.hparams["warmup"]))
        left = 1 - min(1.0, step / self.hparams["max_steps"])
        fall = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - np.cos(np.pi * left))}
        return rise * float(fall[self.hparams["schedule"]])

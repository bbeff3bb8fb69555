"""What every learner has: a score that chooses its best checkpoint, noise by batch, its optimiser and its means."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from worldmodels.learners.means import GameMeans, over_games
from worldmodels.types import Metrics, UserError

SCHEDULES = ("constant", "cosine", "linear")
NOT_DECAYED = (nn.Embedding, nn.GroupNorm, nn.LayerNorm)
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
    """AdamW over `self.model`.

    Settings of all are `lr`, `weight_decay` and `eps` of the optimiser; `clip`, the greatest gradient norm; `warmup`,
    `schedule` and `max_steps` of the learning rate; and `seed`.

    Whether losses are finite is looked at in every batch on a CPU, before it touches the weights. Elsewhere the first
    bad one is noted on the device and looked for every 50 batches, and before any checkpoint is written, which is then
    refused: the checkpoints that there are hold what was before the bad batch in either case.
    """

    score: Score
    model: Any
    # of the first bad batch its number (-1 while there is none), step and term, (3,) int64, and its loss
    _bad: tuple[Tensor, Tensor] | None = None
    _terms: Sequence[str] = ()

    def check_settings(self) -> None:
        """Refuse an unknown schedule, a seed or actions that are none; for after `save_hyperparameters`."""
        if (schedule := self.hparams["schedule"]) not in SCHEDULES:
            raise UserError(f"learner.schedule={schedule} is unknown; choose one of {', '.join(SCHEDULES)}")
        if type(seed := self.hparams["seed"]) is not int or seed < 0:
            raise UserError(f"learner.seed={seed} must be a whole number of at least 0")
        actions = self.hparams.get("actions", [])
        for mine in actions.values() if isinstance(actions, Mapping) else [actions]:  # of several games, of one
            if not isinstance(mine, list | tuple) or any(type(action) is not int for action in mine):
                raise UserError(f"learner.actions={actions} must be a list of indices into ALE's 18, such as [0,3,4]")

    def prepare(self, data: Any, resumed: bool) -> None:
        """Called before training with the data module: refuses data that do not fit, and begins where settings say.

        Args:
            data: the data module.
            resumed: the weights are there already, of this run or of the model that it begins with.

        Raises:
            UserError: the data do not fit the settings.
        """

    @cached_property
    def means(self) -> GameMeans:
        """Of what validation measures, of each game by itself where the log is of several."""
        return GameMeans((self.hparams["card"] or {}).get("games", ()))

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these weights of the model, a `state_dict`."""
        self.model.load_state_dict(weights)

    def networks(self) -> list[nn.Module]:
        """What may be compiled in place."""
        return getattr(self.model, "networks", list)()

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

    def refuse_broken(self, loss: Tensor, metrics: Metrics, now: bool = False) -> None:
        """Refuse to go on from a loss that is not finite, if it is time to look at them.

        Args:
            loss: of the batch at hand.
            metrics: with the loss's terms among them.
            now: look at once, where the device is waited for in any case.

        Raises:
            UserError: naming the batch, the step and the term.
        """
        batch = self.batch_number()
        self._note(batch, loss.detach(), {k: v for k, v in metrics.items() if v.ndim == 0 and k != "loss"})
        if now or batch % LOOK_EVERY.get(self.device.type, 50) == 0:
            self._refuse_bad(batch)

    def _note(self, batch: int, loss: Tensor, terms: Metrics) -> None:
        """Keep what is told of the first bad batch, without waiting for the device."""
        if self._bad is None:
            self._bad = loss.new_full((3,), -1, dtype=torch.int64), torch.zeros_like(loss)
        place, kept = self._bad
        self._terms = [*terms, "loss"]  # itself the last, since it may overflow where none of them does
        term = torch.stack([*terms.values(), loss]).isfinite().logical_not().int().argmax()
        here = torch.stack([torch.full_like(term, batch), torch.full_like(term, self.global_step), term])
        new = (place[0] < 0) & ~loss.isfinite()
        self._bad = torch.where(new, here, place), torch.where(new, loss, kept)

    def _refuse_bad(self, present: int | None = None) -> None:
        """Raise where a batch was bad; the weights are still whole, and may be kept, where it is the present one."""
        if self._bad is None or (place := self._bad[0].tolist())[0] < 0:
            return
        (batch, step, term), loss = place, self._bad[1].item()
        if batch == present:
            self._bad = None
        first = self._terms[term]
        why = "" if first == "loss" else f", and {first} the first of its terms that is not finite"
        go_on = "what last.ckpt holds is from before it: go on with trainer.precision=32-true, or begin again with"
        raise UserError(
            f"the loss of batch {batch} (optimizer step {step}, seed {self.hparams['seed']}, rank {self.global_rank}) "
            f"is {loss}{why}; "
            f"{go_on if step else 'nothing was learned before it: begin again with trainer.precision=32-true, or'} "
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

    def on_validation_epoch_end(self) -> None:
        """Log the means."""
        for name, value in over_games(self.means.finish()).items():
            self.log(f"val/{name}", value, sync_dist=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser gets."""
        return [g | {"lr": self.hparams["lr"]} for g in decay_groups(self.model, self.hparams["weight_decay"])]

    def configure_optimizers(self) -> Any:
        """One AdamW, and the schedule by step."""
        optimizer = torch.optim.AdamW(self.parameter_groups(), eps=self.hparams["eps"], fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip the norm of the whole gradient, and log it."""
        self.log("train/grad_norm", nn.utils.clip_grad_norm_(self.model.parameters(), self.hparams["clip"]))

    def _lr_factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.hparams["warmup"]))
        left = 1 - min(1.0, step / self.hparams["max_steps"])
        fall = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - np.cos(np.pi * left))}
        return rise * float(fall[self.hparams["schedule"]])


def decay_groups(component: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices and kernels with weight decay, and biases, norms and embeddings without.

    Weights that are not trained are in neither.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in component.modules():
        for parameter in (p for p in module.parameters(recurse=False) if p.requires_grad):
            whole = parameter.ndim < 2 or isinstance(module, NOT_DECAYED)
            (free if whole else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]

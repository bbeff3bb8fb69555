"""Q-learning from logs alone, with any head: the offline setting of Farebrother et al. 2024 ("Stop Regressing")."""

from typing import Any

import torch
from torch import Tensor

from worldmodels.learners.base import Score
from worldmodels.learners.policy import PolicyLearner, Targeted, rows_of
from worldmodels.models.actor_critic import ActionValues
from worldmodels.ops.returns import n_step
from worldmodels.types import Metrics, Segment, UserError


class OfflineQLearner(Targeted, PolicyLearner):
    """Double Q-learning over n steps with a target network, and a conservative term that keeps to the logged actions.

    Sources: van Hasselt et al. 2016; Kumar et al. 2020 (CQL), the term log sum_a exp Q(s, a) - Q(s, logged action).

    Errors of temporal differences are least where nothing is known yet, so they rank no policies: the newest checkpoint
    counts as the best.

    Args:
        model: an `ActionValues`, as in `build_policy`; its head decides between regression and classification.
        card: dataset card of the log.
        actions: indices that may be taken.
        steps_ahead: n.
        conservative: weight of the conservative term (0: none).
        target_every: optimizer steps after which the target network is made equal.
        gamma: discount.
        clip_rewards: learn from the sign of rewards.
        life_loss_ends: a lost life ends a return as termination does.
        burn_in: rows at the start of a window that only fill the memory.
        lr: peak learning rate.
        weight_decay: of matrices and kernels.
        eps: of AdamW.
        clip: greatest norm of the gradient.
        warmup: optimizer steps over which the learning rate rises from 0.
        schedule: "constant", "cosine" or "linear", the last two to 0 at `max_steps`.
        max_steps: optimizer steps that the schedule spans.
        seed: of what is drawn in training.

    Raises:
        UserError: a setting out of range.
    """

    score = Score("val/newest", "best_step", "at step")
    model: ActionValues

    def __init__(
        self,
        model: dict[str, Any],
        card: dict[str, Any],
        actions: list[int],
        steps_ahead: int = 5,
        conservative: float = 0.1,
        target_every: int = 100,
        gamma: float = 0.985,
        clip_rewards: bool = True,
        life_loss_ends: bool = True,
        burn_in: int = 4,
        lr: float = 1e-4,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        clip: float = 10.0,
        warmup: int = 100,
        schedule: str = "constant",
        max_steps: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if steps_ahead < 1 or target_every < 1 or conservative < 0:
            raise UserError(
                f"learner.steps_ahead={steps_ahead} and target_every={target_every} must be at least 1, and "
                f"conservative={conservative} at least 0"
            )
        self.ready()

    def training_step(self, segment: Segment, batch_idx: int) -> Tensor:
        """The head's loss towards the targets, and the conservative term."""
        if self.global_step % self.hparams["target_every"] == 0:
            self.renew_target()
        loss, metrics = self._loss(segment)
        self.refuse_broken(loss, metrics)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=segment.batch_size)
        return loss

    def validation_step(self, segment: Segment, batch_idx: int) -> None:
        """The same terms on held-out play."""
        for game, windows in self.means.parts(segment):
            for name, value in self._loss(windows)[1].items():
                self.means.add(game, name, value)

    def on_validation_epoch_end(self) -> None:
        """Log the means, and the step as the score."""
        super().on_validation_epoch_end()
        self.log("val/newest", float(self.global_step))

    def _loss(self, segment: Segment) -> tuple[Tensor, Metrics]:
        hp, head = self.hparams, self.model.values
        target = self.model if self.target is None else self.target.module  # validated without having been trained
        features, segment = self.model.watch(segment, hp["burn_in"]), self.ends(segment)
        rows, legal = rows_of(segment), self.model.legal_in(segment)
        legal = None if legal is None else legal[:, None]
        with torch.no_grad():
            ahead = n_step(self.reward(segment.reward), segment.terminated, rows.stop, hp["gamma"], hp["steps_ahead"])
            place = ahead.steps + torch.arange(segment.length, device=segment.obs.device)
            best = self.model.preferences(features, legal).argmax(-1).gather(1, place)
            after = target.watch(segment, hp["burn_in"]).take_along_dim(place[..., None], 1)
            goal = target.values.backup(after, ahead.reward, ahead.discount, best)
        usable = rows.usable & self.model.allowed(segment)
        usable[:, : hp["burn_in"]] = False
        count = usable.sum().clamp(min=1)
        error = torch.where(usable, head.loss(features[:, :-1], goal, segment.action), 0.0).sum() / count
        values = self.model.preferences(features[:, :-1], legal)
        logged = values.gather(-1, segment.action[..., None])[..., 0]
        excess = torch.where(usable, values.logsumexp(-1) - logged, 0.0).sum() / count
        loss = error + hp["conservative"] * excess
        mean = torch.where(usable, logged, 0.0).sum() / count
        metrics = {"loss": loss, "loss_values": error, "conservative": excess, "value": mean}
        return loss, {name: value.detach() for name, value in metrics.items()}

"""Behaviour cloning: does what the log does, or what turned out well in it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from worldmodels.learners.base import Score
from worldmodels.learners.policy import PolicyLearner, rows_of
from worldmodels.models.actor_critic import ActorCritic
from worldmodels.ops.returns import lambda_returns
from worldmodels.types import Metrics, Segment

GREATEST_WEIGHT = 20.0


class CloningLearner(PolicyLearner):
    """Maximises the likelihood of the logged actions, and learns beside it what their returns are.

    The critic's gradient ends before the encoder: the actor is the same with and without it.

    By whole episodes the log is weighed or filtered by `data.weights.return` and `data.best_share`. By row, `advantage`
    weighs by how much better than expected things went on (Wang et al. 2018, MARWIL; Peng et al. 2019, AWR), and
    `least_ahead` filters by how they went on.

    Args:
        model: an `ActorCritic`, as in `build_policy`.
        card: dataset card of the log.
        actions: indices that may be taken.
        advantage: temperature t at which a row counts exp((return - value) / t) times, at most 20; None: all alike.
        least_ahead: a row counts only where so many points at least came in the `data.ahead` steps from it on; None:
            all. In a log of several players this leaves out the bad ones where they play badly, which a clone that gets
            into a place of theirs would go on with.
        value_weight: of the critic's loss.
        gamma: discount.
        lam: of the lambda-returns that the critic learns.
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

    score = Score("val/log_likelihood", "best_log_likelihood", "log-likelihood of logged actions")
    model: ActorCritic

    def __init__(
        self,
        model: dict[str, Any],
        card: dict[str, Any],
        actions: list[int],
        advantage: float | None = None,
        least_ahead: float | None = None,
        value_weight: float = 0.5,
        gamma: float = 0.985,
        lam: float = 0.95,
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
        self.ready()

    def training_step(self, segment: Segment, batch_idx: int) -> Tensor:
        """Negative log-likelihood of the actions, and the critic's loss."""
        loss, metrics = logged_loss(self, segment)
        self.refuse_broken(loss, metrics)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=segment.batch_size)
        return loss

    def validation_step(self, segment: Segment, batch_idx: int) -> None:
        """Likelihood of held-out actions, weighed as in training, and how often the likeliest is the one taken."""
        for game, windows in self.means.parts(segment):
            judged = judge(self, windows)
            self.means.add(game, "log_likelihood", judged.likelihood, judged.weight)
            self.means.add(game, "accuracy", judged.likeliest, judged.weight)


class Judged(NamedTuple):
    """Logged play as an actor-critic sees it, by row (B, T).

    Args:
        likelihood: log-probability of the logged action.
        likeliest: whether no other is likelier.
        weight: how much the row counts in cloning; 0 where it does not.
        error: the critic's loss.
        usable: whether the row teaches the critic.
    """

    likelihood: Tensor
    likeliest: Tensor
    weight: Tensor
    error: Tensor
    usable: Tensor


def judge(learner: PolicyLearner, segment: Segment) -> Judged:
    """See logged play through the policy of a learner that has `gamma`, `lam`, `burn_in` and what weighs rows set."""
    model: Any = learner.model
    hp, features, segment = learner.hparams, model.watch(segment, learner.hparams["burn_in"]), learner.ends(segment)
    legal = model.legal_in(segment)
    preferences = model.preferences(features[:, :-1], None if legal is None else legal[:, None])
    likelihood = preferences.log_softmax(-1).gather(-1, segment.action[..., None])[..., 0]
    rows, value = rows_of(segment), model.critic.mean(features).detach()
    returns = lambda_returns(
        learner.reward(segment.reward), value[:, 1:], segment.terminated, rows.stop, hp["gamma"], hp["lam"]
    )
    mask, usable = segment.mask & model.allowed(segment), rows.usable.clone()
    mask[:, : hp["burn_in"]] = usable[:, : hp["burn_in"]] = False
    weight = mask.float()
    if hp["advantage"] is not None:
        better = ((returns - value[:, :-1]) / hp["advantage"]).exp().clamp(max=GREATEST_WEIGHT)
        weight = torch.where(usable & mask, better, 0.0)
    if (least := hp["least_ahead"]) is not None:
        weight = weight * (segment.side["ahead"] >= least)
    error = model.critic.loss(features[:, :-1].detach(), returns)
    # padding, and a log of more actions, may hold one that is never taken
    likelihood = torch.where(mask, likelihood, 0.0)
    return Judged(likelihood, preferences.argmax(-1) == segment.action, weight, error, usable)


def logged_loss(learner: PolicyLearner, segment: Segment) -> tuple[Tensor, Metrics]:
    """The scalar loss of cloning, and of the critic by the learner's `value_weight`, with scalar metrics by name."""
    judged, hp = judge(learner, segment), learner.hparams
    cloning = -(judged.likelihood * judged.weight).sum() / judged.weight.sum().clamp(min=1e-9)
    critic = torch.where(judged.usable, judged.error, 0.0).sum() / judged.usable.sum().clamp(min=1)
    loss = cloning + hp["value_weight"] * critic
    metrics = {"loss": loss, "loss_cloning": cloning, "loss_critic": critic}
    return loss, {name: value.detach() for name, value in metrics.items()}

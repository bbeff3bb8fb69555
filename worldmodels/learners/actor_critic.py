"""An actor-critic that learns wholly in the dreams of a world model, from the starts that a log gives.

Source: Alonso et al. 2024 (DIAMOND), section 3.2 and appendix. With one step a rollout the gradient is theirs,
REINFORCE with the critic as its baseline; rollouts that are used more often take the clipped ratio of Schulman et al.
2017 (PPO), whose gradient is the same at the first use.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldmodels.data.mixing import check_fits
from worldmodels.learners.base import Score
from worldmodels.learners.cloning import logged_loss
from worldmodels.learners.policy import Apart, PolicyLearner, load_policy
from worldmodels.learners.world_model import load_learner
from worldmodels.models.actor_critic import ActorCritic
from worldmodels.ops.returns import lambda_returns
from worldmodels.types import Segment, State, UserError, WorldModel

Rollout = dict[str, Tensor]


class ActorCriticLearner(PolicyLearner):
    """Policy gradient and lambda-returns in a frozen world model, through which no gradient goes.

    A batch of windows of the log gives the starts: their last transitions are left out (`left_out`), so that no start
    lies behind the end of an episode, and the memories of model and policy are filled by what comes before. The first
    windows are the rows of the rollout; the others (`spare`) take the places of rows that end.

    Args:
        model: an `ActorCritic`, as in `build_policy`.
        card: dataset card of the log.
        actions: indices that may be taken; the world model knows no others.
        world_model: checkpoint of the world model, which is needed for training alone.
        policy: checkpoint of a policy of the same settings to begin with, such as a clone's; None: from scratch.
        horizon: imagined steps a rollout.
        left_out: last transitions of a window, before which its dream begins. With as many `data.event_rows`, windows
            that are drawn around a point (`data.event_share`) begin dreams in which it may be made or lost; with 1
            (DIAMOND) it is mostly past by then. Held-out windows leave out 1.
        spare: share of a batch that replaces rows that end.
        reuse: optimizer steps on each rollout.
        ratio_clip: of the ratio of new to old probabilities where a rollout is used more than once.
        normalise: advantages of a rollout by their mean and deviation, as PPO does (DIAMOND: not), so that how strongly
            the actor follows them does not hang on how large and how rare rewards are.
        entropy: weight of the entropy of the actor.
        value_weight: of the critic's loss.
        real_weight: of the loss of cloning on the logged windows of each batch, critic included; 0: dreams alone.
        advantage: as in `CloningLearner`, for the logged windows.
        least_ahead: likewise.
        gamma: discount.
        lam: of the lambda-returns.
        clip_rewards: learn from the sign of rewards.
        life_loss_ends: the loss of a life ends a dream and a logged return as termination does (DIAMOND), also where
            the world model tells the two apart.
        burn_in: rows of logged windows that only fill the memory where they are learned from.
        lr: peak learning rate.
        weight_decay: of matrices and kernels (DIAMOND: 0).
        eps: of AdamW.
        clip: greatest norm of the gradient (DIAMOND: 100).
        warmup: optimizer steps over which the learning rate rises from 0.
        schedule: "constant", "cosine" or "linear", the last two to 0 at `max_steps`.
        max_steps: optimizer steps that the schedule spans.
        seed: of the dreams.

    Raises:
        UserError: a setting out of range.
    """

    score = Score("val/imagined_return", "best_imagined_return", "imagined return")
    model: ActorCritic

    def __init__(
        self,
        model: dict[str, Any],
        card: dict[str, Any],
        actions: list[int],
        world_model: str | None = None,
        policy: str | None = None,
        horizon: int = 15,
        left_out: int = 1,
        spare: float = 0.25,
        reuse: int = 1,
        ratio_clip: float = 0.2,
        normalise: bool = False,
        entropy: float = 1e-3,
        value_weight: float = 1.0,
        real_weight: float = 0.0,
        advantage: float | None = None,
        least_ahead: float | None = None,
        gamma: float = 0.985,
        lam: float = 0.95,
        clip_rewards: bool = True,
        life_loss_ends: bool = True,
        burn_in: int = 4,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        clip: float = 100.0,
        warmup: int = 100,
        schedule: str = "constant",
        max_steps: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if min(horizon, reuse, left_out) < 1 or not 0 <= spare < 1:
            raise UserError(
                f"learner.horizon={horizon}, reuse={reuse} and left_out={left_out} must be at least 1, and "
                f"spare={spare} from 0 to below 1"
            )
        self.ready()
        self._teacher: Apart | None = None
        self._rollout: Rollout = {}

    def prepare(self, data: Any, resumed: bool) -> None:
        """Load the world model, and the policy to begin with; refuse what was made of other play than the store's."""
        super().prepare(data, resumed)
        held_out = data.validation["length"]
        for name, length, left_out in (
            ("data.length", data.length, self.hparams["left_out"]),
            ("data.validation.length", held_out, 1),
        ):
            if length <= left_out:
                raise UserError(
                    f"{name}={length} must be more than what is left out at the end of a window, {left_out} "
                    "(learner.left_out, and 1 in held-out windows)"
                )
        for name, split, length in (
            ("data.length less data.left_padding", "train", data.length - data.left_padding),
            ("learner.left_out", "train", self.hparams["left_out"]),
            ("data.validation.length", "validation", held_out),
        ):
            longest = data.store.lengths[data.store.splits[split]].max(initial=0)
            if longest < length:
                raise UserError(
                    f"{name}={length} is more than the {longest} transitions of the longest {split} episode, so there "
                    "is no start; give a smaller one"
                )
        if self.hparams["world_model"] is None:
            raise UserError("learner.world_model is missing; give the checkpoint of a world model of the store's game")
        learner = load_learner(self.hparams["world_model"])
        if learner.hparams["card"]:
            check_fits(data.card, learner.hparams["card"], f"the world model {self.hparams['world_model']}")
        self._teacher = Apart(learner.model)
        path = self.hparams["policy"]
        if path is None or resumed:
            return
        policy, card = load_policy(path)
        check_fits(data.card, card, f"the policy {path}")
        if policy.actions != self.model.actions:
            raise UserError(
                f"the policy {Path(path)} takes the actions {policy.actions} but the store holds {self.model.actions}: "
                "clone a policy from this store, or give learner.actions=[...] as the policy has them"
            )
        try:
            self.model.load_state_dict(policy.state_dict())
        except RuntimeError as error:
            raise UserError(f"the policy {path} is of another size or head than model=; give the same ones") from error

    def on_fit_start(self) -> None:
        """Let the world model dream in bfloat16 where the policy is trained in it."""
        model = self.teacher
        if self.trainer.precision == "bf16-mixed" and hasattr(model, "quicken"):
            model.quicken()  # pyrefly: ignore

    def networks(self) -> list[nn.Module]:
        """Those of the world model, too, whose dreams are most of the work."""
        return [*super().networks(), *getattr(self.teacher, "networks", list)()]

    @property
    def teacher(self) -> WorldModel:
        """The world model, on this learner's device."""
        assert self._teacher is not None, "loaded by prepare()"
        return self._teacher.module.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a rollout that is to be used again."""
        super().on_save_checkpoint(checkpoint)
        if self._rollout and self.hparams["reuse"] > 1:
            checkpoint["rollout"] = dict(self._rollout)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        self._rollout = dict(checkpoint.get("rollout", {}))

    def training_step(self, segment: Segment, batch_idx: int) -> Tensor:
        """Dream, or take the last dream again, and learn from it."""
        if self.batch_number() % self.hparams["reuse"] == 0 or not self._rollout:
            spare = round(segment.batch_size * self.hparams["spare"])
            self._rollout = self.dream(segment, spare, self.noise(), self.hparams["left_out"])
        rollout = {k: v.to(self.device) for k, v in self._rollout.items()}
        loss, metrics = self._loss(rollout)
        self._rollout = rollout
        if self.hparams["real_weight"]:
            real, more = logged_loss(self, segment)
            loss = loss + self.hparams["real_weight"] * real
            metrics |= {f"{name}_real": value for name, value in more.items()}
        self.refuse_broken(loss, metrics)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=segment.batch_size)
        return loss

    def validation_step(self, segment: Segment, batch_idx: int) -> None:
        """The discounted return of dreams from held-out starts, until they end or the horizon comes."""
        worth = self.hparams["gamma"] ** torch.arange(self.hparams["horizon"], device=self.device)
        for game, windows in self.means.parts(segment):
            generator = torch.Generator(self.device).manual_seed(self.hparams["seed"] + batch_idx)
            rollout = self.dream(windows, 0, generator)
            returns, began = (rollout["reward"] * rollout["alive"] * worth).sum(1), rollout["alive"][:, 0].float()
            self.means.add(game, "imagined_return", returns, began)
            self.means.add(game, "imagined_length", rollout["alive"].sum(1).float(), began)

    @torch.no_grad()
    def dream(self, segment: Segment, spare: int, generator: torch.Generator, left_out: int = 1) -> Rollout:
        """Act in the world model for `horizon` steps H.

        Args:
            segment: windows of the log, (B + spare, T).
            spare: the last so many windows take the places of rows that end, one after another.
            generator: of all draws.
            left_out: as in the class.

        Returns:
            Of B rows: `stacks` (B, H+1, N*C, H, W) uint8 as the encoder sees them; `memory` (B, H+1, 2 D) before
            each; `fresh` (B, H+1), true where a row began anew; `action`, `reward`, `terminated`, `stop`, `alive`
            (B, H); `next_value` (B, H), which counts where a row is stopped by the model; of several games `legal`
            (B, H, A), the actions of each row's.
        """
        horizon, model, policy = self.hparams["horizon"], self.teacher, self.model
        first, count = segment.length - left_out, segment.batch_size - spare
        context = segment.steps(0, first)
        with torch.autocast(self.device.type, enabled=False):
            worlds, memories = model.start(context), policy.burn_in(context)
            world, memory = ({k: v[:count] for k, v in state.items()} for state in (worlds, memories))
            frame, used = context.obs[:count, -1], count
            legal = legals = policy.legal_in(context)
            if legals is not None:
                legal = legals[:count]
            real = segment.mask[:, first]  # no start is before or behind an episode
            alive, fresh = real[:count], torch.ones_like(real[:count])
            columns: dict[str, list[Tensor]] = {}

            def note(**values: Tensor) -> None:
                for name, value in values.items():
                    columns.setdefault(name, []).append(value)

            for _ in range(horizon):
                note(stacks=policy.encoder.stack(frame[:, None], memory)[:, 0], memory=_vector(memory), fresh=fresh)
                features, memory = policy.encoder(frame, memory)
                action = policy.draw(features, generator, legal)
                if legal is not None:
                    note(legal=legal)
                world, step = model.step(world, action, generator)
                frame = step.seen()
                value = torch.zeros_like(step.reward)
                if step.truncated.any():
                    value = policy.critic.mean(policy.encoder(frame, memory)[0])
                terminated = step.terminated
                if self.hparams["life_loss_ends"] and step.life_loss is not None:
                    terminated = terminated | step.life_loss
                ended = terminated | step.truncated
                note(action=action, reward=self.reward(step.reward), terminated=terminated)
                note(stop=step.truncated, next_value=value, alive=alive)
                fresh = torch.zeros_like(ended)
                for row in (ended & alive).nonzero()[:, 0].tolist():
                    while used < len(real) and not real[used]:
                        used += 1
                    if used == len(real):
                        alive = alive & (torch.arange(count, device=self.device) != row)
                        continue
                    world, memory = (_put(s, row, new, used) for s, new in ((world, worlds), (memory, memories)))
                    if legal is not None and legals is not None:
                        legal = legal.index_copy(0, torch.tensor([row], device=self.device), legals[used : used + 1])
                    frame, fresh = frame.clone(), fresh.clone()
                    frame[row], fresh[row] = context.obs[used, -1], True
                    used += 1
            note(stacks=policy.encoder.stack(frame[:, None], memory)[:, 0], memory=_vector(memory), fresh=fresh)
        return {name: torch.stack(values, dim=1) for name, values in columns.items()}

    def _loss(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """DIAMOND's loss on a rollout; what its first use decides (targets, advantages, odds) is added to it."""
        hp, policy = self.hparams, self.model
        count, lstm = len(rollout["action"]), policy.encoder.lstm
        seen = policy.encoder.features(rollout["stacks"], policy.start(count), rollout["fresh"], rollout["memory"])
        features = seen[..., :lstm]
        odds = policy.preferences(features[:, :-1], rollout.get("legal")).log_softmax(-1)
        likelihood = odds.gather(-1, rollout["action"][..., None])[..., 0]
        alive = rollout["alive"].float()

        def mean(x: Tensor) -> Tensor:
            return (x * alive).sum() / alive.sum().clamp(min=1)

        if "goal" not in rollout:
            value = policy.critic.mean(features).detach()
            following = torch.where(rollout["stop"], rollout["next_value"], value[:, 1:])
            ends = (rollout["reward"], following, rollout["terminated"], rollout["stop"])
            rollout["goal"] = lambda_returns(*ends, hp["gamma"], hp["lam"])
            rollout["advantage"] = rollout["goal"] - value[:, :-1]
            rollout["likelihood"] = likelihood.detach()
            if hp["normalise"]:
                above = rollout["advantage"] - mean(rollout["advantage"])
                rollout["advantage"] = above / (mean(above**2).sqrt() + 1e-8)
        ratio = (likelihood - rollout["likelihood"]).exp()
        clipped = ratio.clamp(1 - hp["ratio_clip"], 1 + hp["ratio_clip"])
        actor = -mean(torch.minimum(ratio * rollout["advantage"], clipped * rollout["advantage"]))
        critic = mean(policy.critic.loss(features[:, :-1], rollout["goal"]))
        entropy = mean(-(odds.exp() * odds).sum(-1))
        loss = actor + hp["value_weight"] * critic - hp["entropy"] * entropy
        metrics = {"loss": loss, "loss_actor": actor, "loss_critic": critic, "entropy": entropy}
        metrics |= {"value": mean(rollout["goal"]), "reward": mean(rollout["reward"]), "alive": alive.mean()}
        return loss, {name: value.detach() for name, value in metrics.items()}


def _vector(memory: State) -> Tensor:
    return torch.cat([memory["hidden"], memory["cell"]], dim=-1)


def _put(state: State, row: int, source: State, index: int) -> State:
    """`state` with row `index` of `source` as its row `row`."""
    state = {k: v.clone() for k, v in state.items()}
    for k, v in state.items():
        v[row] = source[k][index]
    return state

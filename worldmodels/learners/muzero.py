"""MuZero from logged play: Unplugged by search, one-step improvement, or cloning, all with the same network."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodels.config import build, build_policy
from worldmodels.data.mixing import Mixture
from worldmodels.data.reanalyse import AGE, FRESH, LOGGED, SOURCE, ReanalyseDataModule
from worldmodels.data.segments import TERMINATED
from worldmodels.data.targets import returns_to_go
from worldmodels.learners.adapting import Adaptable, checked
from worldmodels.learners.base import Score
from worldmodels.learners.means import over_games
from worldmodels.learners.policy import Targeted, check_logged, stored_policy, typical_frames
from worldmodels.learners.world_model import LEAST_PRIORITY
from worldmodels.models.muzero import MuZero
from worldmodels.planning.planners import Planner
from worldmodels.portable.checkpoints import read_checkpoint, trained_transform
from worldmodels.types import Segment, UserError

PLANNERS = "worldmodels.planning.planners."
SCORES = {
    "newest": Score("val/newest", "best_step", "at step"),
    "held_out": Score("val/held_out", "best_held_out", "fit of held-out play"),
}
"""What may choose the best checkpoint."""


def searching(settings: Mapping[str, Any] | None) -> Planner | None:
    """The search that settings as those of conf/planner describe; None for none.

    Raises:
        UserError: they build nothing, or something else.
    """
    if settings is None:
        return None
    if not isinstance(settings, Mapping) or not str(settings.get("_target_")).startswith(PLANNERS):
        raise UserError(
            f"learner.search={settings} is no search of {PLANNERS}...; choose one, such as +planner@learner.search=puct"
        )
    return build(settings)


def refuse_more(settings: Mapping[str, Any] | None, legal: int) -> None:
    """Refuse a search that was chosen to consider more actions than the `legal` ones.

    Where fewer are legal in one state a search considers these, so that what a checkpoint has is searched with anyway.

    Raises:
        UserError: it would.
    """
    considered = (settings or {}).get("max_considered")
    if type(considered) is int and considered > legal:
        raise UserError(
            f"the search's max_considered={considered} is more than the {legal} legal actions: give at most {legal}, "
            "or null for as many as there are, up to 16"
        )


def takes_gumbel(settings: Mapping[str, Any] | None) -> bool:
    """Whether the noise of a search is Gumbel's: that of others is drawn otherwise, and to be of another kind."""
    return settings is not None and str(settings["_target_"]).endswith((".gumbel", ".one_step"))


class MuZeroLearner(Adaptable, Targeted):
    """AdamW over the model's own loss, towards targets that a target network searches; see `data.reanalyse`.

    What is searched has no score that ranks models, so the newest checkpoint counts as the best. Where there is too
    little play not to be learned by heart, what is held out of it may choose: by its rewards, ends and values, and by
    its actions where these and no search are the policy.

    Args:
        model: as in `config.build_policy`.
        card: dataset card of the log.
        actions: indices into the 18-action set that may be taken; of several games by the name of each.
        search: settings of the search that improves the policy, as conf/planner has them; None: the logged actions are
            the policy, which is cloning.
        row_noise: give the search Gumbel noise that is a function of the row and the number of the target network.
        target_every: optimizer steps after which the target network is made equal (Schrittwieser et al. 2021: 500).
        clip_rewards: learn from the sign of rewards.
        lr: peak learning rate.
        weight_decay: of matrices and kernels.
        eps: of AdamW.
        clip: greatest norm of the gradient.
        warmup: optimizer steps over which the learning rate rises from 0.
        schedule: "constant", "cosine" or "linear", the last two to 0 at `max_steps`.
        max_steps: optimizer steps that the schedule spans.
        seed: of what is drawn in training.
        best: "newest", or "held_out": the least loss in validation but for that of a searched policy.
        adapt: where a trained model is moved, settings of `learners.adapting`; None trains everything alike.

    Raises:
        UserError: a setting out of range.
    """

    model: MuZero

    def __init__(
        self,
        model: dict[str, Any],
        card: dict[str, Any],
        actions: list[int] | dict[str, list[int]],
        search: dict[str, Any] | None = None,
        row_noise: bool = True,
        target_every: int = 500,
        clip_rewards: bool = True,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        eps: float = 1e-8,
        clip: float = 10.0,
        warmup: int = 100,
        schedule: str = "cosine",
        max_steps: int = 1,
        seed: int = 0,
        best: str = "newest",
        adapt: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        adapt = adapt and checked(adapt)  # whole, so that a checkpoint tells how it is merged
        self.save_hyperparameters()
        self.check_settings()
        if best not in SCORES:
            raise UserError(f"learner.best={best} is unknown; choose one of {', '.join(SCORES)}")
        self.score = SCORES[best]
        if target_every < 1:
            raise UserError(f"learner.target_every={target_every} must be at least 1")
        self.model = build_policy(model, card, actions, "MuZero")
        self.take_adapt(adapt)
        self.search = searching(search)
        refuse_more(search, len(self.model.actions))
        if search is not None and row_noise and not takes_gumbel(search):
            raise UserError(f"{search['_target_']} takes no Gumbel noise: give learner.row_noise=false with it")

    # What `data.reanalyse` asks for, beside the target network

    @property
    def target_step(self) -> int:
        """Optimizer steps that it had seen when it was made."""
        every = self.hparams["target_every"]
        return self.global_step // every * every

    @property
    def noise_key(self) -> tuple[int, ...] | None:
        """What the noise of a row is a function of, beside the row."""
        number = self.target_step // self.hparams["target_every"]
        return (self.hparams["seed"], number) if self.hparams["row_noise"] else None

    def clip(self, reward: Tensor) -> Tensor:
        """Rewards as they are learned from."""
        return reward.sign() if self.hparams["clip_rewards"] else reward

    def player(self) -> Any:
        """Acts by the search that it learns from, or by its policy where there is none."""
        from worldmodels.learners.acting import PRIOR, as_policy

        return as_policy(self.model, self.hparams["search"] or PRIOR)

    # Training

    def prepare(self, data: Any, resumed: bool) -> None:
        """Refuse targets of another meaning, and data that teach nothing; show the network the log's frames."""
        if not isinstance(data, ReanalyseDataModule):
            raise UserError("learner=muzero learns from data=reanalyse, which gives its windows targets; give both")
        if min(data.length, data.validation["length"]) < self.model.least_length:
            raise UserError(
                f"data.length={data.length} and data.validation.length={data.validation['length']} must be at least "
                f"{self.model.least_length}: model.frames, model.unroll and model.td_steps together"
            )
        if data.left_padding < self.model.frames - 1:
            raise UserError(
                f"data.left_padding={data.left_padding} must be at least {self.model.frames - 1}, one less than "
                "model.frames, or nothing is learned of how episodes begin"
            )
        check_logged(self.hparams["actions"], data.learned)
        for about in data.versions():
            for name, own in (("gamma", self.model.gamma), ("clip_rewards", self.hparams["clip_rewards"])):
                if about.get(name, own) != own:
                    raise UserError(
                        f"the targets {about['version']} were made with {name}={about[name]} and this training has "
                        f"{own}, so that their values mean something else; search again with a model of this training"
                    )
        if not self.hparams["clip_rewards"]:
            self._check_scales(data)
        if not resumed:
            self.model.know(typical_frames(data.store))

    def _check_scales(self, data: Any) -> None:
        """Refuse heads that a game's points or returns lie beyond: what is beyond would be learned as their ends."""
        for store in data.learned.stores if isinstance(data.learned, Mixture) else [data.learned]:
            reward, terminated = store.column("reward").astype(np.float32), store.column("flags") & TERMINATED != 0
            value, known = returns_to_go(reward, terminated, store.offsets, self.model.gamma)
            for name, logged in (("reward", reward), ("value", value[known])):
                head = getattr(self.model, name)
                if not hasattr(head, "low"):  # a regression has no ends
                    continue
                low, high = head.decode(torch.tensor([head.low, head.high])).tolist()
                least, most = float(logged.min(initial=0)), float(logged.max(initial=0))
                if least < low * 1.001 or most > high * 1.001:
                    wider = f"give model.{name}.low=... and model.{name}.high=..., best with model.{name}.transform=h "
                    mend = "give" if self.hparams["adapt"] else f"{wider}where games differ, or"  # a moved head stays
                    raise UserError(
                        f"the {name}s of {store.card['game']} in the log go from {least:g} to {most:g}, and "
                        f"model.{name} from {low:g} to {high:g}: {mend} learner.clip_rewards=true"
                    )

    def training_step(self, segment: Segment, batch_idx: int) -> Tensor:
        """The model's loss, with how old its targets were."""
        loss, metrics = self.model.loss(self._clipped(segment), self.noise())
        drawn = "importance" in segment.side
        self.refuse_broken(loss, metrics, now=drawn)
        each = metrics.pop("window_loss")
        loss = self.drawn_back(loss, metrics)
        if drawn:
            datamodule: Any = self.trainer.datamodule  # pyrefly: ignore
            datamodule.update(segment.side["starts"], each.float() + LEAST_PRIORITY)
        rows = sorted(set().union(*self.model.rows()))  # whose targets the loss needs
        real, source, age = (x[:, rows] for x in (segment.mask, segment.side[SOURCE], segment.side[AGE]))
        for name, kind in (("fresh", FRESH), ("logged", LOGGED)):
            metrics[name] = ((source == kind) & real).sum() / real.sum().clamp(min=1)
        old = (source != LOGGED) & real
        metrics["target_age"] = torch.where(old, age, 0).sum() / old.sum().clamp(min=1)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=segment.batch_size)
        return loss

    def optimizer_step(self, *arguments: Any, **settings: Any) -> None:
        """Renew the target network when it is time: before the callbacks, whose checkpoint is to have the new one."""
        super().optimizer_step(*arguments, **settings)
        if (self.global_step + 1) % self.hparams["target_every"] == 0:  # the step is not counted yet
            self.renew_target()

    def validation_step(self, segment: Segment, batch_idx: int) -> None:
        """The losses of held-out play, whose policy is the logged one."""
        for game, windows in self.means.parts(segment):
            _, metrics = self.model.loss(self._clipped(windows), torch.Generator(self.device).manual_seed(batch_idx))
            for name, value in metrics.items():
                if name != "window_loss":
                    self.means.add(game, name, value)

    def on_validation_epoch_end(self) -> None:
        """Log the means, the step, and how well what the log tells of held-out play is known."""
        found = over_games(self.means.finish())
        told = found["loss"]
        if self.hparams["search"] is not None:  # a policy that gets better leaves the logged one
            chosen = ("policy", "behaviour")
            told = told - sum(self.model.weights[n] * found[f"loss_{n}"] for n in chosen if f"loss_{n}" in found)
        for name, value in found.items() | {"held_out": -told}.items():
            self.log(f"val/{name}", value, sync_dist=True)
        self.log("val/newest", float(self.global_step))

    def _clipped(self, segment: Segment) -> Segment:
        return replace(segment, reward=self.clip(segment.reward))


def load_muzero(checkpoint: str | Path) -> tuple[MuZero, dict[str, Any]]:
    """The network of a checkpoint, averaged, in evaluation mode, and the settings of its learner.

    Beside them `global_step`, and the `transform` of the frames that it learned from.

    Raises:
        UserError: the file cannot be read, holds another model, or its weights do not belong to its settings.
    """
    stored = read_checkpoint(checkpoint)
    given = stored["hyper_parameters"]
    if "search" not in given:
        raise UserError(f"{checkpoint} holds no MuZero; train one with `worldmodels train learner=muzero`")
    model, told = stored_policy(checkpoint, stored, "MuZero"), {"transform": trained_transform(stored)}
    return model, given | told | {"global_step": stored["global_step"]}

"""MuZero from logged play: Unplugged by search, one-step improvement, or cloning, all with the same network."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldmodels.config import build, read_checkpoint
from worldmodels.data.mixing import Mixture
from worldmodels.data.reanalyse import AGE, FRESH, LOGGED, SOURCE, ReanalyseDataModule
from worldmodels.data.segments import TERMINATED
from worldmodels.data.targets import returns_to_go
from worldmodels.learners.base import Learner, Score
from worldmodels.learners.means import over_games
from worldmodels.learners.policy import Apart, check_action_lists, check_logged, typical_frames
from worldmodels.learners.world_model import LEAST_PRIORITY, decay_groups
from worldmodels.models.muzero import MuZero
from worldmodels.planning.planners import Planner
from worldmodels.types import Segment, UserError

PLANNERS = "worldmodels.planning.planners."
Actions = Sequence[int] | Mapping[str, Sequence[int]]


def build_muzero(model: Mapping[str, Any], card: Mapping[str, Any], actions: Actions) -> MuZero:
    """The network that `model` describes, for frames as those of the dataset card.

    Args:
        model: settings for `config.build`, with those of its heads `value` and `reward` (nn/heads.py) among them.
        card: of the log that it learns from.
        actions: indices into the 18-action set that it may take, or those of each game by its name.

    Raises:
        UserError: the settings build nothing, or the frames are not square.
    """
    settings, obs = dict(model), card["obs"]
    if obs["height"] != obs["width"]:
        raise UserError(
            f"MuZero sees square frames but the store's are {obs['height']}x{obs['width']}: give data.transform.size"
        )
    if not {"value", "reward"} <= set(settings):
        raise UserError(f"model {settings.get('_target_')} is no MuZero; give model=muzero")
    heads = {name: partial(build, settings.pop(name)) for name in ("value", "reward")}
    return build(settings, image_channels=obs["channels"], image_size=obs["height"], actions=actions, **heads)


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


def takes_gumbel(settings: Mapping[str, Any] | None) -> bool:
    """Whether the noise of a search is Gumbel's: that of others is drawn otherwise, and to be of another kind."""
    return settings is not None and str(settings["_target_"]).endswith((".gumbel", ".one_step"))


class MuZeroLearner(Learner):
    """AdamW over the model's own loss, towards targets that a target network searches; see `data.reanalyse`.

    What is searched has no score that ranks models, so the newest checkpoint counts as the best.

    Args:
        model: as in `build_muzero`.
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

    Raises:
        UserError: a setting out of range.
    """

    score = Score("val/newest", "best_step", "at step")
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
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.check_settings()
        check_action_lists(actions)
        if target_every < 1:
            raise UserError(f"learner.target_every={target_every} must be at least 1")
        self.model = build_muzero(model, card, actions)
        self.search = searching(search)
        if search is not None and row_noise and not takes_gumbel(search):
            raise UserError(f"{search['_target_']} takes no Gumbel noise: give learner.row_noise=false with it")
        self.means = self.new_means()
        self._target: Apart | None = None
        self._stored: dict[str, Tensor] | None = None  # of a checkpoint, until the target network is made

    # What `data.reanalyse` asks for

    @property
    def target(self) -> Apart:
        """The network that searches."""
        assert self._target is not None, "made when training begins"
        return self._target

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
        check_logged(self.hparams["actions"], data.store)
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
        for store in data.store.stores if isinstance(data.store, Mixture) else [data.store]:
            reward, terminated = store.column("reward").astype(np.float32), store.column("flags") & TERMINATED != 0
            value, known = returns_to_go(reward, terminated, store.offsets, self.model.gamma)
            for name, logged in (("reward", reward), ("value", value[known])):
                head = getattr(self.model, name)
                if not hasattr(head, "low"):  # a regression has no ends
                    continue
                low, high = head.decode(torch.tensor([head.low, head.high])).tolist()
                least, most = float(logged.min(initial=0)), float(logged.max(initial=0))
                if least < low * 1.001 or most > high * 1.001:
                    raise UserError(
                        f"the {name}s of {store.card['game']} in the log go from {least:g} to {most:g}, and "
                        f"model.{name} from {low:g} to {high:g}: give model.{name}.low=... and model.{name}.high=..., "
                        f"best with model.{name}.transform=h where games differ, or learner.clip_rewards=true"
                    )

    def on_fit_start(self) -> None:
        """Make the target network, as the checkpoint has it or equal to the model."""
        target = deepcopy(self.model)
        if self._stored is not None:
            target.load_state_dict(self._stored)
        self._target, self._stored = Apart(target), None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the target network's weights, without which a resumed run would be another."""
        super().on_save_checkpoint(checkpoint)
        if self._target is not None:
            checkpoint["target"] = self._target.module.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep them until training begins."""
        self._stored = checkpoint.get("target")

    def training_step(self, segment: Segment, batch_idx: int) -> Tensor:
        """The model's loss, with how old its targets were."""
        loss, metrics = self.model.loss(self._clipped(segment), self.noise())
        drawn = "importance" in segment.side
        self.refuse_broken(loss, now=drawn)
        each = metrics.pop("window_loss")
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
            self.target.module.load_state_dict(self.model.state_dict())

    def validation_step(self, segment: Segment, batch_idx: int) -> None:
        """The losses of held-out play, whose policy is the logged one."""
        for game, windows in self.means.parts(segment):
            _, metrics = self.model.loss(self._clipped(windows), torch.Generator(self.device).manual_seed(batch_idx))
            for name, value in metrics.items():
                if name != "window_loss":
                    self.means.add(game, name, value)

    def on_validation_epoch_end(self) -> None:
        """Log the means, and the step as the score."""
        for name, value in over_games(self.means.finish()).items():
            self.log(f"val/{name}", value, sync_dist=True)
        self.log("val/newest", float(self.global_step))

    def _clipped(self, segment: Segment) -> Segment:
        return replace(segment, reward=self.clip(segment.reward))

    def configure_optimizers(self) -> Any:
        """One AdamW, and the schedule by step."""
        hp = self.hparams
        groups = decay_groups(self.model, hp["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=hp["lr"], eps=hp["eps"], fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip the norm of the whole gradient, and log it."""
        self.log("train/grad_norm", nn.utils.clip_grad_norm_(self.model.parameters(), self.hparams["clip"]))


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
    model = build_muzero(given["model"], given["card"], given["actions"])
    weights = {k.removeprefix("model."): v for k, v in stored["state_dict"].items() if k.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {checkpoint} do not fit the model it describes; train again") from error
    transform = stored.get(ReanalyseDataModule.__qualname__, {}).get("transform", {})
    return model.eval().requires_grad_(False), given | {"global_step": stored["global_step"], "transform": transform}

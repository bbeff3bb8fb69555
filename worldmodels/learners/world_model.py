"""Trains any `WorldModel` on logged segments, and judges it by open-loop rollouts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldmodels.config import build
from worldmodels.data.mixing import logged_actions
from worldmodels.evaluation.frames import changed_pixels
from worldmodels.imagination import LoggedActions, imagine
from worldmodels.learners.adapting import Adaptable, checked
from worldmodels.learners.base import Score
from worldmodels.learners.means import over_games
from worldmodels.models.reward import doublings_for
from worldmodels.ops.groups import action_table
from worldmodels.portable.checkpoints import read_checkpoint
from worldmodels.types import Segment, UserError

LEAST_PRIORITY = 1e-3  # a window with a perfect prediction is still drawn now and then


class WorldModelLearner(Adaptable):
    """AdamW over all components of a world model, each with its own gradient clip.

    It takes plain data only, so that a checkpoint describes itself: `WorldModelLearner.load_from_checkpoint(path)`
    needs no other argument, and gives the averaged weights where an average was kept.

    Args:
        model: settings for `config.build`; the model has `components()`, a dict of disjoint modules.
        card: dataset card of the store that it learns from.
        lr: peak learning rate, of all components or by component (DIAMOND: 1e-4).
        weight_decay: of matrices and kernels; biases, norms and embeddings have none (DIAMOND: 1e-2).
        eps: of AdamW (DIAMOND: 1e-8).
        betas: of AdamW.
        clip: greatest gradient norm by component (DIAMOND: 1 for the denoiser, 100 for the reward model).
        warmup: optimizer steps over which the learning rate rises from 0 (DIAMOND: 100).
        schedule: "constant", "cosine" or "linear", the last two to 0 at `max_steps`.
        max_steps: optimizer steps that the schedule spans.
        horizons: steps after the last real frame at which validation rollouts are judged; validation windows hold the
            context and then `max(horizons)` transitions.
        seed: of the training noise (with rank and batch number) and of the validation rollouts.
        adapt: where a trained model is moved, settings of `learners.adapting`: what is trained, at which rates, and how
            strongly it is drawn to where it began; None trains everything alike.

    Raises:
        UserError: unknown schedule, or a clip for a component that the model lacks; in training, a loss that is not
            finite, or weights that are not, with the batch named and no checkpoint of them.
    """

    score = Score("val/rollout_psnr_changed", "best_rollout_psnr_changed_db", "rollout PSNR on changed pixels", " dB")

    def __init__(
        self,
        model: dict[str, Any],
        card: dict[str, Any] | None = None,
        lr: float | dict[str, float] = 1e-4,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: dict[str, float] | None = None,
        warmup: int = 100,
        schedule: str = "constant",
        max_steps: int = 1,
        horizons: tuple[int, ...] = (1, 2, 4, 8),
        seed: int = 0,
        adapt: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        adapt = adapt and checked(adapt)  # whole, so that a checkpoint tells how it is merged
        self.save_hyperparameters()
        self.check_settings()
        self.model: Any = build(model)
        self.take_adapt(adapt)
        names = set(self.model.components())
        for setting, by_component in (("clip", clip or {}), ("lr", lr if isinstance(lr, dict) else {})):
            if unknown := set(by_component) - names:
                raise UserError(f"learner.{setting} names {sorted(unknown)}; the model has {sorted(names)}")
        if isinstance(lr, dict) and (missing := names - set(lr)):
            raise UserError(f"learner.lr gives no rate for {sorted(missing)}; the model has {sorted(names)}")

    def prepare(self, data: Any, resumed: bool) -> None:
        """Refuse windows that are too short, rewards beyond the bins, and symmetries and games that do not fit."""
        horizons, length = self.hparams["horizons"], data.validation["length"]
        if length <= max(horizons):
            raise UserError(
                f"data.validation.length={length} must be more than the longest of learner.horizons={horizons}"
            )
        asked = getattr(self.model, "symmetries", {})
        symmetries = {setting: symmetry for setting, symmetry in asked.items() if len(symmetry) > 1}
        games = getattr(self.model, "games", None)
        for game, actions in logged_actions(data.learned).items() if symmetries or games is not None else ():
            for setting, symmetry in symmetries.items():
                action_table(symmetry, actions, setting)
            if games is None:
                continue
            if not games.row(game):
                print(f"{game} is none of {', '.join(games.names)}, and learned as a game that the model does not know")
            logged = torch.tensor(actions, device=games.legal.device)
            games.refuse_illegal(torch.full_like(logged, games.row(game)), logged)
        rewards = getattr(self.model, "reward_model", None)
        if getattr(rewards, "rewards", None) != "two_hot":
            return
        greatest, most = data.greatest_reward(), rewards.bins.max().item()  # pyrefly: ignore
        if greatest > most:  # it would be learned as the last bin
            raise UserError(
                f"the rewards in the log go up to {greatest:g}, and those that the model can tell up to {most:g}: give "
                f"+model.reward_model.doublings={doublings_for(greatest)}"
            )

    def training_step(self, segment: Segment, batch_idx: int) -> Tensor:
        """The model's own loss; its noise is a function of (seed, rank, batch number), so that resuming is exact."""
        loss, metrics = self.model.loss(segment, self.noise())
        drawn = "window_loss" in metrics and "starts" in segment.side  # its losses are waited for in any case
        self.refuse_broken(loss, metrics, now=drawn)
        each = metrics.pop("window_loss", None)
        loss = self.drawn_back(loss, metrics)
        if drawn:  # windows that are hard are drawn more often
            datamodule: Any = self.trainer.datamodule  # pyrefly: ignore
            datamodule.update(segment.side["starts"], each.float() + LEAST_PRIORITY)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=segment.batch_size)
        return loss

    def validation_step(self, segment: Segment, batch_idx: int) -> None:
        """Roll out with the logged actions and gather the squared error on changed pixels at each horizon."""
        for game, windows in self.means.parts(segment):
            self._judge(game, windows, torch.Generator(self.device).manual_seed(self.hparams["seed"] + batch_idx))

    def _judge(self, game: str, segment: Segment, generator: torch.Generator) -> None:
        horizons = self.hparams["horizons"]
        context = segment.length - max(horizons)
        policy = LoggedActions(segment.action[:, context:])
        dream = imagine(self.model, policy, segment.steps(0, context), max(horizons), generator)
        true = segment.obs[:, context + 1 :]
        error = ((dream.obs[:, 1:].float() - true.float()) / 255).square().mean(2)
        moved = changed_pixels(true, segment.obs[:, context])[:, :, 0] & segment.next_mask[:, context:, None, None]
        for h in horizons:
            self.means.add(game, str(h), error[:, h - 1], moved[:, h - 1].float())

    def on_validation_epoch_end(self) -> None:
        """Log PSNR in dB on changed pixels at each horizon, and their mean, which selects the best checkpoint.

        Of several games it is the mean over games that does, and each has its own figures beside it.
        """
        found = {}
        for game, errors in self.means.finish().items():
            psnr = {f"psnr_changed_{h}": -10 * error.clamp(min=1e-10).log10() for h, error in errors.items()}
            found[game] = psnr | {"rollout_psnr_changed": torch.stack(list(psnr.values())).mean()}
        for name, value in over_games(found).items():
            self.log(f"val/{name}", value, sync_dist=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As of all that adapt, with AdamW's own `betas`."""
        return [group | {"betas": tuple(self.hparams["betas"])} for group in super().parameter_groups()]

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip each component's gradient norm on its own, and log it."""
        clip = self.hparams["clip"] or {}
        for name, component in self.model.components().items():
            norm = nn.utils.clip_grad_norm_(component.parameters(), clip.get(name, float("inf")))
            self.log(f"train/grad_norm_{name}", norm)


def load_learner(checkpoint: str | Path) -> WorldModelLearner:
    """The learner of a world model's checkpoint with its averaged weights, in evaluation mode, on the CPU.

    Raises:
        UserError: as `read_checkpoint`, it holds a policy or a MuZero, or the weights do not belong to the settings
            beside them.
    """
    stored = read_checkpoint(checkpoint)
    if "search" in stored["hyper_parameters"]:
        raise UserError(
            f"{checkpoint} holds a MuZero, which foresees no frames to judge or to learn a policy from (what a probe "
            "draws is to look at, by `worldmodels imagine`); play it by `worldmodels evaluate`, or give one of "
            "`worldmodels train` without learner="
        )
    if "actions" in stored["hyper_parameters"]:
        raise UserError(
            f"{checkpoint} holds a policy and no world model; give one of `worldmodels train` without learner="
        )
    learner = WorldModelLearner(**stored["hyper_parameters"])
    try:
        learner.load_state_dict(stored["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the weights in {checkpoint} do not fit the model it describes; train again") from error
    return learner.eval().requires_grad_(False)

"""Trains any `WorldModel` on logged segments, and judges it by open-loop rollouts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from worldmodels.config import build
from worldmodels.evaluation.frames import changed_pixels
from worldmodels.imagination import LoggedActions, imagine
from worldmodels.learners.adapting import Start, begin_with, checked, layers, restrict
from worldmodels.learners.base import Learner, Score
from worldmodels.types import Segment, UserError

LEAST_PRIORITY = 1e-3  # a window with a perfect prediction is still drawn now and then
NOT_DECAYED = (nn.Embedding, nn.GroupNorm, nn.LayerNorm)


class WorldModelLearner(Learner):
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
        self.save_hyperparameters()
        self.check_settings()
        self.model: Any = build(model)
        self.adapt = checked(adapt or {})
        restrict(self.model, self.adapt)
        self._start: Start | None = None
        names = set(self.model.components())
        for setting, by_component in (("clip", clip or {}), ("lr", lr if isinstance(lr, dict) else {})):
            if unknown := set(by_component) - names:
                raise UserError(f"learner.{setting} names {sorted(unknown)}; the model has {sorted(names)}")
        if isinstance(lr, dict) and (missing := names - set(lr)):
            raise UserError(f"learner.lr gives no rate for {sorted(missing)}; the model has {sorted(names)}")
        self.squared_error: Any = nn.ModuleList(MeanMetric() for _ in horizons)

    def prepare(self, data: Any, resumed: bool) -> None:
        """Refuse validation windows that are too short for the horizons."""
        horizons, length = self.hparams["horizons"], data.validation["length"]
        if length <= max(horizons):
            raise UserError(
                f"data.validation.length={length} must be more than the longest of learner.horizons={horizons}"
            )

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these weights of the model, and remember them where it is drawn to them."""
        begin_with(self.model, weights)
        if self.adapt["l2_start"]:
            self._start = Start(self.model)

    def training_step(self, segment: Segment, batch_idx: int) -> Tensor:
        """The model's own loss; its noise is a function of (seed, rank, batch number), so that resuming is exact."""
        loss, metrics = self.model.loss(segment, self.noise())
        drawn = "window_loss" in metrics and "starts" in segment.side  # its losses are waited for in any case
        self.refuse_broken(loss, now=drawn)
        each = metrics.pop("window_loss", None)
        if self._start is not None:
            metrics["start_distance"] = (distance := self._start.distance(self.model)).detach()
            loss = loss + self.adapt["l2_start"] * distance
        if drawn:  # windows that are hard are drawn more often
            datamodule: Any = self.trainer.datamodule  # pyrefly: ignore
            datamodule.update(segment.side["starts"], each.float() + LEAST_PRIORITY)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=segment.batch_size)
        return loss

    def validation_step(self, segment: Segment, batch_idx: int) -> None:
        """Roll out with the logged actions and gather the squared error on changed pixels at each horizon."""
        horizons = self.hparams["horizons"]
        context = segment.length - max(horizons)
        generator = torch.Generator(self.device).manual_seed(self.hparams["seed"] + batch_idx)
        policy = LoggedActions(segment.action[:, context:])
        dream = imagine(self.model, policy, segment.steps(0, context), max(horizons), generator)
        true = segment.obs[:, context + 1 :]
        error = ((dream.obs[:, 1:].float() - true.float()) / 255).square().mean(2)
        moved = changed_pixels(true, segment.obs[:, context])[:, :, 0] & segment.next_mask[:, context:, None, None]
        for metric, h in zip(self.squared_error, horizons, strict=True):
            # A mean weighted by what changed is the same, however the windows were cut into batches and ranks.
            weight = moved[:, h - 1].float()
            metric.update(error[:, h - 1], weight)

    def on_validation_epoch_end(self) -> None:
        """Log PSNR in dB on changed pixels at each horizon, and their mean, which selects the best checkpoint."""
        psnr = torch.stack([-10 * metric.compute().clamp(min=1e-10).log10() for metric in self.squared_error])
        for h, value in zip(self.hparams["horizons"], psnr, strict=True):
            self.log(f"val/psnr_changed_{h}", value, sync_dist=True)
        self.log("val/rollout_psnr_changed", psnr.mean(), sync_dist=True)
        for metric in self.squared_error:
            metric.reset()

    def configure_optimizers(self) -> Any:
        """One AdamW with two groups a component, or a stage of it, and the schedule by step."""
        hp = self.hparams
        groups = []
        for name, part, factor in layers(self.model, self.adapt["layer_decay"]):
            lr = hp["lr"][name] if isinstance(hp["lr"], dict) else hp["lr"]
            for group, label in zip(decay_groups(part, hp["weight_decay"]), ("", ", not decayed"), strict=True):
                groups.append(group | {"lr": lr * factor, "name": f"{name}{label}"})
        optimizer = torch.optim.AdamW(groups, betas=tuple(hp["betas"]), eps=hp["eps"], fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip each component's gradient norm on its own, and log it."""
        clip = self.hparams["clip"] or {}
        for name, component in self.model.components().items():
            norm = nn.utils.clip_grad_norm_(component.parameters(), clip.get(name, float("inf")))
            self.log(f"train/grad_norm_{name}", norm)


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

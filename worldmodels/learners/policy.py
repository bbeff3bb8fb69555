"""What all learners of policies share: loading a policy, which rows of a log count, and what they may learn from."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worldmodels.config import build_policy
from worldmodels.data.mixing import logged_actions
from worldmodels.data.sampling import even_windows
from worldmodels.learners.base import Learner
from worldmodels.models.actor_critic import RecurrentPolicy
from worldmodels.portable.checkpoints import read_checkpoint
from worldmodels.types import Segment, UserError

FRAMES = 512
"""How many frames tell an encoder what frames are like."""


def load_policy(checkpoint: str | Path) -> tuple[RecurrentPolicy, dict[str, Any]]:
    """The policy of a checkpoint with its averaged weights, in evaluation mode, and the dataset card of its log.

    Raises:
        UserError: the file cannot be read, holds no policy, or its weights do not belong to its settings.
    """
    stored = read_checkpoint(checkpoint)
    given = stored["hyper_parameters"]
    if "actions" not in given:
        raise UserError(
            f"{checkpoint} holds a world model and no policy; train one with `worldmodels train learner=...`"
        )
    return stored_policy(checkpoint, stored, "policy"), given["card"]


def stored_policy(checkpoint: str | Path, stored: Mapping[str, Any], kind: str) -> Any:
    """The policy of a checkpoint that was read, in evaluation mode.

    Args:
        checkpoint: where it was read.
        stored: what was read.
        kind: of `config.HEADS`.

    Raises:
        UserError: it is of another kind, or its weights do not belong to its settings.
    """
    given = stored["hyper_parameters"]
    policy = build_policy(given["model"], given["card"], given["actions"], kind)
    weights = {k.removeprefix("model."): v for k, v in stored["state_dict"].items() if k.startswith("model.")}
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {checkpoint} do not fit the {kind} it describes; train again") from error
    return policy.eval().requires_grad_(False)


def typical_frames(store: Any) -> Tensor:
    """Frames (N, C, H, W) uint8, evenly spaced over the training episodes of a store."""
    starts = even_windows(store, store.splits["train"], FRAMES, 1)
    return store.read(starts, 1).obs[:, 0]


def check_logged(actions: Any, store: Any) -> None:
    """Refuse actions that nobody took in the log of a game, from which nothing would be learned.

    Raises:
        UserError: there are such actions.
    """
    for game, logged in logged_actions(store).items():
        mine = actions.get(game, []) if isinstance(actions, Mapping) else actions
        if not set(logged) & set(mine):
            raise UserError(f"learner.actions={actions} are none of the log of {game}, which holds {logged}")


class Apart:
    """Keeps a module out of the learner's own, so that no average, no optimiser and no checkpoint takes it along."""

    def __init__(self, module: Any) -> None:
        self.module = module.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> "Apart":
        return self


class Targeted(Learner):
    """A learner that also has a network of some steps ago, as its checkpoints do: resumed without it, it were another.

    Attributes:
        target: that network; None until training begins.
    """

    target: Apart | None = None
    _stored: dict[str, Tensor] | None = None  # of a checkpoint, until the target network is made

    def on_fit_start(self) -> None:
        """Make the target network, as the checkpoint has it or equal to the model."""
        target = deepcopy(self.model)
        if self._stored is not None:
            target.load_state_dict(self._stored)
        self.target, self._stored = Apart(target), None

    def renew_target(self) -> None:
        """Make it equal to the model."""
        assert self.target is not None, "made when training begins"
        self.target.module.load_state_dict(self.model.state_dict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the target network's weights."""
        super().on_save_checkpoint(checkpoint)
        if self.target is not None:
            checkpoint["target"] = self.target.module.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep them until training begins."""
        self._stored = checkpoint.get("target")


class Rows(NamedTuple):
    """What the rows (B, T) of a logged segment are good for.

    Args:
        usable: real, and followed by a frame of the log or by nothing.
        stop: what comes after the row is not in the segment.
    """

    usable: Tensor
    stop: Tensor


def rows_of(segment: Segment) -> Rows:
    """Which rows of logged play teach a value, and where its window stops."""
    usable = segment.mask & (segment.next_mask | segment.terminated)
    last = torch.ones_like(usable[:, :1])
    return Rows(usable, segment.truncated | torch.cat([~usable[:, 1:], last], dim=1))


class PolicyLearner(Learner):
    """Trains a policy. A subclass has the loss, saves plain settings that rebuild it, and calls `ready`.

    Their common settings, beside those of all learners, are `model` and `card` and `actions` as in `build_policy`;
    `gamma`, the discount; `clip_rewards`, to learn from the sign of rewards; `life_loss_ends`, to learn that a lost
    life ends a return, as termination does; `burn_in`, rows at the start of a window that only fill the memory.
    """

    def ready(self) -> None:
        """Build the policy from the saved settings."""
        self.check_settings()
        hp = self.hparams
        for name in ("gamma", "lam"):
            if name in hp and not (isinstance(hp[name], int | float) and 0 <= hp[name] <= 1):
                raise UserError(f"learner.{name}={hp[name]} must be a number from 0 to 1")
        if (t := hp.get("advantage")) is not None and not (isinstance(t, int | float) and t > 0):
            raise UserError(f"learner.advantage={t} must be a temperature above 0, or null for no weights")
        if (least := hp.get("least_ahead")) is not None and not isinstance(least, int | float):
            raise UserError(f"learner.least_ahead={least} must be a number of points, or null for all rows")
        for name in ("life_loss_ends", "normalise"):
            if name in hp and type(hp[name]) is not bool:
                raise UserError(f"learner.{name}={hp[name]} must be true or false")
        self.model = build_policy(hp["model"], hp["card"], hp["actions"])

    def prepare(self, data: Any, resumed: bool) -> None:
        """Refuse windows that are all burn-in and actions that nobody took; show the encoder the log's frames."""
        length, burn_in = min(data.length, data.validation["length"]), self.hparams["burn_in"]
        if length <= burn_in:
            raise UserError(
                f"data.length={data.length} and data.validation.length={data.validation['length']} must be more than "
                f"learner.burn_in={burn_in}"
            )
        if self.hparams.get("least_ahead") is not None and data.outcomes is None:
            raise UserError("learner.least_ahead needs to be told over how many steps: give data.ahead=N")
        check_logged(self.hparams["actions"], data.store)
        if not resumed:
            self.model.encoder.know(typical_frames(data.store))

    def ends(self, segment: Segment) -> Segment:
        """Logged play with a lost life as termination, where it is to be one."""
        if not self.hparams["life_loss_ends"] or (lost := segment.side.get("life_loss")) is None:
            return segment
        return replace(segment, terminated=segment.terminated | lost)

    def reward(self, reward: Tensor) -> Tensor:
        """Rewards as they are learned from."""
        return reward.sign() if self.hparams["clip_rewards"] else reward

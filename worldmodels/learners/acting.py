"""A trained MuZero as a policy: by its own search, by another one, or by its policy alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldmodels.learners.muzero import load_muzero, searching
from worldmodels.models.muzero import MuZero
from worldmodels.planning.policy import SearchPolicy
from worldmodels.planning.tree import Root
from worldmodels.types import State

PRIOR = {"_target_": "worldmodels.planning.planners.prior"}


class Eyes:
    """What a model sees of a game that is going on: the last F frames, and the actions between them.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: MuZero) -> None:
        self.model = model

    def begin(self, n: int) -> State:
        """The state of `n` rows that have seen nothing: `frames`, `real` and `places` of F - 1 steps, and `taken`."""
        model, before = self.model, self.model.frames - 1
        device, size = model.index.device, model.image_size
        return {
            "frames": torch.zeros(n, before, model.image_channels, size, size, dtype=torch.uint8, device=device),
            "real": torch.zeros(n, before, dtype=torch.bool, device=device),
            "places": torch.zeros(n, before, dtype=torch.long, device=device),
            "taken": torch.zeros(n, dtype=torch.long, device=device),
        }

    def see(self, observation: Tensor, state: State) -> tuple[Root, State]:
        """The root for frames (B, C, H, W) uint8, and the state after them, to which the action is told as `taken`."""
        model = self.model
        frames = torch.cat([state["frames"], observation[:, None]], 1)
        now = torch.ones(len(frames), 1, dtype=torch.bool, device=frames.device)
        real = torch.cat([state["real"], now], 1)
        places = torch.cat([state["places"], state["taken"][:, None]], 1)[:, 1:]
        root = model.fresh(model.represent(frames, places, real))
        logits, value = model.roots(root)
        after = {"frames": frames[:, 1:], "real": real[:, 1:], "places": places, "taken": state["taken"]}
        return Root(logits, value, root), after


def muzero_policy(
    checkpoint: str | Path, planner: Mapping[str, Any] | None = None
) -> tuple[SearchPolicy, dict[str, Any]]:
    """The policy of a checkpoint, and the dataset card of its log.

    Args:
        checkpoint: of a `MuZeroLearner`.
        planner: settings of the search, as conf/planner has them; by default those that it was trained with and, for a
            clone, its policy without a search. With a search the best action is taken, without one it is drawn.

    Raises:
        UserError: as `load_muzero`.
    """
    model, given = load_muzero(checkpoint)
    settings = dict(planner or given["search"] or PRIOR)
    return as_policy(model, settings), given["card"]


def as_policy(model: MuZero, settings: Mapping[str, Any], noise: bool | None = None) -> SearchPolicy:
    """A model as a policy.

    Args:
        model: in evaluation mode.
        settings: of the search.
        noise: whether it explores; by default only where there is no search.
    """
    eyes, search = Eyes(model), searching(settings)
    assert search is not None
    noise = settings["_target_"] == PRIOR["_target_"] if noise is None else noise

    return SearchPolicy(eyes.begin, eyes.see, model.recurrent, search, model.actions, noise)

"""A trained MuZero as a policy: by its own search, by another one, or by its policy alone."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldmodels.learners.muzero import load_muzero, refuse_more, searching
from worldmodels.models.muzero import MuZero
from worldmodels.nn.equivariant import expand_once
from worldmodels.planning.policy import SearchPolicy
from worldmodels.planning.tree import Root
from worldmodels.types import RecurrentOutput, State, UserError

PRIOR = {"_target_": "worldmodels.planning.planners.prior"}
DRAWING = (".prior", ".puct", ".sampled")
"""Searches whose `temperature` is that of the action; Gumbel MuZero has none, and one step means another by it."""


class Eyes:
    """What a model sees of a game that is going on: the last F frames, and the actions between them.

    Args:
        model: in evaluation mode.
        game: that is played, by name. A model of several games sees, and is searched with, its actions alone.
    """

    def __init__(self, model: MuZero, game: str | None = None) -> None:
        self.model = model
        self.row = 0 if model.games is None or game is None else model.games.row(game)
        self.places = torch.arange(len(model.actions))
        if model.games is not None:
            self.places = model.games.legal[self.row].nonzero()[:, 0].cpu()
        self.actions = [model.actions[k] for k in self.places.tolist()]

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
        own = self.places.to(frames.device)
        places = torch.cat([state["places"], own[state["taken"]][:, None]], 1)[:, 1:]
        root = model.root(frames, places, real, torch.full_like(places[:, 0], self.row) if self.row else None)
        logits, value = model.roots(root)
        after = {"frames": frames[:, 1:], "real": real[:, 1:], "places": places, "taken": state["taken"]}
        return Root(logits[:, own], value, root), after

    def recurrent(self, state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        """`MuZero.recurrent` with the actions of the game alone."""
        own = self.places.to(action.device)
        output, state = self.model.recurrent(state, own[action])
        return output._replace(prior_logits=output.prior_logits[:, own]), state


def muzero_policy(
    checkpoint: str | Path,
    planner: Mapping[str, Any] | None = None,
    game: str | None = None,
    device: str = "cpu",
) -> tuple[SearchPolicy, dict[str, Any]]:
    """The policy of a checkpoint, and the dataset card of its log.

    Args:
        checkpoint: of a `MuZeroLearner`.
        planner: settings of the search, as conf/planner has them; by default those that it was trained with and, for a
            clone, its policy without a search. With a search the best action is taken, without one it is drawn.
        game: that it is to play, by name; by default the only one that it learned.
        device: where it acts.

    Raises:
        UserError: as `load_muzero`, or the planner is to consider more actions than the game has.
    """
    model, given = load_muzero(checkpoint)
    settings = dict(planner or given["search"] or PRIOR)
    policy = as_policy(model.to(device), settings, game=game)
    refuse_more(planner, len(policy.actions))
    return policy, given["card"]


def as_policy(
    model: MuZero, settings: Mapping[str, Any], noise: bool | None = None, game: str | None = None
) -> SearchPolicy:
    """A model as a policy.

    Args:
        model: in evaluation mode.
        settings: of the search.
        noise: whether it explores; by default only where there is no search.
        game: that it is to play, by name; by default the only one that it learned.

    Raises:
        UserError: it learned other games, or several and none is given.
    """
    if model.games is not None:
        names = model.games.names
        game = names[0] if game is None and len(names) == 1 else game
        if game not in names:
            raise UserError(f"the model plays {' and '.join(names)}, and not {game}; say which of them is played")
    eyes, search = Eyes(model, game), searching(settings)
    assert search is not None
    noise = settings["_target_"] == PRIOR["_target_"] if noise is None else noise

    step = model.recurrent if model.games is None else eyes.recurrent
    temperature = settings.get("temperature", 1.0) if settings["_target_"].endswith(DRAWING) else None
    kept = partial(expand_once, model)
    return SearchPolicy(eyes.begin, eyes.see, step, search, eyes.actions, noise, temperature, kept)

"""Weights of a model for the same one with more classes of reward, games and actions; what it knew is as it was."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldmodels.models.reward import DOUBLINGS, grown
from worldmodels.ops.groups import action_table, group
from worldmodels.types import ACTIONS

REWARD_HEAD = "reward_model.head.2.weight"
GAME = "game.weight"
"""How the names of weights end that have a row for each game."""
BY_ACTION = ("dynamics.action.weight", "dynamics.action.embedding.weight")
OUTPUT, BIAS = "policy.output.weight", "policy.output.bias"
"""Weights of a MuZero that have something for each action."""


def regrown(weights: Mapping[str, Tensor], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights for a model of `after`, from those of the model of `before`, by the names of games and actions.

    A game that is new begins with the row of games that are unknown, an action that is new with that of the first one
    of the old, which is NOOP where there is NOOP.

    Args:
        weights: a `state_dict`.
        before: settings of a learner: its `model`, and the `actions` of a MuZero.
        after: the same of one that knows more.
    """
    found = dict(weights)
    old, new = (given["model"].get("reward_model", {}).get("doublings", DOUBLINGS) for given in (before, after))
    if new > old:
        found[REWARD_HEAD] = grown(found[REWARD_HEAD], old, new)
    known, names = _games(before), _games(after)
    if known != names:
        rows = [0, *(known.index(name) + 1 if name in known else 0 for name in names)]
        found |= {name: value[rows] for name, value in found.items() if name.endswith(GAME)}
    had, has = _actions(before), _actions(after)
    if had != has:
        rows = torch.tensor([had.index(action) if action in had else 0 for action in has])
        found |= {name: found[name][rows] for name in BY_ACTION if name in found}
        if found[OUTPUT].ndim == 2:
            found |= {OUTPUT: found[OUTPUT][rows], BIAS: found[BIAS][rows]}
        else:  # with a symmetry built in, actions are the last dimension, and those of an orbit have one bias
            old, new = (_orbits(before["model"]["symmetry"], actions) for actions in (had, has))
            bias = found[BIAS][old][rows]
            bias = torch.stack([bias[new == orbit][0] for orbit in range(int(new.max()) + 1)])
            found |= {OUTPUT: found[OUTPUT][..., rows], BIAS: bias}
    return found


def _games(given: Mapping[str, Any]) -> list[str]:
    """Names in the order of their rows (`nn.games`)."""
    by_game = given["actions"] if "actions" in given else (given["model"].get("games") or {}).get("actions")
    return sorted(by_game) if isinstance(by_game, Mapping) else []


def _actions(given: Mapping[str, Any]) -> list[int]:
    """Those of a MuZero in the order of their rows; of several games it has all."""
    actions = given.get("actions", ())
    return list(range(len(ACTIONS))) if isinstance(actions, Mapping) else sorted(set(actions))


def _orbits(symmetry: str, actions: list[int]) -> Tensor:
    """Number of the orbit of each action, as `nn.equivariant_heads` counts them."""
    return action_table(group(symmetry), actions).amin(0).unique(return_inverse=True)[1]

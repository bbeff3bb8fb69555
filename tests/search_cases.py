"""Random searches over deterministic models, rebuilt from seeds: what golden trees and the reference are compared on.

Only raw bits of PCG64 are used, whose stream numpy promises not to change.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodels.planning.tree import Root
from worldmodels.types import Recurrent, RecurrentOutput, State

STATES, FEATURES = 12, 6
SHAPES = [  # batch, actions, simulations
    (1, 2, 1), (2, 3, 2), (3, 2, 5), (1, 18, 8), (5, 4, 3), (8, 6, 10), (16, 3, 16), (4, 18, 64), (12, 9, 13),
    (6, 5, 40), (32, 18, 4), (7, 2, 64), (64, 18, 2), (10, 7, 25), (2, 10, 50), (24, 4, 7), (9, 14, 20), (3, 6, 64),
    (20, 8, 9), (1, 3, 33), (13, 16, 12), (40, 5, 6), (5, 12, 30), (16, 18, 16), (64, 3, 8), (8, 17, 17), (3, 11, 45),
    (64, 18, 64),
]  # fmt: skip
KINDS = ("smooth", "table", "ties", "masked")
"""What the model of a seed is: a small network, a table of random numbers, one of few round numbers with many equal
scores, and one in which actions are forbidden (-inf) inside as well."""


@dataclass(frozen=True)
class Case:
    """A search to run; the arrays are float64, int64 and bool."""

    search: str
    kind: str
    batch: int
    actions: int
    simulations: int
    settings: dict[str, Any]
    noise: np.ndarray
    invalid: np.ndarray
    state: np.ndarray
    model: dict[str, np.ndarray] = field(repr=False)


class Draws:
    def __init__(self, *seed: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence(seed))

    def uniform(self, *shape: int) -> np.ndarray:
        return (self.bits.random_raw(shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def bell(self, *shape: int) -> np.ndarray:
        """About normal, mean 0 and variance 1, by sums and products alone."""
        return 2 * (self.uniform(3, *shape).sum(0) - 1.5)

    def whole(self, top: int, *shape: int) -> np.ndarray:
        return np.floor(self.uniform(*shape) * top).astype(np.int64)


def cases(shapes: list[tuple[int, int, int]] = SHAPES) -> Iterator[Case]:
    """Both searches over every shape, with a model of every kind: 224 searches."""
    for search in ("gumbel", "puct"):
        for number, shape in enumerate(shapes):
            settings = _settings(search, number)
            for seed, kind in enumerate(KINDS):
                yield _case(search, kind, shape, settings, Draws(number, seed, len(search)))


def _settings(search: str, number: int) -> dict[str, Any]:
    """The same for all models of a shape, so that the reference is compiled once for them."""
    settings: dict[str, Any] = {}
    if number % 5 == 3:
        settings["max_depth"] = 1 + number % 4
    if search == "puct":
        more = ({}, {"dirichlet_fraction": 0.0}, {"pb_c_init": 2.5, "pb_c_base": 100.0}, {"dirichlet_fraction": 0.5})
    else:
        more = ({}, {"max_considered": 4}, {"value_scale": 1.0, "visit_offset": 20.0}, {"rescale": False})
        more = (*more, {"max_considered": 1}, {"max_considered": 18, "value_scale": 0.5})
    return settings | more[number % len(more)]


def _case(search: str, kind: str, shape: tuple[int, int, int], settings: dict[str, Any], draws: Draws) -> Case:
    batch, actions, simulations = shape
    if kind == "smooth":
        model = {
            "move": draws.bell(actions, FEATURES, FEATURES),
            "policy": 2 * draws.bell(FEATURES, actions),
            "value": draws.bell(FEATURES),
            "reward": draws.bell(FEATURES),
            "end": draws.bell(FEATURES),
        }
        state = draws.bell(batch, FEATURES)
    else:
        table = (STATES, actions)
        model = {"next": draws.whole(STATES, *table), "logits": 2 * draws.bell(*table), "value": draws.bell(STATES)}
        model |= {"reward": draws.bell(*table), "discount": 0.9 + 0.1 * draws.uniform(*table)}
        model["discount"][draws.uniform(*table) < 0.15] = 0
        state = draws.whole(STATES, batch)
    if kind == "ties":
        model["logits"] = np.zeros_like(model["logits"])
        model["value"] = np.zeros(STATES)
        model["reward"] = draws.whole(2, *table) * 1.0
        model["discount"] = np.where(model["discount"] > 0, 0.5, 0.0)
    invalid = draws.uniform(batch, actions) < 0.3
    if kind == "masked":
        model["logits"][draws.uniform(*table) < 0.3] = -np.inf
        model["logits"][:, -1] = np.where(np.isinf(model["logits"]).all(1), 0, model["logits"][:, -1])
        invalid[(invalid | np.isinf(model["logits"][state])).all(1)] = False
    invalid &= kind != "table"
    invalid[invalid.all(1), -1] = False
    if kind == "masked":  # the root itself has finite logits, as the reference needs them; the mask forbids the rest
        invalid |= np.isinf(model["logits"][state])
    uniform = draws.uniform(batch, actions)
    if search == "gumbel":
        noise = np.zeros_like(uniform) if kind == "ties" else -np.log(-np.log(uniform + 1e-12))
    else:
        noise = np.ones_like(uniform) if kind == "ties" else uniform**4
        noise /= noise.sum(1, keepdims=True)
    return Case(search, kind, batch, actions, simulations, settings, noise, invalid, state, model)


def in_torch(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Recurrent, Root]:
    """The model and the root of a case."""
    m = {k: _tensor(v, dtype) for k, v in case.model.items()}
    state = _tensor(case.state, dtype)
    if case.kind == "smooth":

        def network(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
            h = torch.einsum("bi,bij->bj", state["h"], m["move"][action])
            h = h / (1 + h.abs())
            discount = 0.97 * (h @ m["end"] > -1).to(dtype)
            return RecurrentOutput(h @ m["reward"], discount, h @ m["policy"], h @ m["value"]), {"h": h}

        return network, Root(state @ m["policy"], state @ m["value"], {"h": state})

    def table(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        at, new = (state["s"], action), m["next"][state["s"], action]
        return RecurrentOutput(m["reward"][at], m["discount"][at], m["logits"][new], m["value"][new]), {"s": new}

    return table, Root(m["logits"][state], m["value"][state], {"s": state})


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array).to(dtype) if array.dtype == np.float64 else torch.from_numpy(array)

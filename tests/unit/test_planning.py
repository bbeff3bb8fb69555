"""Searches over small exact models: what they find, and that both backends grow the same trees."""

import functools

import pytest
import torch
from torch import Tensor

from tests.conformance import check_policy
from worldmodels.planning.gumbel import gumbel_search
from worldmodels.planning.policy import SearchPolicy
from worldmodels.planning.puct import puct_search
from worldmodels.planning.tree import Root
from worldmodels.types import RecurrentOutput, State

SEARCHES = {"gumbel": gumbel_search, "puct": puct_search}
BACKENDS = ("numba", "torch")
both_searches = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


class Toy:
    """A random smooth model with 8 numbers as its state."""

    def __init__(self, actions: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        draw = functools.partial(torch.randn, generator=g, dtype=dtype)
        self.move, self.policy, self.value = draw(actions, 8, 8), draw(8, actions), draw(8)

    def root(self, batch: int, seed: int = 1) -> Root:
        g = torch.Generator().manual_seed(seed)
        h = torch.randn(batch, 8, generator=g, dtype=self.value.dtype)
        return Root(h @ self.policy, h @ self.value, {"h": h})

    def step(self, state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        h = torch.tanh(torch.einsum("bi,bij->bj", state["h"], self.move[action]))
        discount = 0.97 * (h[:, 1] > -0.8).to(h.dtype)
        return RecurrentOutput(2 * h[:, 0], discount, h @ self.policy, h @ self.value), {"h": h}


@both_searches
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backends_grow_the_same_trees(search, dtype: torch.dtype) -> None:
    toy = Toy(6, dtype)
    root = toy.root(32)
    noise = torch.rand(32, 6, generator=torch.Generator().manual_seed(5), dtype=dtype)
    mask = torch.arange(6).expand(32, 6) == 2
    for settings in ({}, {"invalid": mask}, {"invalid": mask, "invalid_inside": mask}, {"max_depth": 2}):
        a, b = (search(toy.step, root, 24, noise=noise, backend=backend, **settings) for backend in BACKENDS)
        assert torch.equal(a.tree.children(6), b.tree.children(6))
        assert torch.equal(a.visits, b.visits)
        assert torch.equal(a.action, b.action)
        assert a.visits.sum(-1).eq(24).all()
        for name in ("action_weights", "value", "q"):
            assert getattr(a, name).dtype == dtype
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-5, rtol=1e-5)


def seen(observation: Tensor, state: State, toy: Toy) -> tuple[Root, State]:
    h = torch.tanh(state["h"] + observation.flatten(1)[:, :8] / 255)
    return Root(h @ toy.policy, h @ toy.value, {"h": h}), {"h": h}


@both_searches
@pytest.mark.parametrize("noise", [False, True])
def test_a_policy_of_callables_is_a_policy(search, noise: bool) -> None:
    toy = Toy(3, torch.float32)
    policy = SearchPolicy(
        begin=lambda n: {"h": torch.zeros(n, 8)},
        see=functools.partial(seen, toy=toy),
        recurrent=toy.step,
        search=functools.partial(search, num_simulations=8),
        actions=(0, 2, 5),
        noise=noise,
    )
    frames = torch.randint(0, 256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    check_policy(policy, frames)
    state = policy.start(12)
    acts = [policy.act(frames, state, torch.Generator().manual_seed(seed))[0] for seed in range(20)]
    assert set(torch.stack(acts).unique().tolist()) <= {0, 2, 5}
    alone = torch.cat([policy.act(frames[i : i + 1], policy.start(1))[0] for i in range(12)])
    assert torch.equal(alone, policy.act(frames, state)[0])
    assert (torch.stack(acts) == acts[0]).all() != noise

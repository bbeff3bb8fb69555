"""How actions enter and leave, and a small agent (representation, dynamics, heads) unrolled under every element."""

import copy
import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from worldmodels.nn.equivariant import GroupConv2d, GroupLinear, GroupResidual, LiftConv2d, expand_once
from worldmodels.nn.equivariant_heads import ActionEmbedding, ActionHead, embed_action, flatten_fields, invariant
from worldmodels.nn.symmetrise import Symmetrised
from worldmodels.ops.groups import GROUPS, Group, action_table, group, transform, transform_fields

BOUND = 1e-9
LITTLE = [0, 2, 3, 4, 5]
every_symmetry = pytest.mark.parametrize("symmetry", [g for g in GROUPS.values() if len(g) > 1], ids=lambda g: g.name)


@every_symmetry
@pytest.mark.parametrize("actions", [list(range(18)), LITTLE, [5, 0, 4, 2, 3]], ids=str)
def test_actions_enter_and_leave_as_the_group_moves_them(actions, symmetry):
    table = action_table(symmetry, actions)
    action, features = torch.arange(len(actions)), torch.randn(3, 4, len(symmetry), dtype=torch.float64)
    codes, embedding = embed_action(action, table), ActionEmbedding(table, 3)
    assert torch.equal(codes[:, :, 0], torch.eye(len(actions)))
    assert torch.equal(codes.sum(1), torch.ones(len(actions), len(symmetry)))
    mixed = torch.einsum("bau,af->bfu", codes, embedding.embedding.weight)
    assert torch.allclose(embedding(action), mixed)  # the one is the other, mixed by one weight
    head = ActionHead(table, 4).double()
    nn.init.normal_(head.bias)
    logits = head(features)
    assert logits.shape == (3, len(actions))
    for g in range(len(symmetry)):
        assert torch.equal(embed_action(table[g][action], table), transform_fields(codes, symmetry, g))
        assert torch.equal(embedding(table[g][action]), transform_fields(embedding(action), symmetry, g))
        moved = head(transform_fields(features, symmetry, g))
        assert torch.allclose(moved[:, table[g]], logits, rtol=0, atol=BOUND)
    assert float((moved - logits).detach().abs().max()) > 0.01


def test_the_head_of_actions_has_a_bias_for_each_orbit():
    head = ActionHead(action_table(group("d4")), 2)
    assert head.bias.shape == (6,)
    assert head.orbit.tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5]
    assert ActionHead(action_table(group("flip_lr")), 2).bias.shape == (12,)


class Seen(NamedTuple):
    """At a row: latent (B, F, G, h, w), reward and value (B,), policy (B, A)."""

    latent: Tensor
    reward: Tensor
    value: Tensor
    policy: Tensor


class Agent(nn.Module):
    """A small MuZero over fields, by group convolutions or by symmetrisation.

    Args:
        symmetry: of all its parts.
        route: "layers" or "symmetrised".
        side: of the frames, 15 (a latent image of 5x5) or 32 (of 4x4).
        fields: F.
    """

    def __init__(self, symmetry: Group, route: str, side: int, fields: int = 2) -> None:
        super().__init__()
        self.table = action_table(symmetry)
        actions, size, small = self.table.shape[1], len(symmetry), 5 if side == 15 else 4
        if route == "layers":
            if side == 15:
                down: list[nn.Module] = [LiftConv2d(symmetry, 3, fields, 3, 3, 0)]
            else:
                down = [
                    LiftConv2d(symmetry, 3, fields, 12, 4, 4),
                    nn.ReLU(),
                    GroupConv2d(symmetry, fields, fields, 4, 2),
                ]
            self.representation: nn.Module = nn.Sequential(*down, GroupResidual(symmetry, fields, fields))
            self.dynamics: nn.Module = nn.Sequential(
                GroupConv2d(symmetry, fields + actions, fields), GroupResidual(symmetry, fields, fields)
            )
            self.read: nn.Module = GroupLinear(symmetry, fields * small**2, 8)
        else:
            strides = [3] if side == 15 else [2, 2, 2]
            channels = [3] + [fields] * len(strides)
            down = [
                layer
                for (i, o), stride in zip(pairwise(channels), strides, strict=True)
                for layer in (nn.Conv2d(i, o, 3, stride, 1), nn.Tanh())
            ]
            self.representation = Symmetrised(symmetry, nn.Sequential(*down))
            moved = nn.Sequential(nn.Conv2d((fields + actions) * size, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, fields, 1))
            self.dynamics = Symmetrised(symmetry, moved, "all")
            self.read = Symmetrised(symmetry, nn.Sequential(nn.Linear(fields * small**2, 8), nn.Tanh()))
        self.group = symmetry
        self.reward, self.value, self.policy = nn.Linear(8, 1), nn.Linear(8, 1), ActionHead(self.table, 8)

    def forward(self, frames: Tensor, actions: Tensor) -> list[Seen]:
        """Frames (B, 3, H, W) and actions (B, K) to what is seen at K + 1 rows."""
        with expand_once(self):
            latent = scaled(self.representation(frames))
            rows = [self.look(latent)]
            for action in actions.unbind(1):
                code = embed_action(action, self.table).to(latent.dtype)
                planes = code[..., None, None].expand(-1, -1, -1, *latent.shape[-2:])
                latent = scaled(latent + self.dynamics(torch.cat([latent, planes], 1)))
                rows.append(self.look(latent))
        return rows

    def look(self, latent: Tensor) -> Seen:
        features = torch.tanh(self.read(flatten_fields(latent, self.group)))
        still = invariant(features)
        return Seen(latent, self.reward(still)[:, 0], self.value(still)[:, 0], self.policy(features))


def scaled(latent: Tensor) -> Tensor:
    """Each row to 0..1, as MuZero does."""
    low, high = (x.view(-1, 1, 1, 1, 1) for x in latent.flatten(1).aminmax(dim=1))
    return (latent - low) / (high - low)


def batch(side: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(2, 3, side, side, dtype=dtype, generator=generator)
    return frames, torch.randint(18, (2, 3), generator=generator)


def broken(agent: Agent, frames: Tensor, actions: Tensor) -> list[float]:
    """At each row, the greatest difference between what a moved agent sees and what is seen, moved; of all elements."""
    worst = [0.0] * (actions.shape[1] + 1)
    with torch.no_grad():
        rows = agent(frames, actions)
        for g, (element, moved) in enumerate(zip(agent.group.elements, agent.table, strict=True)):
            for k, (a, b) in enumerate(zip(agent(transform(frames, element), moved[actions]), rows, strict=True)):
                expected = transform_fields(b.latent, agent.group, g), b.reward, b.value, b.policy
                there = a._replace(policy=a.policy[:, moved])
                differences = [float((x - y).abs().max()) for x, y in zip(there, expected, strict=True)]
                assert all(map(math.isfinite, differences))
                worst[k] = max(worst[k], *differences)
    return worst


def train(agent: Agent, frames: Tensor, actions: Tensor) -> None:
    optimizer = torch.optim.AdamW(agent.parameters(), 0.02, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        rows = agent(frames, actions)
        loss = sum((row.reward - k).square().mean() + (row.value + k).square().mean() for k, row in enumerate(rows))
        loss = loss + sum(nn.functional.cross_entropy(row.policy, actions[:, 0]) for row in rows)
        loss.backward()
        optimizer.step()


@every_symmetry
@pytest.mark.parametrize("side", [15, 32])
@pytest.mark.parametrize("route", ["layers", "symmetrised"])
def test_a_whole_unroll_is_equivariant_also_when_trained_and_loaded(route, side, symmetry):
    torch.manual_seed(0)
    agent, (frames, actions) = Agent(symmetry, route, side).double(), batch(side)
    assert max(broken(agent, frames, actions)) <= BOUND
    before = agent(frames, actions)[-1]
    train(agent, frames, actions)
    after = agent(frames, actions)[-1]
    assert all(float((x - y).detach().abs().max()) > 1e-3 for x, y in zip(before, after, strict=True))
    assert max(broken(agent, frames, actions)) <= BOUND
    again = Agent(symmetry, route, side).double()
    again.load_state_dict(agent.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(again(frames, actions)[-1], after, strict=True))
    assert max(broken(copy.deepcopy(again), frames, actions)) <= BOUND


@every_symmetry
def test_one_plain_part_breaks_what_comes_after_it(symmetry):
    torch.manual_seed(0)
    agent, (frames, actions) = Agent(symmetry, "layers", 15).double(), batch(15)
    size = len(symmetry)
    plain = nn.Conv2d(20 * size, 2 * size, 3, padding=1).double()
    agent.dynamics = nn.Sequential(nn.Flatten(1, 2), plain, nn.Unflatten(1, (2, size)))
    first, *later = broken(agent, frames, actions)
    assert first <= BOUND
    assert min(later) > 1e-2


@pytest.mark.parametrize("route", ["layers", "symmetrised"])
def test_an_unroll_in_lower_precision_differs_by_what_rounding_makes_of_it(route):
    """bfloat16 has 8 bits: 2^-8 of each number is lost at each layer, where the order of a sum differs. Latent images
    are within 0..1, and about 4 layers and their norms lie between two of them, which may amplify it: 2^-4 bounds it.
    """
    torch.manual_seed(0)
    agent, (frames, actions) = Agent(group("d4"), route, 15), batch(15, torch.float32)
    assert max(broken(agent, frames, actions)) <= 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert max(broken(agent, frames, actions)) <= 2**-4
        rounded = agent(frames, actions)[-1]
    exact = agent(frames, actions)[-1]
    assert float((rounded.latent - exact.latent).detach().abs().max()) > 2**-9  # it was rounded


@pytest.mark.parametrize("route", ["layers", "symmetrised"])
def test_a_compiled_unroll_is_the_same(route):
    torch.manual_seed(0)
    agent, (frames, actions) = Agent(group("c4"), route, 15).double(), batch(15)
    compiled = copy.deepcopy(agent)
    for part in (compiled.dynamics, compiled.policy):
        part.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the second time with other weights
        rows, others = agent(frames, actions), compiled(frames, actions)
        for row, other in zip(rows, others, strict=True):
            assert all(torch.allclose(x, y, rtol=0, atol=1e-12) for x, y in zip(row, other, strict=True))
        for network, seen in ((agent, rows), (compiled, others)):
            network.zero_grad()
            sum(x.square().mean() for row in seen for x in row).backward()
        for p, q in zip(agent.parameters(), compiled.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-10)
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.1)
                q.sub_(q.grad, alpha=0.1)
    assert list(compiled.state_dict()) == list(agent.state_dict())

"""MuZero with symmetries built in: what is seen moves with the frames, and the whole search moves with both."""

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import equivariance, equivariance_atari
from tests.conformance import check_world_model, generator, random_segment
from tests.unit.test_muzero import muzero, spread, targeted
from worldmodels.learners.acting import as_policy
from worldmodels.models.muzero import MuZero
from worldmodels.models.muzero_networks import PARTS
from worldmodels.nn import equivariant
from worldmodels.nn.equivariant import expand_once
from worldmodels.ops.groups import action_table, group, transform
from worldmodels.planning.gumbel import gumbel_search
from worldmodels.planning.puct import puct_search
from worldmodels.planning.tree import Root
from worldmodels.types import UserError

LAYERS = "model.sizes.tiny.representation.layers=[conv 16,conv 16,down 16]"
GROUPS = ["flip_lr", "flip_ud", "c4", "d4"]


def agent(symmetry: str, *more: str, size: int = 16) -> MuZero:
    """With frames of 16 or 15 pixels, and latent images of 2x2 or 3x3 cells."""
    patch = 4 if size == 16 else 3
    layers = LAYERS.replace("down 16", "block") if patch == 3 else LAYERS
    settings = [f"model.symmetry={symmetry}", f"model.sizes.tiny.representation.patch={patch}", layers, *more]
    return spread(muzero("model.frames=2", *settings, size=size)).double().eval()


def frames(model: MuZero, rows: int = 3) -> Tensor:
    size = model.image_size
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (rows, 2, 3, size, size), generator=g, dtype=torch.uint8)


def state(model: MuZero, seen: Tensor) -> dict[str, Tensor]:
    real = torch.ones(seen.shape[:2], dtype=torch.bool)
    return model.fresh(model.represent(seen, torch.zeros(len(seen), 1, dtype=torch.long), real))


def rollout(model: MuZero, seen: Tensor, actions: Tensor) -> list[Tensor]:
    """Policy and value at the root, then reward, discount, policy and value after each action."""
    now = state(model, seen)
    outputs = list(model.roots(now))
    for action in actions.unbind(1):
        out, now = model.recurrent(now, action)
        outputs += [out.reward, out.discount, out.prior_logits, out.value]
    return outputs


def broken(model: MuZero) -> float:
    """The greatest difference between a moved agent's rollout and the rollout, moved; of all elements."""
    seen, table = frames(model), action_table(model.group, model.actions)
    actions = torch.randint(len(model.actions), (3, 3), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain, worst = rollout(model, seen, actions), 0.0
        for element, moves in zip(model.group.elements, table, strict=True):
            moved = rollout(model, transform(seen.flatten(0, 1), element).view_as(seen), moves[actions])
            for a, b in zip(moved, plain, strict=True):
                worst = max(worst, float(((a[:, moves] if a.ndim == 2 else a) - b).abs().max()))
    return worst


@pytest.mark.parametrize("route", ["layers", "symmetrised"])
@pytest.mark.parametrize("symmetry", GROUPS)
def test_rollouts_move_with_the_frames(symmetry: str, route: str) -> None:
    model = agent(symmetry, f"model.route={route}", size=16 if route == "layers" else 15)
    model.know(frames(model, 8).flatten(0, 1))
    assert broken(model) < 1e-9


@pytest.mark.parametrize(
    "more",
    [["model.recurrent=true"], ["model.value_prefix={lstm:4,horizon:2}"], ["model.sizes.tiny.dynamics.skip=true"]],
)
def test_with_any_switch(more: list[str]) -> None:
    assert broken(agent("d4", *more)) < 1e-9


def test_after_training_and_in_bfloat16() -> None:
    """Symmetry is not something that is learned, and not something that is unlearned."""
    model = trained()
    other = agent("c4").float()
    other.load_state_dict(model.state_dict())
    assert broken(other.double().eval()) < 1e-9
    with torch.autocast("cpu", torch.bfloat16):
        # eight bits of mantissa, and four networks in a row; measured: 0 with all parts, 0.9 and more without one
        assert broken(other.float()) < 0.1
        for part in PARTS:
            assert broken(trained(but(part))) > 0.3, part


def trained(*more: str) -> MuZero:
    model = agent("c4", *more).float().train()
    segment = random_segment(4, 14, 3, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for _ in range(5):
        loss, _ = model.loss(segment)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def but(part: str) -> str:
    """The setting that gives all parts but one the symmetry."""
    return f"model.symmetric=[{','.join(sorted(set(PARTS) - {part}))}]"


def test_a_part_that_has_no_symmetry_breaks_it() -> None:
    for part in PARTS:
        assert broken(agent("c4", but(part))) > 1e-3, part
    assert broken(agent("c4", "model.symmetric=[]")) > 1e-3


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("kind", ["gumbel", "puct"])
def test_the_search_moves_with_frames_and_draws(kind: str, backend: str) -> None:
    """256 roots, the 7 moves of D4 and 50 simulations: visits move exactly, values are equal to 1e-9.

    A quarter of the roots are of frames that no move changes, half of these without noise, so that equally good actions
    are told apart by the draws alone. Half of all roots have actions that are illegal.
    """
    small = "model.sizes.tiny.representation.layers=[conv 4,conv 4,down 4]", "model.sizes.tiny.readout.width=12"
    model, roots, table = agent("d4", *small), 256, action_table(group("d4"))
    g = torch.Generator().manual_seed(3)
    seen = torch.randint(0, 256, (roots, 2, 3, 16, 16), generator=g, dtype=torch.uint8)
    still = torch.arange(roots) >= 192
    seen[still] = torch.stack([transform(seen[still], element) for element in model.group.elements]).amax(0)
    noise = torch.rand(roots, 18, generator=g, dtype=torch.float64).log().neg().log().neg()
    noise[still & (torch.arange(roots) % 4 < 2)] = 0
    invalid = (torch.rand(roots, 18, generator=g) < 0.3) & (torch.arange(roots) % 2 == 0)[:, None]
    invalid[:, 0] = False
    given = {"noise": noise, "ties": torch.rand(roots, 18, generator=g), "invalid": invalid, "invalid_inside": invalid}
    search: Any = gumbel_search
    if kind == "puct":
        given["noise"], search = noise.softmax(-1), puct_search

    def searched(seen: Tensor, **given: Tensor) -> Any:
        now = state(model, seen)
        return search(model.recurrent, Root(*model.roots(now), now), 50, backend=backend, **given)

    def by(moves: Tensor, draws: Tensor) -> Tensor:
        return torch.empty_like(draws).scatter_(1, moves.expand_as(draws), draws)

    with torch.no_grad(), expand_once(model):
        plain = searched(seen, **given)
        for element, moves in list(zip(model.group.elements, table, strict=True))[1:]:
            moved = searched(transform(seen, element), **{name: by(moves, x) for name, x in given.items()})
            assert torch.equal(moved.visits[:, moves], plain.visits)
            assert torch.equal(moved.action, moves[plain.action])
            torch.testing.assert_close(moved.value, plain.value, atol=1e-9, rtol=0)
        del given["ties"]
        first = [
            searched(transform(seen[still], element), **{name: by(moves, x[still]) for name, x in given.items()})
            for element, moves in zip(model.group.elements, table, strict=True)
        ]
    assert any(not torch.equal(f.visits[:, moves], first[0].visits) for f, moves in zip(first, table, strict=True))
    assert plain.visits.float().std(0).max() > 0


def test_play_expands_weights_once_an_action(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = agent("c4").float(), []
    plainly = equivariant._rearranged
    monkeypatch.setattr(equivariant, "_rearranged", lambda *given: calls.append(1) or plainly(*given))
    policy = as_policy(model, {"_target_": "worldmodels.planning.planners.gumbel", "num_simulations": 6})
    layers = sum(isinstance(layer, equivariant.Expanded) for layer in model.modules())
    state = policy.start(3)
    for acts in (1, 2):
        _, state = policy.act(frames(model)[:, 0], state)
        assert 0 < len(calls) <= acts * layers


def test_what_frames_are_like_is_known_of_all_turns_of_training() -> None:
    seen = torch.arange(2 * 3 * 20 * 20).remainder(251).view(2, 3, 20, 20).byte()
    model = muzero("model.turned=c4")
    model.know(seen)
    orbit = torch.cat([transform(seen, element) for element in group("c4").elements]) / 255
    torch.testing.assert_close(model.mean, orbit.mean(0))
    for element in group("c4").elements:
        torch.testing.assert_close(transform(model.scale, element), model.scale)


SIZES = ("model.sizes.tiny.representation.layers=[conv 48,conv 48,conv 48]", "model.sizes.tiny.readout.channels=8")
CELLS = "model.sizes.tiny.representation.patch=3"
SYMMETRIC = [run for runs in (equivariance.RUNS, equivariance_atari.RUNS) for run in runs.values() if run]
SYMMETRIC += [(f"model.symmetry={symmetry}", but(part)) for symmetry, part in zip(cycle(GROUPS), PARTS, strict=False)]


@pytest.mark.parametrize("route", ["layers", "symmetrised"])
def test_it_has_about_as_many_parameters_as_the_plain_one(route: str) -> None:
    """Every run of the benchmarks, all groups, and every part left out, in either way."""

    def parameters(*settings: str) -> int:
        model = muzero(*SIZES, CELLS, f"model.route={route}", *settings, actions=[0, 2, 3, 4, 5], size=15)
        return sum(p.numel() for p in model.parameters())

    plain = parameters()
    for run in SYMMETRIC:
        assert 0.97 < parameters(*run) / plain < 1.03, run
    assert parameters("model.symmetry=c4", "model.symmetric=[representation]", "+model.matched=false") > 1.5 * plain


def test_turned_batches_teach_a_symmetric_model_the_same() -> None:
    """Frames, actions and targets of policies are moved together: its loss is equal under every element."""
    model = agent("d4", "model.unroll=3", "model.td_steps=2")
    segment = targeted(model, 12, 16)
    plain, losses = model.loss(segment, generator())[0].item(), []
    model.turned = model.train().group
    for seed in range(12):
        losses.append(model.loss(segment, generator(seed))[0].item())
    assert losses == pytest.approx([plain] * 12, abs=1e-7)
    other = agent("none", "model.unroll=3", "model.td_steps=2", "model.turned=d4").train()
    assert len({round(other.loss(segment, generator(seed))[0].item(), 6) for seed in range(12)}) > 3


def test_conformance() -> None:
    check_world_model(lambda: spread(muzero("model.intensity=0.1", "model.symmetry=c4")), random_segment(3, 16, 3, 20))


@pytest.mark.parametrize(
    ("settings", "actions", "words"),
    [
        (["model.symmetry=c4"], [0, 3, 4], "^symmetry=c4 takes .* use symmetry=flip_lr"),
        (["model.turned=c4"], [0, 3, 4], "^turned=c4 takes .* use turned=flip_lr"),
        (["model.turned=c8"], range(18), "^turned=c8"),
        (["model.symmetry=c8"], range(18), "c4"),
        (["model.symmetry=d4", "model.symmetric=[reward,legs]"], range(18), "legs"),
        (["model.symmetry=d4", "model.route=magic"], range(18), "symmetrised"),
        (["model.symmetry=c4", "model.sizes.tiny.representation.layers=[conv 8,pool]"], range(18), "breaks symmetry"),
        (["model.symmetry=c4", "model.sizes.tiny.representation.layers=[block]"], range(18), "comes first"),
    ],
)
def test_mistakes(settings: list[str], actions: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        muzero(*settings, actions=actions)

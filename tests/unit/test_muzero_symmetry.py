"""MuZero with symmetries built in: what is seen moves with the frames, and the whole search moves with both."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import check_world_model, generator, random_segment
from tests.unit.test_muzero import muzero, spread, targeted
from worldmodels.models.muzero import PARTS, MuZero
from worldmodels.ops.groups import action_table, transform
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
    model = agent("c4").float().train()
    segment = random_segment(4, 14, 3, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for _ in range(5):
        loss, _ = model.loss(segment)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    other = agent("c4").float()
    other.load_state_dict(model.state_dict())
    assert broken(other.double().eval()) < 1e-9
    with torch.autocast("cpu", torch.bfloat16):
        assert broken(other.float()) < 0.1  # eight bits of mantissa, and four networks in a row


def test_a_part_that_has_no_symmetry_breaks_it() -> None:
    for part in PARTS:
        rest = ",".join(sorted(set(PARTS) - {part}))
        assert broken(agent("c4", f"model.symmetric=[{rest}]")) > 1e-3, part
    assert broken(agent("c4", "model.symmetric=[]")) > 1e-3


@pytest.mark.parametrize("kind", ["gumbel", "puct"])
def test_the_search_moves_with_frames_and_noise(kind: str) -> None:
    """256 roots and the 7 moves of D4: visits move exactly, values are equal to 1e-9."""
    model, roots, table = agent("d4"), 256, action_table(agent("d4").group)
    g = torch.Generator().manual_seed(3)
    seen = torch.randint(0, 256, (roots, 2, 3, 16, 16), generator=g, dtype=torch.uint8)
    noise = torch.rand(roots, 18, generator=g, dtype=torch.float64).log().neg().log().neg()
    search: Any = partial(gumbel_search, num_simulations=16)
    if kind == "puct":
        noise, search = noise.softmax(-1), partial(puct_search, num_simulations=16)

    def searched(seen: Tensor, noise: Tensor) -> Any:
        now = state(model, seen)
        return search(model.recurrent, Root(*model.roots(now), now), noise=noise)

    with torch.no_grad():
        plain = searched(seen, noise)
        for element, moves in list(zip(model.group.elements, table, strict=True))[1:]:
            moved_noise = torch.empty_like(noise)
            moved_noise[:, moves] = noise
            moved = searched(transform(seen.flatten(0, 1), element).view_as(seen), moved_noise)
            assert torch.equal(moved.visits[:, moves], plain.visits)
            assert torch.equal(moved.action, moves[plain.action])
            torch.testing.assert_close(moved.value, plain.value, atol=1e-9, rtol=0)
    assert plain.visits.float().std(0).max() > 0


@pytest.mark.parametrize("symmetry", ["flip_lr", "c4", "d4"])
def test_it_has_about_as_many_parameters_as_the_plain_one(symmetry: str) -> None:
    sizes = ["model.sizes.tiny.representation.layers=[conv 64,conv 64,conv 64]", "model.sizes.tiny.readout.channels=16"]
    count = [sum(p.numel() for p in muzero(*sizes, f"model.symmetry={s}").parameters()) for s in ("none", symmetry)]
    assert 0.8 < count[1] / count[0] < 1.2, count


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
        (["model.symmetry=c4"], [0, 3, 4], "flip_lr"),
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

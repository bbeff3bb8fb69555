"""The diffusion model with symmetry: exact in its denoiser, or taught by windows that are moved at random."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conformance import check_world_model, generator, random_segment
from tests.unit.test_diffusion import micro
from worldmodels.data.mixing import Mixture
from worldmodels.learners.world_model import WorldModelLearner
from worldmodels.models.denoiser import Denoiser
from worldmodels.ops.edm import karras_sigmas, sample
from worldmodels.ops.groups import Group, action_table, group, move_windows, transform
from worldmodels.types import Segment, UserError

GROUPS = ["flip_lr", "flip_ud", "c4", "d4"]
DILATED = {"context": 4, "cond_channels": 16, "channels": [16], "backbone": "dilated", "dilations": [1, 2]}


def denoiser(symmetry: str, **more: Any) -> Denoiser:
    """With weights that do something, in float64."""
    torch.manual_seed(0)
    network = {"num_actions": 18, "image_channels": 3, **DILATED, **more.pop("network", {})}
    made = Denoiser(network, symmetry=symmetry, **more).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def dream(model: Denoiser, context: Tensor, action: Tensor, noise: Tensor, memory: Tensor | None = None) -> Tensor:
    """A frame by three calls of the sampler."""
    centre = model.centre_of(context)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model.predict(x - centre, sigma, context, action, centre, memory=memory)[0].clamp(-1, 1)

    with torch.no_grad():
        return sample(denoise, 5 * noise + centre, karras_sigmas(3, 2e-3, 5.0))


def broken(model: Denoiser, symmetry: Group) -> float:
    """The greatest difference between the dream of all that is moved and the dream, moved; of all elements."""
    g = torch.Generator().manual_seed(1)
    context = torch.rand(2, 4, 3, 12, 12, generator=g, dtype=torch.float64) * 2 - 1
    noise = torch.randn(2, 3, 12, 12, generator=g, dtype=torch.float64)
    action = torch.randint(18, (2, 4), generator=g)
    plain, worst = dream(model, context, action, noise), 0.0
    for element, moves in zip(symmetry.elements, action_table(symmetry), strict=True):
        moved = dream(model, transform(context, element), moves[action], transform(noise, element))
        worst = max(worst, float((moved - transform(plain, element)).abs().max()))
    return worst


@pytest.mark.parametrize("symmetry", GROUPS)
@pytest.mark.parametrize(
    "more",
    [
        {"centre": "last"},
        {"centre": "moved", "network": {"patch": 2}},
        {"network": {"backbone": "unet", "channels": [8, 8], "depths": [1, 1], "attention": [False, True]}},
    ],
)
def test_dreams_move_with_frames_actions_and_noise(symmetry: str, more: dict[str, Any]) -> None:
    assert broken(denoiser(symmetry, **dict(more)), group(symmetry)) < 1e-9
    assert broken(denoiser("none", **dict(more)), group(symmetry)) > 1e-3


def test_the_memory_moves_along() -> None:
    """What it remembers of a film that is moved; in float32, as the memory is."""
    model = denoiser("d4", centre="last", memory={"cells": 3, "hidden": 8, "order": 4, "window": 6}).float()
    g = torch.Generator().manual_seed(2)
    film, noise = torch.rand(2, 7, 3, 12, 12, generator=g) * 2 - 1, torch.randn(2, 3, 12, 12, generator=g)
    action = torch.randint(18, (2, 4), generator=g)

    def ending(film: Tensor, action: Tensor, noise: Tensor, remembered: bool = True) -> Tensor:
        assert model.memory is not None
        return dream(model, film[:, -4:], action, noise, model.memory(film) if remembered else None)

    plain = ending(film, action, noise)
    assert not torch.allclose(plain, ending(film, action, noise, remembered=False), atol=1e-2)
    for element, moves in zip(model.symmetry.elements, model.moves, strict=True):
        moved = ending(transform(film, element), moves[action], transform(noise, element))
        torch.testing.assert_close(moved, transform(plain, element), atol=2e-4, rtol=0)


def test_conformance() -> None:
    model = {"denoiser": {"centre": "last"}, "symmetry": "c4", "turned": "d4"}
    check_world_model(lambda: micro(**model), random_segment(2, 6, 3, 16))


def test_symmetry_has_no_parameters() -> None:
    assert micro().state_dict().keys() == micro(symmetry="d4", turned="d4").state_dict().keys()


def test_moved_windows_are_whole_windows_of_the_moved_game() -> None:
    """Every window by its own element, frames and actions by the same, all else as it was; and back again."""
    d4, segment, g = group("d4"), random_segment(16, 3, 3, 8), torch.arange(16) % 8
    moved, table = move_windows(segment, d4, g), action_table(d4)
    for b in range(16):
        assert torch.equal(moved.obs[b], transform(segment.obs[b], d4.elements[g[b]]))
        assert torch.equal(moved.action[b], table[g[b]][segment.action[b]])
    back = move_windows(moved, d4, torch.tensor(d4.inverse)[g])
    assert torch.equal(back.obs, segment.obs) and torch.equal(back.action, segment.action)
    assert moved.reward is segment.reward and moved.mask is segment.mask


def seen_in_training(model: Any, segment: Segment, seed: int) -> Segment:
    """The windows that the reward model is taught by one call of the loss."""
    seen: list[Segment] = []
    learn = model.reward_model.loss
    model.reward_model.loss = lambda segment, *frames: (seen.append(segment), learn(segment, *frames))[1]
    try:
        model.loss(segment, generator(seed))
    finally:
        model.reward_model.loss = learn
    return seen[0]


def test_training_windows_are_moved_at_random_and_no_others() -> None:
    model, segment = micro(turned="d4").train(), random_segment(8, 6, 3, 16)
    seen = seen_in_training(model, segment, 0)
    found = []
    for b in range(8):
        alike = [move_windows(segment, model.turned, torch.full((8,), k)) for k in range(8)]
        found.append([torch.equal(seen.obs[b], a.obs[b]) and torch.equal(seen.action[b], a.action[b]) for a in alike])
    assert all(sum(row) == 1 for row in found), "each window is one of the eight, whole"
    assert len({row.index(True) for row in found}) > 2
    assert torch.equal(seen_in_training(model, segment, 0).obs, seen.obs), "the generator decides"
    assert not torch.equal(seen_in_training(model, segment, 1).obs, seen.obs)
    assert torch.equal(seen_in_training(model.eval(), segment, 0).obs, segment.obs)


@pytest.mark.parametrize("setting", ["turned", "symmetry"])
def test_mistakes(setting: str) -> None:
    """A group that there is not, one that the vocabulary lacks actions for, and one that the log lacks them for."""
    with pytest.raises(UserError, match="c8 is unknown"):
        micro(**{setting: "c8"})
    with pytest.raises(UserError, match="not among the 4 actions"):
        micro(**{setting: "c4", "num_actions": 4})
    learner = object.__new__(WorldModelLearner)
    torch.nn.Module.__init__(learner)
    learner.model = micro(**{setting: "c4"})
    learner.save_hyperparameters({"horizons": [1]})

    def logged(game: str, actions: list[int]) -> Any:
        return SimpleNamespace(card={"game": game}, column=lambda name: np.array(actions))

    data: Any = SimpleNamespace(validation={"length": 8}, learned=logged("pong", [0, 3, 4, 3]))
    with pytest.raises(UserError, match=f"^{setting}=c4 takes the action RIGHT to UP.* use {setting}=flip_lr"):
        learner.prepare(data, resumed=False)
    data.learned = object.__new__(Mixture)  # a game's windows are moved to play of that game, whatever others have
    data.learned.stores = [logged("pong", [0, 3, 4]), logged("freeway", [0, 2, 5])]
    with pytest.raises(UserError, match=r"UP to LEFT.*\[0, 2, 5\]"):
        learner.prepare(data, resumed=False)
    data.learned = logged("maze", [0, 2, 3, 4, 5])
    learner.prepare(data, resumed=False)


def test_frames_that_are_not_square_cannot_be_turned() -> None:
    segment = random_segment(2, 3, 3, 8)
    wide = replace(segment, obs=segment.obs[..., :6, :])
    with pytest.raises(UserError, match="6x8.*flip_lr"):
        move_windows(wide, group("c4"), torch.zeros(2, dtype=torch.long))
    flipped = move_windows(wide, group("flip_lr"), torch.ones(2, dtype=torch.long))
    assert torch.equal(flipped.obs, wide.obs.flip(-1))

"""MuZero's model: a world model as the others, with switches that do what they say and targets that make nothing up."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from tests.conformance import check_world_model, generator, random_segment
from tests.conftest import ROOT
from worldmodels.config import build as build_target
from worldmodels.config import sized
from worldmodels.data.targets import returns_to_go
from worldmodels.models.muzero import MuZero
from worldmodels.models.muzero_loss import POLICY, POLICY_KNOWN, VALUE, VALUE_KNOWN, Targets
from worldmodels.types import UserError

SMALL = ("model.sizes.tiny.representation.layers=[conv 8,block]", "model.sizes.tiny.readout.channels=4")
SWITCHES = {
    "plain": (),
    "recurrent": ("model.recurrent=true",),
    "consistency": ("model.consistency={width:16,hidden:8}",),
    "value_prefix": ("model.value_prefix={lstm:8,horizon:2}",),
    "probe": ("model.probe={hidden:8}",),
    "shift": ("model.shift=2",),
    "skip": ("model.sizes.tiny.dynamics.skip=true",),
    "two_hot": ("head@model.value=two_hot", "model.value.transform=h"),
}


def muzero(*overrides: str, actions: Any = range(18), channels: int = 3, size: int = 20) -> MuZero:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        settings = sized(compose("train", ["model=muzero", *SMALL, *overrides]).model)
    heads = {name: partial(build_target, settings.pop(name)) for name in ("value", "reward")}
    return build_target(settings, image_channels=channels, image_size=size, actions=actions, **heads)


def spread(model: MuZero) -> MuZero:
    """With heads that are not zero, so that outputs differ."""
    torch.manual_seed(3)
    for head in (model.policy.output, model.value, model.reward, model.end):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("switch", SWITCHES)
def test_conformance(switch: str) -> None:
    check_world_model(lambda: spread(muzero("model.intensity=0.1", *SWITCHES[switch])), random_segment(3, 16, 3, 20))


@pytest.mark.parametrize("recurrent", ["false", "true"])
def test_frames_before_an_episode_leave_no_trace(recurrent: str) -> None:
    """A context that is padded equals one that begins with the episode."""
    model, segment = spread(muzero(f"model.recurrent={recurrent}")), random_segment(2, 6, 3, 20)
    mask, obs = segment.mask.clone(), segment.obs.clone()
    mask[:, :4], obs[:, :4] = False, 0
    padded, short = model.start(replace(segment, mask=mask, obs=obs)), model.start(segment.steps(4, 6))
    torch.testing.assert_close(padded["latent"], short["latent"])
    assert not torch.allclose(padded["latent"], model.start(segment)["latent"])


def test_a_memory_does_not_step_by_an_action_that_the_model_has_not() -> None:
    model, segment = (
        spread(muzero("model.recurrent=true", "model.frames=3", actions=[3, 4])),
        random_segment(2, 3, 3, 20),
    )
    segment.action[:] = torch.tensor([3, 0, 4])
    torch.testing.assert_close(model.start(segment)["latent"], model.start(segment.steps(2, 3))["latent"])


@pytest.mark.parametrize("change", ["model.shift=2", "model.intensity=0.1", "model.turned=c4"])
def test_frames_are_changed_in_training_alone(change: str) -> None:
    model, segment = spread(muzero(change, actions=[0, 2, 3, 4, 5])), random_segment(2, 16, 3, 20)
    assert len({model.loss(segment, generator(seed))[0].item() for seed in range(6)}) > 1
    assert len({model.eval().loss(segment, generator(seed))[0].item() for seed in range(6)}) == 1


def test_a_search_steps_as_the_world_model_does() -> None:
    model, segment = spread(muzero(actions=[0, 3, 4])), random_segment(4, 6, 3, 20)
    state = model.start(segment)
    out, after = model.recurrent(state, torch.tensor([0, 1, 2, 1]))
    seen, step = model.step(state, torch.tensor([0, 3, 4, 3]), generator())
    torch.testing.assert_close(after["latent"], seen["latent"])
    torch.testing.assert_close(out.reward, step.reward_mean)
    torch.testing.assert_close(out.discount, model.gamma * (1 - step.terminated_mean))
    assert out.prior_logits.shape == (4, 3)
    with pytest.raises(UserError, match="cannot take"):
        model.step(state, torch.tensor([0, 3, 4, 5]))


def test_the_value_prefix_gives_rewards_as_differences() -> None:
    """Of sums that begin anew every two steps."""
    model, segment = spread(muzero("model.value_prefix={lstm:8,horizon:2}")), random_segment(3, 6, 3, 20)
    state, sums, rewards = model.start(segment), [], []
    for t in range(4):
        out, state = model.recurrent(state, segment.action[:, t])
        sums.append(state["prefix"][:, -1])
        rewards.append(out.reward)
    torch.testing.assert_close(
        torch.stack(rewards), torch.stack([sums[0], sums[1] - sums[0], sums[2], sums[3] - sums[2]])
    )


def targeted(model: MuZero, length: int = 12, size: int = 20) -> Any:
    """Windows with targets by row that are easily told apart."""
    segment = random_segment(2, length, 3, size)
    policy = torch.rand(2, length, len(model.actions), generator=generator(5)).softmax(-1)
    value, known = torch.arange(2.0 * length).view(2, length), torch.ones_like(segment.mask)
    return replace(
        segment,
        terminated=torch.zeros_like(segment.terminated),
        side={POLICY: policy, VALUE: value, POLICY_KNOWN: known, VALUE_KNOWN: known.clone()},
    )


def test_values_are_bootstrapped_n_steps_ahead() -> None:
    model = muzero("model.td_steps=3", "model.unroll=2", "model.gamma=0.5", "model.frames=2")
    segment = targeted(model)
    targets = Targets.of(model, segment)
    for j, t in enumerate((1, 2, 3)):
        r = segment.reward[:, t : t + 3]
        want = r[:, 0] + 0.5 * r[:, 1] + 0.25 * r[:, 2] + 0.125 * segment.side[VALUE][:, t + 3]
        torch.testing.assert_close(targets.value[:, j], want)
    assert targets.value_known.all()
    torch.testing.assert_close(targets.policy, segment.side[POLICY][:, 1:4])
    own = muzero("model.search_value=1", "model.unroll=2", "model.frames=2")
    torch.testing.assert_close(Targets.of(own, segment).value, segment.side[VALUE][:, 1:4])


def test_what_is_not_in_the_window_is_not_made_up() -> None:
    """Rows without a target, behind a cut, or bootstrapped from either, do not count; behind an end the value is 0."""
    model = muzero("model.td_steps=3", "model.unroll=2", "model.gamma=0.5", "model.frames=2")
    segment = targeted(model)
    segment.side[VALUE_KNOWN][0, 5] = False  # what row 2, the second of the unroll, bootstraps from
    segment.terminated[1, 2] = True
    targets = Targets.of(model, segment)
    assert targets.value_known.tolist() == [[True, False, True], [True, True, False]]
    assert targets.reached.tolist() == [[True, True, True], [True, True, False]]
    assert targets.taken.tolist() == [[True, True], [True, True]]
    assert targets.end.tolist() == [[0, 0], [0, 1]]
    torch.testing.assert_close(targets.value[1, 1], segment.reward[1, 2])
    cut = targeted(model)
    cut.truncated[0, 2], cut.mask[0, 3:] = True, False
    targets = Targets.of(model, cut)
    assert targets.value_known[0].tolist() == [True, False, False]
    assert targets.reached[0].tolist() == [True, True, False]


@pytest.mark.parametrize("frame_after", [False, True])
def test_before_a_cut_a_value_is_of_the_steps_that_there_are(frame_after: bool) -> None:
    """Bootstrapped at the last row that has a target, whether or not the log has the frame after it, which has none."""
    model = muzero("model.td_steps=3", "model.unroll=4", "model.gamma=0.5", "model.frames=2")
    segment, whole = targeted(model), targeted(model)
    segment = replace(segment, next_mask=segment.next_mask.clone())  # it is one with the mask
    segment.truncated[0, 4], segment.mask[0, 5:], segment.next_mask[0, 5:] = True, False, False
    segment.next_mask[0, 4] = frame_after
    targets, r, v = Targets.of(model, segment), segment.reward[0], segment.side[VALUE][0]
    assert targets.value_known.tolist() == [[True, True, True, False, False], [True] * 5]
    want = [r[1] + 0.5 * r[2] + 0.25 * r[3] + 0.125 * v[4], r[2] + 0.5 * r[3] + 0.25 * v[4], r[3] + 0.5 * v[4]]
    torch.testing.assert_close(targets.value[0, :3], torch.stack(want))
    assert torch.equal(targets.value[1], Targets.of(model, whole).value[1])
    segment.side[VALUE_KNOWN][0, 4] = False  # and nothing is known of that row either
    assert Targets.of(model, segment).value_known[0].tolist() == [False] * 5


def test_a_logged_return_is_not_better_than_itself() -> None:
    model = muzero("model.td_steps=3", "model.unroll=5", "model.gamma=0.97", "model.frames=2")
    segment = targeted(model)
    segment.terminated[:, -1] = True
    segment.reward[:] = torch.randn(2, 12, generator=generator(1))
    offsets, ended = np.array([0, 12]), segment.terminated[0].numpy()
    for reward, value in zip(segment.reward, segment.side[VALUE], strict=True):
        value[:] = torch.from_numpy(returns_to_go(reward.numpy(), ended, offsets, model.gamma)[0])
    assert not Targets.of(model, segment).better.any()
    segment.side[VALUE] -= 0.1
    assert Targets.of(model, segment).better.any()


def test_no_row_that_a_value_may_be_bootstrapped_from_is_left_out() -> None:
    for td_steps in range(1, 9):
        policy, value = muzero(f"model.td_steps={td_steps}", "model.unroll=3", "model.frames=2").rows()
        assert sorted({*policy, *value}) == list(range(1, 5 + td_steps))


@pytest.mark.parametrize(("unroll", "same"), [(1, True), (2, False)])
def test_the_gradient_is_scaled_between_steps_and_not_from_what_is_read(unroll: int, same: bool) -> None:
    found = []
    for gradient in (0.0, 1.0):
        model = spread(muzero(f"model.gradient={gradient}", f"model.unroll={unroll}", "model.frames=2")).eval()
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.loss(targeted(model), generator())[0].backward()
        found.append(next(model.dynamics.parameters()).grad)
    assert torch.allclose(*found) == same
    assert found[0].any()


def test_targets_change_the_loss_and_what_is_unknown_does_not() -> None:
    model = spread(muzero())
    segment = targeted(model, 16)
    before = model.loss(segment, generator())[0]
    segment.side[VALUE][:, 9] += 1
    after = model.loss(segment, generator())[0]
    assert before != after
    segment.side[VALUE_KNOWN][:, 9] = False
    unknown = model.loss(segment, generator())[0]
    segment.side[VALUE][:, 9] += 1e3
    assert model.loss(segment, generator())[0] == unknown
    root = model.frames - 1
    segment.side[VALUE_KNOWN][:, root] = False  # says nothing of the policy
    assert model.loss(segment, generator())[0] == unknown
    segment.side[POLICY_KNOWN][:, root] = False
    assert model.loss(segment, generator())[0] != unknown


def test_the_loss_falls_to_what_is_to_be_learned(build: Callable[..., MuZero] = muzero) -> None:
    """One window, many times: rewards and ends are known afterwards."""
    torch.manual_seed(0)
    model, segment = build("model.frames=2", "model.unroll=3"), random_segment(4, 10, 3, 20)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss, metrics = model.loss(segment, generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = model.eval().start(segment.steps(0, 1))
    _, step = model.step(state, segment.action[:, 1], generator())
    assert (step.reward_mean - segment.reward[:, 1]).abs().max() < 0.3
    assert metrics["loss_end"] < 0.3


@pytest.mark.parametrize(("size", "ends", "bins"), [("small", 10, 51), ("paper", 300, 601)])
def test_bins_of_the_heads_are_the_published_ones(size: str, ends: float, bins: int) -> None:
    """In the number that they are equally spaced in; `paper` has MuZero's, of width 1."""
    model = muzero(f"model.size={size}", size=96)
    for head in (model.value, model.reward):
        assert (-head.low, head.high, head.bins) == (pytest.approx(ends, abs=1e-4), pytest.approx(ends, abs=1e-4), bins)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.gamma=2", "from 0 to 1"),
        ("model.unroll=0", "at least 1"),
        ("model.frames=2.5", "model.frames=2.5 must be a whole number"),
        ("model.sizes.tiny.representation.layers=[blok]", "allowed are"),
        ("model.sizes.tiny.representation.patch=3", "does not divide"),
    ],
)
def test_mistakes(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        muzero(override)


def test_windows_and_frames_that_do_not_fit() -> None:
    model = muzero()
    with pytest.raises(UserError, match=r"data\.length=14"):
        model.loss(random_segment(2, 5, 3, 20))
    with pytest.raises(UserError, match="preprocessing"):
        model.start(random_segment(2, 6, 3, 24))

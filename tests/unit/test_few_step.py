"""The switches few_step and context_noise of models/denoiser.py."""

import pytest
import torch

from tests import conformance
from tests.unit.test_diffusion import micro, settings
from worldmodels.config import build
from worldmodels.models.denoiser import BLURS
from worldmodels.models.frames import blurred, to_float
from worldmodels.ops.edm import sample
from worldmodels.ops.shortcut import jump_levels
from worldmodels.types import UserError

START = {"start": "sigma", "quantize": "last"}


def lively(**overrides):
    """A model whose untrained network does something, with conditions that do nothing yet."""
    torch.manual_seed(0)
    model = micro(**overrides)
    for name, weight in model.denoiser.named_parameters():
        if not weight.any() and "labels" not in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def few(doublings=1, steps=1, **more):
    return lively(denoiser={"few_step": {"doublings": doublings}, **more}, sampler={"steps": steps, **START})


def with_labels(model, name, std=1.0):
    torch.nn.init.normal_(model.denoiser.network.labels[name].weight, std=std)
    return model


@pytest.mark.parametrize("size", ["micro", "tiny"])
def test_conformance(size):
    switches = {"few_step": {"doublings": 2, "share": 0.5}, "context_noise": 0.2}

    def make():
        if size == "micro":
            return micro(denoiser=switches, sampler={"steps": 1, **START})
        return build(settings(size, sizes={size: {"denoiser": switches}}))

    model = make()
    conformance.check_world_model(make, conformance.random_segment(2, model.min_length + 1, 3, model.image_size))


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_switches_are_off_by_default_and_add_nothing(size):
    on = {"few_step": {"doublings": 2}, "context_noise": 0.2}
    plain, switched = (
        build(settings(size)),
        build(settings(size, sizes={size: {"denoiser": on, "sampler": {"steps": 1}}})),
    )
    added = set(switched.state_dict()) - set(plain.state_dict())
    assert added == {f"denoiser.network.labels.{name}.weight" for name in ("jump", "blur")}
    assert not any(switched.state_dict()[name].any() for name in added), "they start without effect"


def test_off_the_loss_is_what_it_was_before_the_switches():
    """The figures are of the code before there were any; the draws of the generator are the same, too."""
    model, g = lively(), conformance.generator()
    loss, _ = model.loss(conformance.random_segment(4, 5, 3, 16), g)
    assert loss.item() == pytest.approx(3.6990719, rel=1e-5)
    assert torch.rand((), generator=g).item() == pytest.approx(0.28906894, rel=1e-6)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 8])
def test_jumps_of_so_many_calls(calls):
    assert few(doublings=2).denoiser.jump_of(calls) == {1: 2, 2: 1}.get(calls, 0)
    assert lively().denoiser.jump_of(calls) == 0


def test_without_a_jump_it_is_edm():
    """Rows that do not jump have EDM's loss, whatever the conditions of jumps have become."""
    segment = conformance.random_segment(8, 5, 3, 16)
    plain = lively(denoiser={"rollout": 0})
    jumping = with_labels(few(doublings=2, rollout=0), "jump")
    with torch.no_grad():
        jumping.denoiser.network.labels["jump"].weight[0] = 0
    jumping.load_state_dict(plain.state_dict(), strict=False)
    _, _, expected = plain.denoiser.loss(segment, conformance.generator())
    _, _, found = jumping.denoiser.loss(segment, conformance.generator())
    same = torch.isclose(expected, found, rtol=1e-4)
    assert same.sum() == 6  # a quarter of 8 rows jumps


@pytest.mark.parametrize("centre", ["none", "last"])
def test_one_call_is_taught_what_two_of_edm_give(centre):
    model = with_labels(few(centre=centre), "jump").denoiser
    frames = to_float(conformance.random_segment(8, 5, 3, 16).obs)
    context, action = frames[:, :4], torch.zeros(8, 4, dtype=torch.long)
    middle, sigma = model.centre_of(context), torch.ones(8)
    noisy = torch.zeros_like(middle)
    x, level, wanted, jump = model._jumps(
        model.few_step, noisy, sigma, frames[:, 4], context, action, middle, None, None, None, conformance.generator()
    )
    assert jump.sum() == 2
    assert torch.equal(x[jump == 0], noisy[jump == 0]) and torch.equal(wanted[jump == 0], frames[jump == 0, 4])
    assert (level == torch.where(jump == 1, 5.0, 1.0)).all()

    def edm(x, sigma):
        return model.predict(x - middle, sigma, context, action, middle)[0].clamp(-1, 1)

    with torch.no_grad():
        expected = sample(edm, x + middle, jump_levels(2, 2e-3, 5.0))
    torch.testing.assert_close(wanted[jump == 1], expected[jump == 1])


def test_the_longest_jump_is_taught_from_noise_alone():
    """As the sampler begins; so its target cannot depend on the true frame."""
    model = few(rollout=0).denoiser
    segment = conformance.random_segment(8, 4, 3, 16)
    other = segment.map(torch.clone)
    other.obs[:, 4] = 0
    (_, _, a), (_, _, b) = (model.loss(s, conformance.generator()) for s in (segment, other))
    assert torch.isclose(a, b).sum() == 2


def test_samplers_jump_where_they_can():
    """One and two calls follow the conditions of their jumps, three are EDM's."""
    segment = conformance.random_segment(2, 5, 3, 16)
    for calls, follows in ((1, {2}), (2, {1}), (3, {0})):
        model = few(doublings=2, steps=calls)
        before = model.step(model.start(segment), segment.action[:, -1], conformance.generator())[1].frame
        for jump in range(3):
            weight = model.denoiser.network.labels["jump"].weight
            torch.nn.init.zeros_(weight)
            weight.data[jump] = 3.0
            after = model.step(model.start(segment), segment.action[:, -1], conformance.generator())[1].frame
            assert torch.equal(before, after) == (jump not in follows), (calls, jump)


def test_one_call_comes_near_to_two():
    """Trained on a few windows, the jump is nearer to two calls of the same network than EDM's single call is."""
    model, segment = few(), conformance.random_segment(8, 5, 3, 16)
    optimizer = torch.optim.Adam(model.denoiser.parameters(), 3e-3)
    g = conformance.generator()
    for _ in range(150):
        loss, *_ = model.denoiser.loss(segment, g)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    context, action = to_float(segment.obs[:, :4]), segment.action[:, :4]
    noise, zero, level = 5 * torch.randn(8, 3, 16, 16, generator=g), torch.zeros(8, 3, 16, 16), torch.full((8,), 5.0)

    def call(x, sigma, jump=None):
        return model.denoiser.predict(x, sigma, context, action, zero, jump)[0].clamp(-1, 1)

    with torch.no_grad():
        two = sample(call, noise, jump_levels(2, 2e-3, 5.0))
        jumped, plain = (call(noise, level, torch.full((8,), k)) for k in (1, 0))
    assert (jumped - two).square().mean() < 0.8 * (plain - two).square().mean()


def test_noise_of_the_context():
    context, level = torch.zeros(2, 4, 3, 64, 64), torch.tensor([0.0, 0.3])
    noisy = blurred(context, level, conformance.generator())
    assert torch.equal(noisy[0], context[0])
    assert noisy[1].std().item() == pytest.approx(0.3, rel=0.02)


def test_the_network_is_told_how_noisy_the_context_is():
    model = with_labels(lively(denoiser={"context_noise": 0.5}), "blur").denoiser
    frames, action = to_float(conformance.random_segment(2, 5, 3, 16).obs), torch.zeros(2, 4, dtype=torch.long)
    zero, sigma = torch.zeros(2, 3, 16, 16), torch.ones(2)

    def denoised(blur):
        return model.predict(frames[:, 4], sigma, frames[:, :4], action, zero, blur=blur)[0]

    levels = [denoised(torch.full((2,), 0.5 * (k + 0.5) / BLURS)) for k in range(BLURS)]
    assert torch.equal(denoised(None), levels[0]) and torch.equal(denoised(torch.full((2,), 0.5)), levels[-1])
    assert all(not torch.equal(a, b) for a, b in zip(levels, levels[1:], strict=False))


def test_dreams_have_the_noise_that_is_asked_for():
    segment, frames = conformance.random_segment(2, 5, 3, 16), []
    for noise in (0.0, 0.0, 0.3):
        model = lively(denoiser={"context_noise": 0.5}, sampler={"context_noise": noise, **START})
        frames.append(model.step(model.start(segment), segment.action[:, -1], conformance.generator())[1].frame)
    assert torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[0], frames[2])


@pytest.mark.parametrize(
    ("denoiser", "sampler", "message"),
    [
        ({"few_step": {"doubling": 1}}, {}, "denoiser.few_step has no setting 'doubling'; it has doublings and share"),
        ({"few_step": {"doublings": 0}}, START, "few_step.doublings is 0; it must be a whole number above 0"),
        ({"few_step": {"share": 1.0}}, START, "few_step.share is 1.0; it must be between 0 and 1"),
        ({"few_step": {"doublings": 1}}, {"steps": 1}, "few_step needs sampler.start=sigma, not 'unit'"),
        ({"few_step": {"doublings": 1}}, {"steps": 1, **START, "order": 2}, "few_step needs sampler.order=1, not 2"),
        ({"context_noise": -0.1}, {}, "context_noise is -0.1; it must be 0"),
        ({}, {"context_noise": 0.1}, "sampler.context_noise is 0.1; it must be from 0 to what is trained"),
    ],
)
def test_bad_settings(denoiser, sampler, message):
    with pytest.raises(UserError, match=message):
        micro(denoiser=denoiser, sampler=sampler)

"""models/diffusion.py: published sizes, EDM identities, masks, and the conformance of every world model."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from tests import conformance
from worldmodels.config import build, conf_dir, sized
from worldmodels.imagination import LoggedActions, RandomPolicy, imagine
from worldmodels.models.diffusion import DiffusionWorldModel
from worldmodels.models.frames import images_of, to_float, to_uint8
from worldmodels.nn.unet import SelfAttention
from worldmodels.ops.edm import SCHEDULERS, preconditioners
from worldmodels.types import UserError

SIZES = ("tiny", "small", "paper")
HIGH = {"high_share": 0.5}
NOISE = {"loc": -0.4, "scale": 1.2, "sigma_min": 2e-3, "sigma_max": 20.0}
NETWORK = {"context": 4, "cond_channels": 16, "channels": [8], "depths": [1], "attention": [False]}


def settings(size, **overrides):
    cfg = OmegaConf.merge(OmegaConf.load(conf_dir() / "model" / "diffusion.yaml"), {"size": size}, overrides)
    return sized(OmegaConf.to_container(cfg, resolve=False))


def micro(**overrides) -> DiffusionWorldModel:
    """A model small enough for tests that train or roll out."""
    network = {"context": 4, "cond_channels": 16, "channels": [8, 8], "depths": [1, 1], "attention": [False, False]}
    denoiser = {"network": network, **overrides.pop("denoiser", {})}
    reward = {"cond_channels": 8, "channels": [8, 8], "depths": [1, 1], "attention": [False, False], "lstm": 16}
    reward |= overrides.pop("reward_model_settings", {})
    sampler = {"steps": 2, "sigma_min": 2e-3, "sigma_max": 5.0, **overrides.pop("sampler", {})}
    return DiffusionWorldModel(denoiser, reward, sampler, **{"image_size": 16, **overrides})


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("num_actions", "denoiser", "reward"), [(4, 4_405_955, 5_900_864), (18, 4_406_851, 5_902_656)])
def test_paper_size_has_the_published_parameter_counts(num_actions, denoiser, reward):
    model = build(settings("paper", num_actions=num_actions))
    assert (count(model.denoiser), count(model.reward_model)) == (denoiser, reward)


def test_paper_size_has_the_published_behaviour():
    model = build(settings("paper"))
    d = model.denoiser
    assert (d.sigma_data, d.sigma_offset, d.centre, d.changed_weight, d.rollout, d.rounding) == (
        0.5,
        0.3,
        "none",
        1,
        1,
        False,
    )
    assert d.noise == {"loc": -0.4, "scale": 1.2, "sigma_min": 2e-3, "sigma_max": 20.0}
    assert model.own_frames == 0
    sampler = {"steps": 3, "sigma_min": 2e-3, "sigma_max": 5.0, "rho": 7.0, "order": 1}
    further = {"start": "unit", "quantize": "every", "scheduler": None, "context_noise": 0.0}
    assert model.sampler == sampler | further
    assert d.padding == "grey"
    r = model.reward_model
    choices = (r.rewards, r.life_loss, r.event_weight, r.unknown_next, r.terminal_frame)
    assert choices == ("sign", "end", 1, "grey", "stale")
    assert all(block.attention.normed_skip for block in [*d.network.unet.encoder.middle, *r.encoder.middle])


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_smaller_sizes_mend_the_defects(size):
    model = build(settings(size))
    d, r = model.denoiser, model.reward_model
    assert d.rounding
    assert (model.sampler["start"], model.sampler["quantize"]) == ("sigma", "last")
    assert (r.rewards, r.life_loss, r.unknown_next, r.terminal_frame) == ("two_hot", "apart", "foreseen", "logged")
    attending = [m for m in d.modules() if isinstance(m, SelfAttention)]
    assert bool(attending) == (size == "small") and not any(m.normed_skip for m in attending)


def test_quantizing_once_is_finer_than_at_every_call():
    """With one network call both give the same frame; with more, the rounding of the earlier calls is gone."""
    segment = conformance.random_segment(2, 5, 3, 16)
    frames = {}
    for steps in (1, 3):
        for quantize in ("every", "last"):
            torch.manual_seed(0)
            model = micro(sampler={"steps": steps, "quantize": quantize, "sigma_max": 1.0})
            torch.nn.init.normal_(model.denoiser.network.conv_out.weight, std=0.3)
            frames[steps, quantize] = model.step(model.start(segment), segment.action[:, -1], conformance.generator())[
                1
            ]
    assert torch.equal(frames[1, "every"].frame, frames[1, "last"].frame)
    assert not torch.equal(frames[3, "every"].frame, frames[3, "last"].frame)


@pytest.mark.parametrize("padding", ["grey", "black"])
def test_padding(padding):
    model = micro(denoiser={"padding": padding})
    segment = conformance.random_segment(2, 6, 3, 16)
    mask, next_mask = segment.mask.clone(), segment.next_mask.clone()
    mask[:, 0], next_mask[:, 0], next_mask[:, -1] = False, False, False
    segment = replace(segment, mask=mask, next_mask=next_mask)
    images = images_of(segment, padding)
    real = to_float(segment.obs)
    assert torch.equal(images[:, 1:-1], real[:, 1:-1])
    assert (images[:, 0] == 0).all() == (padding == "grey")
    assert (images[:, -1] == 0).all() == (padding == "grey")
    short = model.start(segment.steps(5, 6))
    assert (short["frames"][:, :2] == (128 if padding == "grey" else 0)).all()


@torch.no_grad()
def test_paper_size_computes_what_diamonds_code_computes():
    """Its outputs (commit 5bcd159) for weights and inputs that are plain functions; benchmarks.reference has more."""
    model = build(settings("paper", num_actions=4))
    for value in model.state_dict().values():
        wave = torch.arange(value.numel(), dtype=torch.float64).sin().view(value.shape)
        value.copy_(wave * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1))
    frames = torch.linspace(-1, 1, 5 * 3 * 64 * 64).view(1, 5, 3, 64, 64)
    action, sigma, noisy = torch.tensor([[0, 1, 2, 3]]), torch.tensor([0.5]), frames[:, 4]
    denoised, c_out = model.denoiser.predict(noisy, sigma, frames[:, :4], action, torch.zeros_like(noisy))
    output = (denoised - preconditioners(sigma, 0.5, 0.3).c_skip * noisy) / c_out
    expected = torch.tensor([-0.0006347, 0.1017064, 0.0752773])
    torch.testing.assert_close(output[0, :, 10, 20], expected, atol=1e-5, rtol=0)
    reward, end, _ = model.reward_model(frames[:, :-1], frames[:, 1:], action)
    expected = torch.tensor([0.5755517, -0.5733738, 0.5675647])
    torch.testing.assert_close(reward[0, -1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(end[0, -1, 0], torch.tensor([-0.5581613, 0.5452228]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ["tiny", "micro"])
def test_conformance(size):
    def make():
        return micro() if size == "micro" else build(settings(size))

    model = make()
    length, side = model.min_length + 1, model.image_size
    conformance.check_world_model(make, conformance.random_segment(2, length, 3, side))


def test_conformance_of_diffusers_backbone():
    def make():
        levels = {"channels": [8] * 4, "depths": [1] * 4, "attention": [False, False, True, False]}
        return micro(
            denoiser={"network": {"context": 4, "cond_channels": 16, **levels, "backbone": "unet2d"}}, image_size=20
        )

    conformance.check_world_model(make, conformance.random_segment(2, 6, 3, 20))  # 20 is padded to 24


def test_diffusers_backbone_starts_as_the_skip_connection():
    model = build(settings("small", sizes={"small": {"denoiser": {"network": {"backbone": "unet2d"}}}}))
    noisy = torch.rand(1, 3, 64, 64)
    zero, action = torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, dtype=torch.long)
    output, c_out = model.denoiser.predict(noisy, torch.ones(1), torch.rand(1, 4, 3, 64, 64), action, zero)
    bias = model.denoiser.network.unet.net.conv_out.bias[None, :, None, None]
    skip = preconditioners(torch.ones(1), 0.5, 0.3).c_skip * noisy
    torch.testing.assert_close(output, skip + c_out * bias)


@pytest.mark.parametrize("sampler", [{"order": 2}, {"churn": {"amount": 1.0}}, *({"scheduler": n} for n in SCHEDULERS)])
def test_samplers_give_frames_of_their_own(sampler):
    segment, frames = conformance.random_segment(2, 5, 3, 16), []
    for change in ({}, sampler, sampler):
        torch.manual_seed(0)
        model = micro(sampler={"steps": 3, "quantize": "last", **change})
        torch.nn.init.normal_(model.denoiser.network.conv_out.weight, std=0.3)
        frames.append(model.step(model.start(segment), segment.action[:, -1], conformance.generator())[1].frame)
    assert torch.equal(frames[1], frames[2])
    if sampler == {"scheduler": "EDMEulerScheduler"}:
        assert (frames[0].int() - frames[1].int()).abs().max() <= 1, "Euler is Euler"
    else:
        assert not torch.equal(frames[0], frames[1])


@pytest.mark.parametrize("policy", [RandomPolicy([0, 3, 4]), LoggedActions(torch.randint(0, 18, (3, 5)))])
def test_policies_conform(policy):
    conformance.check_policy(policy, torch.zeros(3, 3, 16, 16, dtype=torch.uint8))


def test_untrained_denoiser_is_its_skip_connection():
    """F starts at zero, so D(y) = c_skip y, and D is y itself where there is no noise."""
    model = micro(denoiser={"sigma_offset": 0.0})
    noisy, context = torch.rand(2, 3, 16, 16) - 0.5, torch.rand(2, 4, 3, 16, 16)
    action = torch.zeros(2, 4, dtype=torch.long)
    for level in (1e-4, 0.5, 5.0):
        sigma = torch.full((2,), level)
        c = preconditioners(sigma, 0.5)
        denoised, c_out = model.denoiser.predict(noisy, sigma, context, action, torch.zeros(2, 3, 16, 16))
        torch.testing.assert_close(c_out, c.c_out)
        assert (denoised - c.c_skip * noisy).abs().amax() <= 0.2 * c_out.max()  # only conv_out's bias is left


def test_centred_denoiser_starts_as_copy_of_the_last_frame():
    model = micro(denoiser={"centre": "last", "rounding": True, "sigma_data": 0.01}, sampler={"start": "sigma"})
    segment = conformance.random_segment(2, 5, 3, 16)
    rollout = imagine(model, LoggedActions(segment.action), segment, 1, conformance.generator())
    assert (rollout.obs[:, 1].int() - segment.obs[:, -1].int()).abs().max() <= 2


@pytest.mark.parametrize("still", [0.0, 0.1])
def test_what_hardly_changes_is_left_still(still):
    model = micro(denoiser={"centre": "last", "rounding": True, "still": still}, sampler={"start": "sigma"})
    torch.nn.init.normal_(model.denoiser.network.conv_out.weight, std=0.03)
    segment = conformance.random_segment(2, 5, 3, 16)
    segment = replace(segment, obs=segment.obs // 2 + 64)  # away from black and white, where changes are cut off
    rollout = imagine(model, LoggedActions(segment.action), segment, 1, conformance.generator())
    change = (rollout.obs[:, 1].int() - segment.obs[:, -1].int()).abs().amax(1)
    assert change.max() > 13, "nothing to tell the two apart by"
    assert ((change > 1) & (change < 12)).any() == (still == 0)  # 0.1 is 12.75 levels of 255


def test_centre_is_the_same_where_training_is_in_bfloat16():
    model, context = micro(denoiser={"centre": "moved"}), to_float(conformance.random_segment(8, 5, 3, 16).obs[:, :4])
    with torch.autocast("cpu", torch.bfloat16):
        trained = model.denoiser.centre_of(context)
    assert torch.equal(trained, model.denoiser.centre_of(context))


def test_centre_moved_needs_four_frames():
    network = {"context": 3}
    with pytest.raises(UserError, match="4 frames of context"):
        micro(denoiser={"centre": "moved", "network": network})


def test_loss_of_an_untrained_network_is_the_variance_of_its_target():
    """EDM's preconditioning makes the target's variance 1 for data of standard deviation sigma_data."""
    model = micro(denoiser={"sigma_offset": 0.0})
    segment = conformance.random_segment(16, 5, 3, 16)
    scale = to_float(segment.obs).std().item() / 0.5
    loss, *_ = model.denoiser.loss(segment, conformance.generator())
    assert 0.7 < loss.item() < 1.3 * scale**2


@pytest.mark.parametrize("noiseless", [False, True])
def test_a_regressor_does_not_depend_on_the_noise(noiseless):
    model = micro(denoiser={"noiseless": noiseless}, sampler={"steps": 1, "start": "sigma"}).eval()
    torch.nn.init.normal_(model.denoiser.network.conv_out.weight, std=0.1)
    state = model.start(conformance.random_segment(2, 5, 3, 16))
    frames = [
        model.step(state, torch.zeros(2, dtype=torch.long), torch.Generator().manual_seed(k))[1].frame for k in (0, 1)
    ]
    assert torch.equal(*frames) == noiseless


def test_masked_rows_do_not_count():
    """Rows whose targets are padding change nothing in the loss."""
    model = micro()
    segment = conformance.random_segment(4, 6, 3, 16)
    segment.mask[2:], segment.next_mask[2:] = False, False
    other = segment.map(torch.clone)
    other.obs[2:] = 0
    other.reward[2:] = 1
    assert model.loss(segment, conformance.generator())[0] == model.loss(other, conformance.generator())[0]


def test_second_target_is_conditioned_on_the_models_own_output():
    model = micro(denoiser={"rollout": 2})
    segment = conformance.random_segment(2, model.min_length, 3, 16)
    _, seen, _ = model.denoiser.loss(segment, conformance.generator())
    real = to_float(segment.obs)
    assert torch.equal(seen[:, :4], real[:, :4])
    assert (seen[:, 4:] != real[:, 4:]).flatten(2).any(-1).all()
    assert torch.equal(to_float(to_uint8(seen, rounding=True)), seen), "own frames are 8-bit frames"


def test_quantizers():
    frames = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(frames)), frames)
    between = to_float(frames[:-1]) + 0.9 / 127.5
    assert torch.equal(to_uint8(between, rounding=True), frames[1:])
    assert torch.equal(to_uint8(between, rounding=False), frames[:-1])
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_start_pads_a_short_context_as_before_an_episodes_start():
    model = micro()
    segment = conformance.random_segment(2, 6, 3, 16)
    short = model.start(segment.steps(5, 6))
    assert (short["frames"][:, :2] == 128).all()
    assert torch.equal(short["frames"][:, 2:], segment.obs[:, 5:])
    assert short["actions"].shape == (2, 3)
    full = model.start(segment)
    assert torch.equal(full["frames"], segment.obs[:, 3:])
    assert torch.equal(full["actions"], segment.action[:, 3:])


@torch.no_grad()
@pytest.mark.parametrize("padding", ["grey", "black"])
def test_start_pads_masked_rows_as_training_does(padding):
    model = micro()
    model.denoiser.padding = padding
    segment = conformance.random_segment(2, 6, 3, 16)
    obs, mask, next_mask = segment.obs.clone(), segment.mask.clone(), segment.next_mask.clone()
    obs[:, :4], mask[:, :4], next_mask[:, :3] = 0, False, False  # the episode begins with frame 4
    next_mask[:, 3] = False
    segment = replace(segment, obs=obs, mask=mask, next_mask=next_mask)
    state = model.start(segment)
    assert (state["frames"][:, 0] == (128 if padding == "grey" else 0)).all()
    assert torch.equal(state["frames"][:, 1:], obs[:, 4:])
    images = images_of(segment, padding)
    _, _, (hidden, _) = model.reward_model(images[:, :-1], images[:, 1:], segment.action)
    assert torch.equal(state["hidden"], hidden[0])


def test_quickened_dreams_are_the_same_to_a_few_levels():
    segment, frames, means = conformance.random_segment(2, 5, 3, 16), [], []
    for quick in (False, True):
        torch.manual_seed(0)
        model = micro(sampler={"steps": 3, "quantize": "last"})
        torch.nn.init.normal_(model.denoiser.network.conv_out.weight, std=0.3)
        model = model.quicken() if quick else model
        step = model.step(model.start(segment), segment.action[:, -1], conformance.generator())[1]
        frames.append(step.frame.int())
        means.append(step.reward_mean)
    assert model.denoiser.network.conv_in.weight.dtype == torch.bfloat16
    assert (frames[0] - frames[1]).abs().float().mean() < 2
    torch.testing.assert_close(means[0], means[1], atol=0.02, rtol=0)


def test_imagined_segment():
    model = micro()
    context = conformance.random_segment(3, 5, 3, 16)
    rollout = imagine(model, RandomPolicy([0, 2]), context, 7, conformance.generator())
    assert rollout.obs.shape == (3, 8, 3, 16, 16)
    assert torch.equal(rollout.obs[:, 0], context.obs[:, -1])
    assert set(rollout.action.unique().tolist()) <= {0, 2}
    ended = rollout.terminated[:, :-1].cumsum(1) > 0
    assert torch.equal(rollout.mask[:, 1:], ~ended)
    assert rollout.side["reward_mean"].abs().max() <= 1


@pytest.mark.parametrize("rewards", ["sign", "two_hot"])
def test_a_step_tells_the_probabilities_of_the_signs(rewards):
    model = micro(reward_model_settings={"rewards": rewards})
    segment, given = conformance.random_segment(2, 5, 3, 16), []
    model.reward_model.register_forward_hook(lambda _, __, output: given.append(output[0][:, 0]))
    _, step = model.step(model.start(segment), segment.action[:, -1], conformance.generator())
    p = given[-1].softmax(-1)
    zero = p.shape[1] // 2
    torch.testing.assert_close(step.reward_signs, torch.stack([p[:, :zero].sum(1), p[:, zero + 1 :].sum(1)], 1))
    assert (step.reward_signs.sum(1) < 1).all()


@pytest.mark.parametrize("choice", ["end", "apart", "ignored"])
def test_it_tells_whether_lost_lives_are_ends(choice):
    assert micro(reward_model_settings={"life_loss": choice}).ends_with_lives == (choice == "end")


def test_learns_a_moving_square():
    """A hundred steps on a square that moves as the action says beat copying the last frame threefold."""
    torch.manual_seed(0)
    model = micro(
        denoiser={"centre": "last", "rounding": True, "sigma_data": 0.3, "sigma_offset": 0.0}, sampler={"steps": 1}
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)

    def batch(n):
        segment = conformance.random_segment(n, 5, 3, 16, seed=int(torch.randint(1 << 30, (1,), generator=g)))
        segment.action[:] = torch.randint(0, 2, segment.action.shape, generator=g)
        place = torch.randint(4, 8, (n, 1), generator=g) + torch.cat(
            [torch.zeros(n, 1, dtype=torch.long), (2 * segment.action - 1).cumsum(1)], dim=1
        )
        on = (torch.arange(16) - place[..., None]).abs() <= 1  # (B, T+1, W)
        segment.obs[:] = (on[:, :, None, None, :] * 255).to(torch.uint8)
        segment.reward[:] = 0
        segment.terminated[:] = False
        return segment

    for _ in range(120):
        loss, _ = model.loss(batch(8), g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = batch(64)
    context, action, truth = test.steps(0, 4), test.action[:, 4:], test.obs[:, 5].float()
    predicted = imagine(model, LoggedActions(action), context, 1, g).obs[:, 1].float()
    copied = test.obs[:, 4].float()
    assert (predicted - truth).square().mean() < (copied - truth).square().mean() / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denoiser": {"centre": "first"}}, "allowed are 'none', 'last' and 'moved'"),
        ({"denoiser": {"padding": "white"}}, "allowed are 'grey' and 'black'"),
        ({"sampler": {"sigma_max": 30.0}}, "sigma_max=30 .churn included. must rise within what"),
        ({"sampler": {"sigma_min": 0.0}}, "sampler.sigma_min=0.0"),
        ({"sampler": {"sigma_min": 6.0}}, "sampler.sigma_min=6.0"),
        (
            {"denoiser": {"network": NETWORK | {"depths": []}}},
            r"depths=\[\] and attention=\[False\] must have one entry",
        ),
        (
            {"denoiser": {"network": NETWORK | {"backbone": "unet2d", "attention": []}}},
            r"depths=\[1\] and attention=\[\] must have one entry",
        ),
        ({"denoiser": {"network": NETWORK | {"backbone": "dilated", "channels": [8, 8]}}}, "dilated has one level"),
        ({"sampler": {"steps": 0}}, "sampler.steps is 0; it must be a whole number of at least 1"),
        ({"sampler": {"stpes": 3}}, "sampler has no setting 'stpes'; it has steps, sigma_min"),
        ({"sampler": {"churn": {"amuont": 1.0}}}, "sampler.churn has no setting 'amuont'; it has amount, low"),
        ({"sampler": {"start": "two"}}, "sampler.start is 'two'; allowed are 'unit', 'sigma'"),
        ({"sampler": {"scheduler": "DDIM"}}, "allowed are None, 'EDMEulerScheduler'"),
        ({"denoiser": {"network": NETWORK | {"patch": 3}}}, "does not divide"),
        ({"denoiser": {"network": NETWORK | {"context": 3}}}, "context is 3; it must be a whole number that divides"),
        ({"denoiser": {"network": NETWORK | {"context": 0}}}, "context is 0; it must be a whole number that divides"),
        ({"denoiser": {"rollout": -1}}, "denoiser.rollout is -1; it must be a whole number of at least 0"),
        ({"denoiser": {"sigma_data": 0.0}}, "sigma_data is 0.0; it must be above 0"),
        ({"denoiser": {"noise": NOISE | {"sigma_min": -1.0}}}, "noise.sigma_min=-1.0 and sigma_max=20.0 must rise"),
        ({"denoiser": {"noise": NOISE | {"high_share": 2}}}, "noise.high_share=2 must be from 0 to 1"),
        ({"denoiser": {"noise": NOISE | HIGH | {"high_range": [0, 7]}}}, r"high_range=\[0, 7\] must be two rising"),
        ({"denoiser": {"noise": NOISE | HIGH | {"high_range": [1, 30]}}}, "within sigma_min=0.002 to sigma_max=20.0"),
        ({"denoiser": {"noise": {"sigma_min": 2e-3, "sigma_max": 20.0, "scale": 1.2}}}, "'loc' is missing"),
        ({"denoiser": {"noise": NOISE | {"locc": 1.0}}}, "'locc' is unknown"),
        ({"sampler": {"rho": 0}}, "sampler.rho is 0; it must be above 0"),
        ({"sampler": {"sigma_max": 16.0, "churn": {"amount": 1.0}}}, "sigma_max=22.6274 .churn included. must rise"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        micro(**change)


@pytest.mark.parametrize("start", ["unit", "sigma"])
def test_where_the_sampler_starts(start, monkeypatch):
    """At noise of deviation sigma_max about the centre; DIAMOND starts at unit noise about nothing."""
    model = micro(denoiser={"centre": "last"}, sampler={"start": start, "steps": 1}).eval()
    segment, seen = conformance.random_segment(2, 5, 3, 16), []
    predict = model.denoiser.predict
    monkeypatch.setattr(model.denoiser, "predict", lambda x, *rest: seen.append(x) or predict(x, *rest))
    model.step(model.start(segment), segment.action[:, -1], conformance.generator())
    noise = torch.randn((2, 3, 16, 16), generator=conformance.generator())
    centre = to_float(segment.obs[:, -1])
    assert torch.allclose(seen[0] + centre, noise if start == "unit" else 5.0 * noise + centre, atol=1e-5)


def test_one_frame_of_context_beside_a_memory():
    network = NETWORK | {"context": 1, "channels": [8], "depths": [1], "attention": [False]}
    model = micro(denoiser={"network": network, "memory": {"cells": 2, "hidden": 8, "order": 4, "window": 8}}).eval()
    segment = conformance.random_segment(2, 5, 3, 16)
    model.loss(segment)[0].backward()
    state, _ = model.step(model.start(segment), segment.action[:, -1], conformance.generator())
    model.step(state, segment.action[:, -1], conformance.generator())


def test_noise_levels_that_the_sampler_does_not_reach_need_no_training():
    """As in experiment=pong_tiny_regressor, which knows one level alone."""
    noise = {"loc": 0.0, "scale": 0.0, "sigma_min": 5.0, "sigma_max": 5.0}
    assert micro(denoiser={"noise": noise}, sampler={"steps": 1}).sampler["sigma_min"] < 5.0
    with pytest.raises(UserError, match="sigma_min=5.0 to 5.0"):
        micro(denoiser={"noise": noise}, sampler={"steps": 2})


def test_bad_segments():
    model = micro()
    with pytest.raises(UserError, match="data.length=5"):
        model.loss(conformance.random_segment(1, 4, 3, 16))
    with pytest.raises(UserError, match="image_size"):
        model.loss(conformance.random_segment(1, 5, 3, 32))
    with pytest.raises(UserError, match="image_size"):
        model.start(conformance.random_segment(1, 5, 3, 32))
    segment = conformance.random_segment(1, 5, 3, 16)
    with pytest.raises(UserError, match="torch.float32"):
        model.loss(replace(segment, obs=segment.obs.float()))
    with pytest.raises(UserError, match="0 transitions but the model needs 1"):
        model.start(segment.steps(5, 5))

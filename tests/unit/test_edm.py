"""ops/edm.py against the published numbers, closed forms and diffusers' schedulers."""

import pytest
import torch
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

from worldmodels.ops import edm


def test_diamond_schedule():
    expected = torch.tensor([5.0, 0.283082, 0.002, 0.0])
    torch.testing.assert_close(edm.karras_sigmas(3, 2e-3, 5.0), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 18])
def test_schedule_equals_diffusers(steps):
    scheduler = EDMEulerScheduler(sigma_min=2e-3, sigma_max=5.0, sigma_data=0.5, rho=7.0, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(edm.karras_sigmas(steps, 2e-3, 5.0), scheduler.sigmas, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 0.1])
def test_sampler_equals_diffusers(sigma_data):
    """Euler over a fixed random network with EDM preconditioning, step for step."""
    scheduler = EDMEulerScheduler(sigma_min=2e-3, sigma_max=5.0, sigma_data=sigma_data, rho=7.0)
    scheduler.set_timesteps(5)
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    start = torch.randn(2, 3, 8, 8)

    def denoise(x, sigma):
        c = edm.preconditioners(sigma, sigma_data)
        return c.c_skip * x + c.c_out * network(c.c_in * x)

    ours = edm.sample(denoise, start, edm.karras_sigmas(5, 2e-3, 5.0))
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_preconditioned_input_and_target_have_unit_variance(offset):
    """EDM's design goal, for data of standard deviation sigma_data at every noise level."""
    g = torch.Generator().manual_seed(0)
    for level in (0.05, 0.5, 5.0):
        x = 0.5 * torch.randn(64, 3, 32, 32, generator=g)
        sigma = torch.full((64,), level)
        noisy = edm.add_noise(x, sigma, 0.0, g)
        c = edm.preconditioners(sigma, 0.5)
        assert (c.c_in * noisy).std().item() == pytest.approx(1, abs=0.02)
        assert ((x - c.c_skip * noisy) / c.c_out).std().item() == pytest.approx(1, abs=0.02)
        effective = edm.preconditioners(sigma, 0.5, offset)
        assert torch.equal(effective.c_in, edm.preconditioners((sigma**2 + offset**2).sqrt(), 0.5).c_in)


def test_offset_noise_is_one_draw_an_image_and_channel():
    noise = edm.add_noise(torch.zeros(2, 3, 4, 4), torch.zeros(2), 0.3, torch.Generator().manual_seed(0))
    assert (noise.flatten(2).std(-1) == 0).all()
    assert noise[:, :, 0, 0].unique().numel() == 6


def test_heun_beats_euler_on_a_gaussian():
    """For Gaussian data the ODE has the closed form x(0) = x(sigma) * s / sqrt(s^2 + sigma^2)."""
    s, sigma_max = 0.5, 5.0
    start = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * sigma_max
    exact = start * s / (s**2 + sigma_max**2) ** 0.5

    def denoise(x, sigma):
        return x * (s**2 / (s**2 + sigma**2))[:, None, None, None]

    errors = [
        (edm.sample(denoise, start, edm.karras_sigmas(30, 2e-3, sigma_max), order) - exact).abs().max()
        for order in (1, 2)
    ]
    assert errors[1] < errors[0] / 3
    with pytest.raises(ValueError, match="order is 3"):
        edm.sample(denoise, start, edm.karras_sigmas(2, 2e-3, 5.0), 3)


def test_churn_equals_diffusers():
    """Same noise, step for step; EDM's algorithm 2 adds it before the network call."""
    scheduler = EDMEulerScheduler(sigma_min=2e-3, sigma_max=5.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(5)
    torch.manual_seed(0)
    start = torch.randn(2, 3, 8, 8)
    churn = edm.Churn(amount=1.0, low=0.01, high=4.0, noise=1.003)

    def denoise(x, sigma):
        return x * (0.25 / (0.25 + sigma**2))[:, None, None, None]

    ours = edm.sample(denoise, start, edm.karras_sigmas(5, 2e-3, 5.0), 1, churn, torch.Generator().manual_seed(3))
    x, g = start, torch.Generator().manual_seed(3)
    settings = {"s_churn": 1.0, "s_tmin": 0.01, "s_tmax": 4.0, "s_noise": 1.003}
    seen = []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        scheduler.scale_model_input(x, t)
        inside = 0.01 <= sigma <= 4.0
        hat = sigma * (1.2 if inside else 1.0)
        state = g.get_state()
        noise = torch.randn(x.shape, generator=g) if inside else torch.zeros_like(x)
        g.set_state(state)
        raised = x + noise * 1.003 * (hat**2 - sigma**2) ** 0.5
        denoised = raised * 0.25 / (0.25 + hat**2)
        x = scheduler.step(denoised, t, x, **settings, generator=g, pred_original_sample=denoised).prev_sample
        seen.append(bool(inside))
    assert set(seen) == {True, False}
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_churn_of_zero_adds_nothing():
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def denoise(x, sigma):
        return x / 2

    sigmas = edm.karras_sigmas(3, 2e-3, 5.0)
    plain = edm.sample(denoise, start, sigmas)
    assert torch.equal(plain, edm.sample(denoise, start, sigmas, 1, edm.Churn(0.0)))
    assert not torch.equal(plain, edm.sample(denoise, start, sigmas, 1, edm.Churn(0.5)))


@pytest.mark.parametrize("name", edm.SCHEDULERS)
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_samplers_of_diffusers(name, offset):
    """Same levels, the same frame by Euler, and by DPM-Solver++ one that is nearer to many steps of Euler."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    start = torch.randn(2, 3, 8, 8)

    def denoise(x, sigma):
        c = edm.preconditioners(sigma, 0.5, offset)
        return c.c_skip * x + c.c_out * network(c.c_in * x)

    scheduler = edm.diffusers_scheduler(name, 8, 2e-3, 5.0)
    sigmas = edm.karras_sigmas(8, 2e-3, 5.0)
    torch.testing.assert_close(scheduler.sigmas, sigmas, atol=2e-6, rtol=2e-6)
    theirs, euler = edm.sample_with(scheduler, denoise, start), edm.sample(denoise, start, sigmas)
    if name == "EDMEulerScheduler":
        torch.testing.assert_close(theirs, euler, atol=1e-5, rtol=1e-5)
    else:
        exact = edm.sample(denoise, start, edm.karras_sigmas(500, 2e-3, 5.0))
        assert (theirs - exact).abs().mean() < (euler - exact).abs().mean() / 2
    with pytest.raises(ValueError, match="allowed are EDMEulerScheduler and"):
        edm.diffusers_scheduler("DDIMScheduler", 3, 2e-3, 5.0)


def test_last_call_is_returned_unchanged():
    frame = torch.rand(1, 3, 4, 4)
    assert torch.equal(
        edm.sample(lambda x, sigma: frame, torch.randn(1, 3, 4, 4), edm.karras_sigmas(3, 2e-3, 5.0)), frame
    )


def test_training_sigmas():
    g = torch.Generator().manual_seed(0)
    log = edm.training_sigmas(100_000, -0.4, 1.2, 2e-3, 20.0, generator=g).log()
    assert log.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert log.std().item() == pytest.approx(1.2, abs=0.02)
    mixed = edm.training_sigmas(100_000, -3.0, 0.1, 2e-3, 20.0, 0.6, (2.0, 7.0), generator=g)
    high = mixed[mixed > 1]
    assert len(high) / 100_000 == pytest.approx(0.6, abs=0.01)
    assert high.min() >= 2.0 - 1e-5
    assert high.max() <= 7.0 + 1e-5

"""nn/memory.py: the state-space memory against scipy's, and what a model gains by it."""

import numpy as np
import pytest
import torch
from scipy.signal import cont2discrete

from tests.unit.test_diffusion import NETWORK, micro
from worldmodels.nn.memory import LegendreMemory, MotionMemory
from worldmodels.types import Segment

MEMORY = {"cells": 4, "hidden": 16, "order": 8, "window": 12}


@pytest.mark.parametrize(("order", "window"), [(1, 4), (6, 12), (16, 24)])
def test_the_discrete_system_is_that_of_the_paper(order, window):
    """Equations 1 and 2 of Voelker et al. 2019, made discrete by scipy."""
    a, b = np.zeros((order, order)), np.zeros((order, 1))
    for i in range(order):
        b[i] = (2 * i + 1) * (-1) ** i
        for j in range(order):
            a[i, j] = (2 * i + 1) * (-1 if i < j else (-1) ** (i - j + 1))
    discrete = cont2discrete((a / window, b / window, np.eye(order), np.zeros((order, 1))), dt=1.0)
    memory = LegendreMemory(order, window)
    np.testing.assert_allclose(memory.transition, discrete[0], atol=1e-6)
    np.testing.assert_allclose(memory.entry, discrete[1][:, 0], atol=1e-6)


def test_the_state_holds_the_past_as_legendre_polynomials():
    """Evaluated at r in [0, 1], they give the input of r * window steps ago (equation 3)."""
    memory, steps = LegendreMemory(12, 24), torch.arange(200.0)
    wave = torch.sin(steps / 7) + 0.3 * torch.cos(steps / 5)
    state = memory(wave[None, :, None])[0, 0].double().numpy()
    for ago in (0, 6, 12, 18):  # an input is held from its step to the next: on average half a step older
        seen = np.polynomial.legendre.legval(2 * (ago + 0.5) / 24 - 1, state)
        assert seen == pytest.approx(float(wave[199 - ago]), abs=0.05)


def test_all_at_once_is_step_by_step():
    memory, inputs = LegendreMemory(16, 24), torch.randn(3, 30, 5, generator=torch.Generator().manual_seed(0))
    state = memory(inputs[:, :1])
    for t in range(1, 30):
        state = memory(inputs[:, t : t + 1], state)
    torch.testing.assert_close(state, memory(inputs), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(memory(inputs[:, 10:], memory(inputs[:, :10])), memory(inputs), atol=1e-5, rtol=1e-4)


def test_frames_that_are_none_leave_no_trace():
    torch.manual_seed(0)
    memory = MotionMemory(width=8, **MEMORY)
    frames = torch.rand(2, 9, 3, 16, 16) * 2 - 1
    real = torch.arange(8) >= 5
    masked = memory(frames, real.expand(2, 8))
    assert torch.equal(masked, memory(torch.cat([torch.rand(2, 5, 3, 16, 16), frames[:, 5:]], 1), real.expand(2, 8)))
    torch.testing.assert_close(masked, memory(frames[:, 5:]))


def test_a_dream_remembers_as_training_does():
    """What `start` and `step` carry along is what the loss sums up at once."""
    torch.manual_seed(0)
    model = micro(denoiser={"memory": MEMORY})
    rng = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (2, 15, 3, 16, 16), generator=rng, dtype=torch.uint8)
    real = torch.ones(2, 14, dtype=torch.bool)
    film = Segment(obs, torch.zeros(2, 14).long(), torch.zeros(2, 14), ~real, ~real, real, real)
    state = model.start(film)
    for _ in range(3):
        state, step = model.step(state, torch.zeros(2).long(), rng)
        obs = torch.cat([obs, step.frame[:, None]], 1)
    assert model.denoiser.memory is not None
    whole = model.denoiser.memory(obs.float() / 127.5 - 1)
    torch.testing.assert_close(state["history"], whole, atol=1e-4, rtol=1e-4)


def test_a_model_learns_what_lies_further_back_than_its_context():
    """A white frame, or a black one, shows again after nine steps, with a context of four."""

    def losses(memory) -> float:
        torch.manual_seed(0)
        settings = {"network": NETWORK, "memory": memory, "rollout": 0, "sigma_offset": 0.0, "noise": high}
        model = micro(denoiser=settings, sampler={"sigma_min": 10.0, "sigma_max": 50.0}).denoiser
        optimizer, rng, last = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0), []
        for step in range(120):
            obs = torch.zeros(16, 13, 3, 16, 16, dtype=torch.uint8)
            obs[:, [3, 12]] = 255 * torch.randint(0, 2, (16, 1, 1, 1, 1), generator=rng, dtype=torch.uint8)
            real = torch.ones(16, 12, dtype=torch.bool)
            film = Segment(obs, torch.zeros(16, 12).long(), torch.zeros(16, 12), ~real, ~real, real, real)
            loss, _, _ = model.loss(film, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last += [loss.item()] * (step >= 100)
        return sum(last) / len(last)

    # noise that hides the frame that it is added to
    high = {"loc": 4.0, "scale": 0.1, "sigma_min": 10.0, "sigma_max": 100.0}
    without, within = losses(None), losses(MEMORY)
    assert within < 0.3 * without, (within, without)

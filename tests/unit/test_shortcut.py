"""ops/shortcut.py: nested levels, and jumps against the closed form that Gaussian data have."""

import pytest
import torch

from worldmodels.ops.edm import sample
from worldmodels.ops.shortcut import jump_levels, jump_target, land

STD = 0.5  # of the Gaussian data


def batch(sigma_max=5.0):
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * sigma_max


def level(value):
    return torch.full((3,), value)


def edm(x, sigma):
    """EDM's denoiser of Gaussian data: their mean given the noisy image."""
    return x * (STD**2 / (STD**2 + sigma**2))[:, None, None, None]


def exact_jump(x, sigma, after):
    """The flow's closed form, x sqrt((STD^2 + after^2) / (STD^2 + sigma^2)), as the D of one Euler step."""
    landing = x * ((STD**2 + after**2) / (STD**2 + sigma**2)).sqrt()[:, None, None, None]
    s, r = (v[:, None, None, None] for v in (sigma, after))
    return (s * landing - r * x) / (s - r)


def test_levels_are_diamonds_first_two():
    torch.testing.assert_close(jump_levels(2, 2e-3, 5.0), torch.tensor([5.0, 0.283082, 0.0]), atol=1e-6, rtol=1e-6)
    assert jump_levels(1, 2e-3, 5.0).tolist() == [5.0, 0.0]


@pytest.mark.parametrize("jumps", [1, 2, 4, 8])
def test_levels_of_half_jumps_hold_those_of_whole_ones(jumps):
    torch.testing.assert_close(jump_levels(2 * jumps, 2e-3, 5.0)[::2], jump_levels(jumps, 2e-3, 5.0))


@pytest.mark.parametrize("after", [0.0, 0.3])
def test_two_exact_jumps_make_the_exact_jump_of_both(after):
    """Told the exact half jumps, the target is the exact one-step map of Gaussian data."""
    s, m, r = level(5.0), level(1.2), level(after)

    def half(x, sigma):
        return exact_jump(x, sigma, torch.where(sigma == s, m, r))

    x = batch()
    target = jump_target(half, x, s, m, r)
    torch.testing.assert_close(target, exact_jump(x, s, r))
    expected = x * ((STD**2 + after**2) / (STD**2 + 25)) ** 0.5
    torch.testing.assert_close(land(x, target, s, r), expected)


@pytest.mark.parametrize("doublings", [1, 2, 3])
def test_doubled_again_and_again_one_jump_is_the_sampler(doublings):
    """From EDM's calls at the bottom, the target of the longest jump is what so many Euler steps give."""
    levels = jump_levels(2**doublings, 2e-3, 5.0)

    def jump(first, last):
        if last - first == 1:
            return edm
        middle = (first + last) // 2
        halves = {levels[first].item(): jump(first, middle), levels[middle].item(): jump(middle, last)}

        def half(x, sigma):
            return halves[sigma[0].item()](x, sigma)

        ends = [level(levels[i].item()) for i in (first, middle, last)]
        return lambda x, sigma: jump_target(half, x, *ends)

    x = batch()
    torch.testing.assert_close(jump(0, 2**doublings)(x, level(5.0)), sample(edm, x, levels))


def test_a_target_lies_between_what_the_two_jumps_give():
    frames = iter([torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4)])
    target = jump_target(lambda x, sigma: next(frames), batch(), level(5.0), level(2.0), level(1.0))
    torch.testing.assert_close(target, torch.full_like(target, 1 - (5 - 2) * 1 / (2 * (5 - 1))))


def test_without_noise_left_a_target_is_what_the_second_jump_gives():
    frame = torch.rand(3, 2, 4, 4)
    assert torch.equal(jump_target(lambda x, sigma: frame, batch(), level(5.0), level(2.0), level(0.0)), frame)

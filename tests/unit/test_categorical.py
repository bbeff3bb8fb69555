"""ops/categorical.py: inverses, bins, and the codes of numbers on them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldmodels.ops.categorical import (
    expectation,
    hl_gauss,
    inverse_value_transform,
    project,
    sign_probabilities,
    symexp,
    symlog,
    symlog_bins,
    two_hot,
    value_transform,
)


@given(st.floats(-1e6, 1e6))
def test_symexp_is_the_inverse_of_symlog(x):
    value = torch.tensor(x, dtype=torch.float64)
    assert symexp(symlog(value)).item() == pytest.approx(x, rel=1e-9, abs=1e-9)


def test_bins():
    assert symlog_bins(3).tolist() == [-7, -3, -1, 0, 1, 3, 7]
    bins = symlog_bins(14)
    assert bins[-1] == 2**14 - 1
    gaps = symlog(bins.double()).diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 2.0).log())


@given(st.lists(st.floats(-20_000, 20_000), min_size=1, max_size=8))
def test_two_hot_keeps_the_number(values):
    bins, x = symlog_bins(14), torch.tensor(values)
    weights = two_hot(x, bins)
    assert weights.shape == (len(values), 29)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(values)))
    assert ((weights > 0).sum(-1) <= 2).all()
    torch.testing.assert_close(expectation(weights, bins), x.clamp(bins[0], bins[-1]), rtol=1e-4, atol=1e-4)


def test_two_hot_of_a_bin_is_one_hot():
    bins = symlog_bins(2)
    assert torch.equal(two_hot(bins, bins), torch.eye(5))
    assert two_hot(torch.tensor([[2.0]]), bins).tolist() == [[[0, 0, 0, 0.5, 0.5]]]


@pytest.mark.parametrize("x", [1.0, 7.0, 10.0, 100.0])
def test_the_probability_of_a_sign_does_not_hang_on_the_size(x):
    """A number between two bins, 10 say, is as surely above 0 as one that is a bin, 7."""
    bins = symlog_bins(14)
    mixed = 0.3 * two_hot(torch.tensor([x, -x]), bins) + 0.7 * two_hot(torch.zeros(2), bins)
    torch.testing.assert_close(sign_probabilities(mixed, bins), torch.tensor([[0.0, 0.3], [0.3, 0.0]]))


H = {1: 0.41521, 10: 2.32662, 100: 9.14988, 1e3: 31.6386, 1e4: 109.005, 1e5: 415.23}


@pytest.mark.parametrize("x", [0, *H, *(-x for x in H)])
def test_value_transform_has_the_published_values_and_its_inverse_holds_in_float32(x):
    value = torch.tensor(float(x))
    h = value_transform(value)
    assert h.item() == pytest.approx(math.copysign(H.get(abs(x), 0), x), rel=1e-5)
    assert inverse_value_transform(h).item() == pytest.approx(x, rel=1e-6)


def test_the_inverse_value_transform_does_not_cancel_near_zero():
    x = torch.linspace(-0.01, 0.01, 101)
    torch.testing.assert_close(inverse_value_transform(value_transform(x)), x, rtol=1e-6, atol=1e-12)
    h, eps = value_transform(x), 1e-3
    usual = h.sign() * ((((1 + 4 * eps * (h.abs() + 1 + eps)).sqrt() - 1) / (2 * eps)).square() - 1)
    assert (usual - x).abs().max() > 1e-5  # what the rewriting is for


def test_projection_of_a_moved_distribution_is_c51s_own():
    """Bellemare et al. 2017, algorithm 1, atom by atom."""
    bins, generator = torch.linspace(-10, 10, 51), torch.Generator().manual_seed(0)
    p = torch.randn(4, 51, generator=generator).softmax(-1)
    reward, discount = torch.tensor([1.0, 0.0, -12.0, 0.3]), torch.tensor([0.99, 1.0, 0.9, 0.0])
    expected = torch.zeros(4, 51, dtype=torch.float64)
    for i in range(4):
        for j in range(51):
            b = (float((reward[i] + discount[i] * bins[j]).double().clamp(-10, 10)) + 10) / 0.4
            low, high = math.floor(b), min(math.ceil(b), 50)
            expected[i, low] += float(p[i, j]) * (high - b if low < high else 1)
            expected[i, high] += float(p[i, j]) * (b - low)
    found = project(reward[:, None] + discount[:, None] * bins, p, bins)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-6)
    torch.testing.assert_close(expectation(found, bins)[3], torch.tensor(0.3))


def test_hl_gauss_is_the_mass_of_a_gaussian_cut_off_at_the_ends():
    edges, sigma = torch.linspace(-10, 10, 52), 0.3
    for y in (-10.0, -9.9, 0.0, 0.123, 7.5, 10.0):
        normal = torch.distributions.Normal(torch.tensor(y, dtype=torch.float64), sigma)
        expected = normal.cdf(edges.double()).diff()
        found = hl_gauss(torch.tensor([y]), edges, sigma)[0]
        torch.testing.assert_close(found, (expected / expected.sum()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("ratio", "bias"), [(0.25, 3.6e-2), (0.5, 9e-4), (0.75, 4e-6), (1.0, 4e-6)])
def test_hl_gauss_keeps_the_number_from_a_ratio_of_three_quarters_on(ratio, bias):
    edges = torch.linspace(-10, 10, 52)
    centres, y = (edges[1:] + edges[:-1]) / 2, torch.linspace(-8, 8, 1001)
    error = (expectation(hl_gauss(y, edges, ratio * 20 / 51), centres) - y).abs().max().item()
    assert error <= bias * 1.05
    assert error > bias / 2 or ratio >= 0.75


@pytest.mark.parametrize("y", [12.0, 15.0, 20.0, 1e6, float("inf")])
def test_codes_of_numbers_beyond_the_support_are_finite_and_those_of_its_end(y):
    edges = torch.linspace(-10, 10, 52)
    for code, end in ((hl_gauss(torch.tensor([y, -y]), edges, 0.29), hl_gauss(torch.tensor([10.0, -10]), edges, 0.29)),
                      (two_hot(torch.tensor([y, -y]), edges), two_hot(torch.tensor([10.0, -10]), edges))):  # fmt: skip
        assert torch.equal(code, end) and torch.isfinite(code).all()
        torch.testing.assert_close(code.sum(-1), torch.ones(2))

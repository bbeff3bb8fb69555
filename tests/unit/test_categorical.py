"""ops/categorical.py: inverses, bins, and the two-hot code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldmodels.ops.categorical import expectation, symexp, symlog, symlog_bins, two_hot


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

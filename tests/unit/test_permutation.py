import numpy as np
import pytest

from worldmodels.data.permutation import permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 9, 31, 33, 100, 1000, 65536, 65537])
def test_it_is_a_bijection(size):
    for key, number in [(0, 0), (1, 0), (1, 5), (2**64 - 1, 10**9)]:
        out = permuted(np.arange(size), size, key, number)
        assert out.dtype == np.int64
        np.testing.assert_array_equal(np.sort(out), np.arange(size))


@pytest.mark.parametrize("size", [10**6, 3 * 10**9, 2**32 + 1, 2**62])
def test_places_need_no_neighbours(size):
    places = np.array([0, 1, size // 3, size - 1])
    out = permuted(places, size, 7, 3)
    assert len(set(out.tolist())) == 4 and out.min() >= 0 and out.max() < size
    for place, value in zip(places, out, strict=True):
        assert permuted(np.array([place]), size, 7, 3).tolist() == [value]


def test_keys_and_numbers_give_other_orders():
    orders = [permuted(np.arange(500), 500, key, number) for key in (0, 1) for number in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10, "one in five hundred stays by chance"
        assert (np.diff(a) == 1).sum() < 10, "neighbours part"


@pytest.mark.parametrize("size", [5, 12, 37])
def test_every_place_holds_everything_equally_often(size):
    times = 1500
    seen = np.zeros((size, size))
    for number in range(times):
        seen[np.arange(size), permuted(np.arange(size), size, 11, number)] += 1
    expected = times / size
    chi2, dof = ((seen - expected) ** 2 / expected).sum(), (size - 1) ** 2
    assert abs(chi2 - dof) < 5 * np.sqrt(2 * dof)


def test_the_order_is_not_smooth():
    """The correlation of place and value, and of neighbours' values, is that of a random order."""
    size = 20_000
    out = permuted(np.arange(size), size, 3, 0)
    assert abs(np.corrcoef(np.arange(size), out)[0, 1]) < 4 / np.sqrt(size)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 4 / np.sqrt(size)

import numpy as np
import pytest
import torch

from worldmodels.data.priorities import BLOCK, Priorities, SumTree
from worldmodels.types import UserError

WINDOWS = 5 * BLOCK + 10
LAG = 4


def rng(k):
    return np.random.Generator(np.random.Philox(key=3, counter=[0, k, 0, 0]))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 100])
def test_the_tree_adds_up_and_finds(n):
    values = np.random.default_rng(n).integers(0, 9, n).astype(np.float32)
    values[-1] += 1
    tree = SumTree(np.ones(n, np.float32))
    tree.set(np.arange(n), values)
    np.testing.assert_array_equal(tree._tree[1:], SumTree(values)._tree[1:])
    assert tree.total == values.sum()
    # the leaves lie in some order end to end: whole numbers of points, each leaf found as often as it weighs
    found = tree.find(np.arange(int(tree.total)) + 0.5)
    np.testing.assert_array_equal(np.bincount(found, minlength=n), values)
    assert (np.diff(found) != 0).sum() == (values > 0).sum() - 1
    some = np.unique(np.random.default_rng(0).integers(n, size=7))
    tree.set(some, values[some] * 2 + 1)
    values[some] = values[some] * 2 + 1
    np.testing.assert_array_equal(tree._tree[1:], SumTree(values)._tree[1:])


def test_rounding_does_not_lead_to_an_empty_leaf():
    tree = SumTree(np.array([2**24, 0, 1.5, 0], np.float32))
    assert tree.total == 2**24 + 2, "float32 has no 2**24 + 1.5"
    assert tree.find(np.array([0, 2**24 - 1, 2**24, 2**24 + 1.9])).tolist() == [0, 0, 2, 2]


def test_sums_do_not_drift():
    values = np.full(3000, 0.1, np.float32)
    tree, r = SumTree(values), np.random.default_rng(0)
    for _ in range(2000):
        index = np.unique(r.integers(3000, size=32))
        values[index] = r.random(len(index)) * 10.0 ** r.integers(-6, 3)
        tree.set(index, values[index])
    np.testing.assert_array_equal(tree._tree[1:], SumTree(values)._tree[1:])
    assert abs(tree.total / values.sum(dtype=np.float64) - 1) < 1e-5


@pytest.mark.parametrize("block", [1, 7, BLOCK])
def test_windows_are_drawn_by_priority_and_evenly_in_a_block(block):
    p = Priorities(WINDOWS, alpha=0.5, beta=1.0, lag=1, block=block)
    every = np.arange(WINDOWS)
    priority = np.array([1, 4, 16, 0.25, 1, 9.0])
    p.update(0, every, priority[every // block % 6])
    draws = np.concatenate([p.draw(k, rng(k), 500) for k in range(1, 201)])
    mass = np.sqrt(priority[every // block % 6])
    want = mass / mass.sum() * len(draws)
    chi2 = ((np.bincount(draws, minlength=WINDOWS) - want) ** 2 / want).sum()
    assert abs(chi2 - (WINDOWS - 1)) < 5 * np.sqrt(2 * WINDOWS)
    # with beta 1 the weights make up for it: a block's share is that of its windows
    some = p.draw(201, rng(201), 20_000)
    weights = p.importance(201, some).astype(np.float64)
    assert weights.max() == 1
    np.testing.assert_allclose(weights * mass[some], (weights * mass[some])[0], rtol=1e-5)
    assert abs((weights * (some // BLOCK == 2)).sum() / weights.sum() - BLOCK / WINDOWS) < 0.01


def test_importance_grows_to_the_whole_of_it():
    grows, one = (Priorities(WINDOWS, 1.0, beta, 0, beta_batches=n) for beta, n in ((0.4, 10), (1.0, None)))
    windows = np.array([0, 70, 200])
    for p in (grows, one):
        p.update(0, windows, np.array([1.0, 2, 4]))
        p.draw(0, rng(0), 1)
    for k, beta in ((0, 0.4), (5, 0.7), (10, 1.0), (99, 1.0)):
        np.testing.assert_allclose(grows.importance(k, windows), one.importance(k, windows) ** beta, rtol=1e-5)


def test_a_block_takes_the_mean_of_what_was_said_of_it():
    p = Priorities(WINDOWS, alpha=1.0, beta=0.0, lag=0)
    p.update(0, np.array([0, 1, 1, 70]), np.array([2.0, 3, 4, 5]))
    p.draw(0, rng(0), 1)
    np.testing.assert_allclose(p._tree.leaves, np.array([3, 5, 1, 1, 1, 1]) * np.array([BLOCK] * 5 + [10]))
    assert p.importance(0, np.array([0, 70, 200])).tolist() == [1, 1, 1]


def train(p, first, last, fetched, log):
    """As a trainer does with what reads ahead: batch k + LAG - 1 is drawn before batch k is updated."""
    for k in range(first, last):
        for ahead in range(max(fetched, first), k + LAG):
            log[ahead] = p.draw(ahead, rng(ahead), 32)
        fetched = k + LAG
        p.update(k, log[k], 0.1 + (log[k] * (k + 1)) % 7)
    return fetched


def test_resuming_draws_the_same_batches():
    straight, log = {}, {}
    train(Priorities(WINDOWS, 1.0, 0.5, LAG), 0, 40, 0, straight)
    assert len({tuple(b) for b in straight.values()}) == len(straight)
    first = Priorities(WINDOWS, 1.0, 0.5, LAG)
    train(first, 0, 17, 0, log)
    state = first.state_dict(17)
    assert all(isinstance(x, int | torch.Tensor) for update in state["waiting"] for x in update)
    second = Priorities(WINDOWS, 1.0, 0.5, LAG)
    second.load_state_dict(state)
    resumed = {}
    train(second, 17, 40, 17, resumed)
    for k in resumed:
        np.testing.assert_array_equal(resumed[k], straight[k], err_msg=str(k))
    # that asking for the state took back what was applied does not show either, nor drawing some batches again
    train(first, 17, 25, 17, log)
    first.rewind(25)
    train(first, 25, 40, 25, log)
    for k in straight:
        np.testing.assert_array_equal(log[k], straight[k], err_msg=str(k))


def test_an_update_counts_from_its_lag_on():
    """Whether it comes in time or long before makes no difference."""
    early, late = Priorities(WINDOWS, 1.0, 0.0, LAG), Priorities(WINDOWS, 1.0, 0.0, LAG)
    early.update(0, np.array([5]), np.array([1000.0]))
    for k in range(LAG + 2):
        if k == LAG:
            late.update(0, np.array([5]), np.array([1000.0]))
        a, b = early.draw(k, rng(k), 32), late.draw(k, rng(k), 32)
        np.testing.assert_array_equal(a, b)
        assert ((a < BLOCK).mean() > 0.9) == (k >= LAG)


def test_little_is_kept_of_what_is_past():
    p = Priorities(WINDOWS, 1.0, 0.5, LAG)
    train(p, 0, 300, 0, {})
    assert len(p._applied) + len(p._waiting) <= 2 * LAG


@pytest.mark.parametrize("priority", [0, -1, np.nan, np.inf])
def test_bad_priorities(priority):
    with pytest.raises(UserError, match="batch 7 was given a priority of .*; priorities are finite and above 0"):
        Priorities(WINDOWS, 1.0, 0.5, LAG).update(7, np.array([1, 2]), np.array([1.0, priority]))


def test_bad_settings_and_states():
    with pytest.raises(UserError, match="data.priority.block=0 must be"):
        Priorities(WINDOWS, 1.0, 0.5, LAG, block=0)
    for batches, beta in ((0, 0.4), (10, 1.5)):
        with pytest.raises(UserError, match=f"beta_batches={batches} must be .* a beta of at most 1"):
            Priorities(WINDOWS, 0.6, beta, 0, beta_batches=batches)
    with pytest.raises(UserError, match="data.priority.alpha=-1"):
        Priorities(WINDOWS, -1, 0.5, LAG)
    state = Priorities(WINDOWS, 1.0, 0.5, LAG).state_dict(0)
    with pytest.raises(UserError, match="has priorities of 6 blocks of windows and the data has 7; resume on"):
        Priorities(WINDOWS + BLOCK, 1.0, 0.5, LAG).load_state_dict(state)

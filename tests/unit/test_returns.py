"""Returns against the values that DIAMOND's code gives, and against their definitions written out."""

import itertools

import pytest
import torch
from torch import Tensor

from worldmodels.ops.returns import lambda_returns, n_step

REWARD, VALUE = torch.tensor([[1.0, 0.0, 5.0]]).sign(), torch.tensor([[0.5, 0.4, 0.3]])
AT_1, NEVER = torch.tensor([[False, True, False]]), torch.zeros(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        (NEVER, NEVER, [2.1774, 1.2320, 1.2955]),
        (AT_1, NEVER, [1.0246, 0.0, 1.2955]),
        (NEVER, AT_1, [1.3933, 0.3940, 1.2955]),
    ],
)
def test_lambda_returns_are_those_of_diamonds_code(terminated: Tensor, truncated: Tensor, expected: list[float]):
    found = lambda_returns(REWARD, VALUE, terminated, truncated, gamma=0.985, lam=0.95)
    assert found[0].tolist() == pytest.approx(expected, abs=6e-5)


def play(seed: int, batch: int = 6, length: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, batch, length, generator=g)
    terminated, stop = (torch.rand(2, batch, length, generator=g) < 0.2).unbind()
    return reward, value, terminated, stop


def looked_ahead(reward: list, value: list, terminated: list, stop: list, t: int, n: int, gamma: float) -> float:
    """The n-step return of row t, by its definition."""
    total = 0.0
    for k in itertools.count():
        total += gamma**k * reward[t + k]
        if terminated[t + k]:
            return total
        if k + 1 == n or stop[t + k] or t + k + 1 == len(reward):
            return total + gamma ** (k + 1) * value[t + k]


@pytest.mark.parametrize("n", [1, 3, 20])
def test_n_step_returns_are_those_of_the_definition(n: int) -> None:
    reward, value, terminated, stop = play(n)
    ahead = n_step(reward, terminated, stop, 0.9, n)
    found = ahead.reward + ahead.discount * value.gather(1, ahead.steps + torch.arange(9) - 1)
    for b, t in itertools.product(range(6), range(9)):
        rows = [x[b].tolist() for x in (reward, value, terminated, stop)]
        assert found[b, t].item() == pytest.approx(looked_ahead(*rows, t, n, 0.9), abs=1e-5)


@pytest.mark.parametrize(("lam", "n"), [(0.0, 1), (1.0, 9)])
def test_lambda_of_0_and_1_are_one_step_and_the_whole_window(lam: float, n: int) -> None:
    reward, value, terminated, stop = play(5)
    ahead = n_step(reward, terminated, stop, 0.9, n)
    expected = ahead.reward + ahead.discount * value.gather(1, ahead.steps + torch.arange(9) - 1)
    torch.testing.assert_close(lambda_returns(reward, value, terminated, stop, 0.9, lam), expected)


def test_lambda_return_is_the_mixture_of_n_step_returns() -> None:
    """Sum over n of (1 - lambda) lambda^(n-1) G^(n), the rest of the weight on the last, where nothing ends."""
    reward, value, _, _ = play(7)
    never = torch.zeros_like(reward, dtype=torch.bool)
    lam, expected = 0.8, 0.0
    for n in range(1, 10):
        ahead = n_step(reward, never, never, 0.9, n)
        g = ahead.reward + ahead.discount * value.gather(1, ahead.steps + torch.arange(9) - 1)
        expected = expected + g[:, 0] * ((1 - lam) * lam ** (n - 1) if n < 9 else lam ** (n - 1))
    torch.testing.assert_close(lambda_returns(reward, value, never, never, 0.9, lam)[:, 0], expected)

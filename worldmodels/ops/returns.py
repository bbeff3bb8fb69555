"""What is to come: lambda-returns and n-step returns over windows of play.

Legend: B rows, T transitions; row t is (reward after action t, flags after action t, value of the frame after it).
A window that stops, at its own end or where `stop` is true, bootstraps from the value of the frame that follows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def lambda_returns(
    reward: Tensor, next_value: Tensor, terminated: Tensor, stop: Tensor, gamma: float, lam: float
) -> Tensor:
    """Lambda-returns (B, T), backwards in time: of Alonso et al. 2024 (DIAMOND), after Sutton 1988.

        G_t = r_t + gamma (1 - end_t) [ (1 - lambda) V_{t+1} + lambda G_{t+1} ],

    with V_{t+1} in place of the bracket where the window stops.

    Args:
        reward: (B, T) float.
        next_value: (B, T) float, the value of the frame after each action.
        terminated: (B, T) bool, nothing comes after the action.
        stop: (B, T) bool, what comes after the action is not in the window (truncation, another episode).
        gamma: discount.
        lam: lambda in [0, 1]; 0 looks one step ahead, 1 to the end of the window.
    """
    discount = gamma * (~terminated).float()
    following, returns = next_value[:, -1], []
    for t in reversed(range(reward.shape[1])):
        mixed = torch.where(stop[:, t], next_value[:, t], torch.lerp(next_value[:, t], following, lam))
        following = reward[:, t] + discount[:, t] * mixed
        returns.append(following)
    return torch.stack(returns[::-1], dim=1)


class Ahead(NamedTuple):
    """The return of row t is `reward` + `discount` * (value of the frame `steps` after that of row t).

    Args:
        reward: (B, T) float, discounted sum.
        discount: (B, T) float, gamma to the power of `steps`, or 0 after a termination.
        steps: (B, T) int64, n or fewer.
    """

    reward: Tensor
    discount: Tensor
    steps: Tensor


def n_step(reward: Tensor, terminated: Tensor, stop: Tensor, gamma: float, n: int) -> Ahead:
    """Look `n` steps ahead from every row, or as many as there are before the play or the window ends.

    Args:
        reward: (B, T) float.
        terminated: (B, T) bool, nothing comes after the action.
        stop: (B, T) bool, what comes after the action is not in the window.
        gamma: discount.
        n: steps, at least 1.
    """
    length = reward.shape[1]
    total, steps = torch.zeros_like(reward), torch.zeros_like(reward, dtype=torch.long)
    alive, ended = torch.ones_like(terminated), torch.zeros_like(terminated)
    for k in range(min(n, length)):
        inside = torch.zeros_like(alive)
        inside[:, : length - k] = alive[:, : length - k]
        total = total + gamma**k * torch.where(inside, reward.roll(-k, 1), 0.0)
        steps = steps + inside
        ended = ended | (inside & terminated.roll(-k, 1))
        alive = inside & ~(terminated | stop).roll(-k, 1)
    return Ahead(total, gamma**steps * (~ended).float(), steps)

"""Gumbel MuZero: "Policy improvement by planning with Gumbel", Danihelka et al., ICLR 2022 (openreview bERaNdoegnO)."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from worldmodels.planning.torch_tree import completed_q, halving_score, scaled
from worldmodels.planning.tree import (
    Halving,
    Plot,
    Root,
    SearchResult,
    best_of,
    check,
    check_finite,
    check_noise,
    grow,
    legal_logits,
    sparing,
)
from worldmodels.types import Recurrent, UserError

MAX_CONSIDERED = 16
"""Actions that sequential halving begins with, where nothing else is said (Danihelka et al. 2022)."""


@sparing
def gumbel_search(
    recurrent: Recurrent,
    root: Root,
    num_simulations: int,
    *,
    max_considered: int | None = None,
    invalid: Tensor | None = None,
    invalid_inside: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    ties: Tensor | None = None,
    visit_offset: float = 50.0,
    value_scale: float = 0.1,
    rescale: bool = True,
    max_depth: int | None = None,
    backend: str = "auto",
) -> SearchResult:
    """Search from B roots at once and return an action and an improved policy for each.

    Without noise and generator it is deterministic, as for evaluation.

    Args:
        recurrent: the model; a discount of 0 ends the episode, prior_logits of -inf forbid an action.
        root: logits, value and state of the roots.
        num_simulations: nodes to add to each tree.
        max_considered: actions that sequential halving begins with, by default 16; fewer where fewer are legal.
        invalid: (B, A) bool, true for actions that are illegal at the root.
        invalid_inside: (B, A) bool, true for actions that are illegal at every node below.
        noise: (B, A) standard Gumbel draws.
        generator: makes them where `noise` is None.
        ties: (B, A) draws that decide between equally good actions; None: the first of them is taken.
        visit_offset: c_visit of sigma(q) = (c_visit + max N) c_scale q.
        value_scale: c_scale.
        rescale: move the completed Q of a node to [0, 1] before it is scaled.
        max_depth: edges from the root to the deepest node; None for no limit.
        backend: "numba" (CPU), "torch", or "auto": numba for roots on the CPU.

    Raises:
        UserError: a setting is out of range, shapes do not agree, a node has no legal action, or the model returns NaN.
    """
    check(root, num_simulations, max_depth, ties, invalid=invalid, invalid_inside=invalid_inside)
    max_considered = MAX_CONSIDERED if max_considered is None else max_considered
    if type(max_considered) is not int or max_considered < 1:
        raise UserError(f"max_considered={max_considered} must be a whole number of at least 1")
    check_finite(visit_offset=visit_offset, value_scale=value_scale)
    logits = legal_logits(root.prior_logits, invalid)
    if noise is None and generator is not None:
        noise = gumbel_noise(logits, generator)
    bonus = logits - logits.amax(-1, keepdim=True)
    if noise is not None:
        check_noise(noise, logits)
        bonus = noise.to(logits.dtype) + bonus
    table = considered_visits(max_considered, num_simulations)
    considered = table.to(logits.device)[(~logits.isneginf()).sum(-1).clamp(max=max_considered)]
    rule = Halving(bonus, considered, visit_offset, value_scale, rescale)
    value = root.value.detach().to(logits.dtype)
    plot = Plot(logits, value, invalid_inside, rule, num_simulations, max_depth or num_simulations, ties)
    tree, visits, q = grow(recurrent, root.state, plot, backend)
    q = completed_q(logits, q, visits, value)
    sigma = scaled(q, visits, rule)
    action = best_of(halving_score(bonus, sigma, visits, visits.amax(-1, keepdim=True)), ties)
    return SearchResult(action, torch.softmax(logits + sigma, -1), tree.value[:, 0].to(value.dtype), visits, q, tree)


def gumbel_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel draws of the shape, dtype and device of `like`."""
    tiny = torch.finfo(like.dtype).tiny
    uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return -(-uniform.clamp(min=tiny).log()).log()


@lru_cache
def considered_visits(max_considered: int, num_simulations: int) -> Tensor:
    """(max_considered + 1, n) int64: with m considered actions (row m), the visits that are asked for in a simulation.

    Sequential halving (Karnin et al. 2013): the budget is shared by ceil(log2 m) phases, each of which visits those
    still considered equally often, and drops half of them, but never the last two.
    """
    table = [list(range(num_simulations))] * min(2, max_considered + 1)
    for considered in range(2, max_considered + 1):
        phases, left, row = math.ceil(math.log2(considered)), considered, []
        visits = 0
        while len(row) < num_simulations:
            for _ in range(max(1, int(num_simulations / (phases * left)))):
                row += [visits] * left
                visits += 1
            left = max(2, left // 2)
        table.append(row[:num_simulations])
    return torch.tensor(table)

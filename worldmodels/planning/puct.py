"""MuZero's own search: pUCT with Dirichlet noise at the root (Schrittwieser et al. 2020, appendix B)."""

import torch
from torch import Tensor

from worldmodels.planning.tree import (
    Plot,
    Puct,
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


@sparing
def puct_search(
    recurrent: Recurrent,
    root: Root,
    num_simulations: int,
    *,
    invalid: Tensor | None = None,
    invalid_inside: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    ties: Tensor | None = None,
    dirichlet_alpha: float = 0.3,
    dirichlet_fraction: float = 0.25,
    temperature: float = 1.0,
    pb_c_init: float = 1.25,
    pb_c_base: float = 19652,
    max_depth: int | None = None,
    backend: str = "auto",
) -> SearchResult:
    """Search from B roots at once and return an action and the share of visits for each.

    Without noise and generator it is deterministic, as for evaluation: the action is the most visited one.

    Args:
        recurrent: the model; a discount of 0 ends the episode, prior_logits of -inf forbid an action.
        root: logits, value and state of the roots.
        num_simulations: nodes to add to each tree.
        invalid: (B, A) bool, true for actions that are illegal at the root.
        invalid_inside: (B, A) bool, true for actions that are illegal at every node below.
        noise: (B, A) Dirichlet draws; those of illegal actions are dropped.
        generator: makes them where `noise` is None, and draws the action by N^(1 / temperature).
        ties: (B, A) draws that decide between equally good actions; None: the first of them is taken.
        dirichlet_alpha: concentration of the noise.
        dirichlet_fraction: share of the noise in the root's prior, 0 to 1.
        temperature: 0 acts by the most visits even with a generator.
        pb_c_init: c1 of pUCT.
        pb_c_base: c2 of pUCT.
        max_depth: edges from the root to the deepest node; None for no limit.
        backend: "numba" (CPU), "torch", or "auto": numba for roots on the CPU.

    Raises:
        UserError: a setting is out of range, shapes do not agree, a node has no legal action, or the model returns NaN.
    """
    check(root, num_simulations, max_depth, ties, invalid=invalid, invalid_inside=invalid_inside)
    check_finite(dirichlet_alpha=dirichlet_alpha, temperature=temperature, pb_c_init=pb_c_init, pb_c_base=pb_c_base)
    if not 0 <= dirichlet_fraction <= 1:
        raise UserError(f"dirichlet_fraction={dirichlet_fraction} must lie between 0 and 1")
    for name, number in (("dirichlet_alpha", dirichlet_alpha), ("pb_c_base", pb_c_base)):
        if not number > 0:
            raise UserError(f"{name}={number} must be above 0")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature} must be 0 or more")
    logits = legal_logits(root.prior_logits, invalid)
    legal = ~logits.isneginf()
    if noise is None and generator is not None:
        noise = dirichlet_noise(legal.to(logits.dtype) * dirichlet_alpha, generator)
    if noise is not None:
        check_noise(noise, logits)
        # of all actions, as mctx has it: what an illegal action takes is shared out again by the softmax of the tree
        prior = torch.softmax(root.prior_logits.detach().to(logits.dtype), -1)
        mixed = (1 - dirichlet_fraction) * prior + dirichlet_fraction * noise.to(logits.dtype)
        logits = mixed.clamp(min=torch.finfo(logits.dtype).tiny).log().masked_fill(~legal, -torch.inf)
    value = root.value.detach().to(logits.dtype)
    rule = Puct(pb_c_init, pb_c_base)
    plot = Plot(logits, value, invalid_inside, rule, num_simulations, max_depth or num_simulations, ties)
    tree, visits, q = grow(recurrent, root.state, plot, backend)
    value = tree.value[:, 0].to(value.dtype)
    weights = visits.to(value.dtype) / visits.sum(-1, keepdim=True)
    if generator is None or temperature == 0:
        action = best_of(visits.to(value.dtype), ties)
    else:
        acting = torch.softmax(weights.log() / temperature, -1)
        action = torch.multinomial(acting, 1, generator=generator)[:, 0]
    return SearchResult(action, weights, value, visits, torch.where(visits > 0, q, value[:, None]), tree)


def dirichlet_noise(alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Draws of the Dirichlet distribution with concentrations `alpha` (B, A); an alpha of 0 gets nothing."""
    draws = torch._standard_gamma(alpha, generator=generator)
    return draws / draws.sum(-1, keepdim=True).clamp(min=torch.finfo(draws.dtype).tiny)

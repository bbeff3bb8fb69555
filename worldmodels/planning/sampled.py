"""Sampled MuZero, for action sets that are too large to search: Hubert et al. 2021, arXiv 2104.06303."""

import math

import torch
from torch import Tensor

from worldmodels.planning.puct import puct_search
from worldmodels.planning.tree import Root, SearchResult, check, legal_logits, sparing
from worldmodels.types import Recurrent, RecurrentOutput, State, UserError


@sparing
def sampled_search(
    recurrent: Recurrent,
    root: Root,
    num_simulations: int,
    *,
    samples: int = 20,
    sample_temperature: float = 1.0,
    draws: Tensor | None = None,
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
    """MuZero's pUCT over few actions a node, drawn from beta = pi^(1/tau) with replacement.

    The prior of a drawn action is (share of the draws) / beta * pi, made to sum to 1. Without draws and generator each
    node has its `samples` most likely actions, with the prior pi. `action_weights` is 0 for what was not drawn at the
    root, so that the cross-entropy is over the drawn actions.

    Args:
        recurrent: as in `puct_search`, as are all arguments that are not named here.
        root: as in `puct_search`.
        num_simulations: nodes to add to each tree.
        samples: K, draws a node.
        sample_temperature: tau.
        draws: (B, N, K) uniform in [0, 1), row 0 for the root and row s + 1 for the node of simulation s.
        invalid: (B, A) bool, illegal at the root.
        invalid_inside: (B, A) bool, illegal at every node below.
        noise: (B, A) Dirichlet draws, of which those of drawn actions count.
        generator: makes `draws` and `noise` where they are None, and draws the action.
        ties: (B, A) draws that decide between equally good actions; None: the first of them is taken.
        dirichlet_alpha: concentration of the noise.
        dirichlet_fraction: share of the noise in the root's prior.
        temperature: of acting.
        pb_c_init: c1 of pUCT.
        pb_c_base: c2 of pUCT.
        max_depth: edges from the root to the deepest node.
        backend: "numba", "torch" or "auto".

    Raises:
        UserError: as `puct_search`, or `samples`, `sample_temperature` or `draws` are out of range.
    """
    check(root, num_simulations, max_depth, ties, invalid=invalid, invalid_inside=invalid_inside)
    if type(samples) is not int or samples < 1:
        raise UserError(f"samples={samples} must be a whole number of at least 1")
    if not 0 < sample_temperature < math.inf:
        raise UserError(f"sample_temperature={sample_temperature} must be above 0 and finite")
    logits = legal_logits(root.prior_logits, invalid)
    shape = (len(logits), num_simulations + 1, samples)
    if draws is None and generator is not None:
        draws = torch.rand(shape, generator=generator, dtype=logits.dtype, device=logits.device)
    if draws is not None and draws.shape != shape:
        raise UserError(f"draws has shape {tuple(draws.shape)}; give (B, num_simulations + 1, samples): {shape}")
    calls = iter(range(num_simulations + 1))

    def few(logits: Tensor) -> Tensor:
        node = next(calls)
        return sampled_logits(logits, samples, sample_temperature, None if draws is None else draws[:, node])

    def step(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        output, state = recurrent(state, action)
        inside = output.prior_logits
        if invalid_inside is not None:
            inside = inside.masked_fill(invalid_inside, -torch.inf)
        return output._replace(prior_logits=few(inside)), state

    root = root._replace(prior_logits=few(logits))
    return puct_search(
        step,
        root,
        num_simulations,
        noise=noise,
        generator=generator,
        ties=ties,
        dirichlet_alpha=dirichlet_alpha,
        dirichlet_fraction=dirichlet_fraction,
        temperature=temperature,
        pb_c_init=pb_c_init,
        pb_c_base=pb_c_base,
        max_depth=max_depth,
        backend=backend,
    )


def sampled_logits(logits: Tensor, samples: int, tau: float, uniform: Tensor | None) -> Tensor:
    """(B, A) log of (share of the draws) / beta * pi, and -inf for actions that were not drawn.

    Args:
        logits: (B, A), -inf for illegal actions.
        samples: K.
        tau: beta = pi^(1 / tau).
        uniform: (B, K) in [0, 1), or None for the K most likely actions.
    """
    if uniform is None:
        kept = torch.zeros_like(logits, dtype=torch.bool)
        kept.scatter_(-1, logits.topk(min(samples, logits.shape[-1])).indices, True)
        return logits.masked_fill(~kept, -torch.inf)
    sharp = torch.log_softmax(logits / tau, -1)  # NaN where no action is legal, which the search tells
    edges = sharp.exp().cumsum(-1)
    # scaled, so that rounding leaves no draw above the last edge; an illegal action has no width and is not found
    drawn = torch.searchsorted(edges, uniform.to(edges.dtype) * edges[:, -1:], right=True)
    drawn = drawn.clamp(max=logits.shape[-1] - 1)
    count = torch.zeros_like(logits).scatter_add_(-1, drawn, torch.ones_like(uniform, dtype=logits.dtype))
    weighed = (count / samples).log() - sharp + torch.log_softmax(logits, -1)
    return torch.where((count > 0) & ~logits.isneginf(), weighed, -torch.inf)

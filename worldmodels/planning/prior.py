"""No search at all: the model's own policy, behind the same interface."""

import torch
from torch import Tensor

from worldmodels.planning.gumbel import gumbel_noise
from worldmodels.planning.tree import Root, SearchResult, Tree, best_of, check, check_noise, legal_logits
from worldmodels.types import Recurrent, UserError


@torch.no_grad()
def prior_search(
    recurrent: Recurrent,
    root: Root,
    *,
    temperature: float = 1.0,
    invalid: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    ties: Tensor | None = None,
) -> SearchResult:
    """Draw from the policy, or take the likeliest action where there is no noise.

    Args:
        recurrent: the model, which is not asked.
        root: logits, value and state of the roots.
        temperature: of the policy; 0 takes the likeliest action.
        invalid: (B, A) bool, true for actions that are illegal.
        noise: (B, A) standard Gumbel draws.
        generator: makes them where `noise` is None.
        ties: (B, A) draws that decide between equally good actions; None: the first of them is taken.

    Raises:
        UserError: shapes do not agree, a root has no legal action, or holds NaN, or the temperature is below 0.
    """
    if not temperature >= 0:
        raise UserError(f"temperature={temperature} must be 0 or more")
    check(root, 1, None, ties, invalid=invalid)
    logits = legal_logits(root.prior_logits, invalid)
    if noise is None and generator is not None:
        noise = gumbel_noise(logits, generator)
    if noise is not None:
        check_noise(noise, logits)
    chosen = logits if noise is None or temperature == 0 else logits + temperature * noise
    visits, value = torch.zeros_like(logits, dtype=torch.int64), root.value[:, None]
    alone = torch.full_like(value, -1, dtype=torch.int64)
    tree = Tree(alone, alone, torch.ones_like(alone), value, value, torch.zeros_like(value), torch.ones_like(value))
    return SearchResult(best_of(chosen, ties), logits.softmax(-1), root.value, visits, value.expand_as(logits), tree)

"""One step of lookahead in place of a search: the regularised policy improvement of Liu et al. 2023 (ROSMO)."""

import torch
from torch import Tensor

from worldmodels.planning.gumbel import gumbel_noise
from worldmodels.planning.tree import (
    OUTPUTS,
    Root,
    SearchResult,
    Tree,
    bad_number,
    best_of,
    check,
    check_finite,
    check_noise,
    legal_logits,
    wrong,
)
from worldmodels.types import Recurrent, UserError


@torch.no_grad()
def one_step_search(
    recurrent: Recurrent,
    root: Root,
    *,
    clip: float = 1.0,
    temperature: float = 1.0,
    invalid: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    ties: Tensor | None = None,
) -> SearchResult:
    """Try every action once; the policy is the prior times exp(advantage), the advantage being clipped.

    Args:
        recurrent: the model.
        root: logits, value and state of the roots.
        clip: greatest advantage that counts, after division by the temperature.
        temperature: of the advantage r + discount * V' - V.
        invalid: (B, A) bool, true for actions that are illegal.
        noise: (B, A) standard Gumbel draws, by which the action is drawn from the policy; None: the likeliest is taken.
        generator: makes them where `noise` is None.
        ties: (B, A) draws that decide between equally good actions; None: the first of them is taken.

    Raises:
        UserError: a setting is out of range, shapes do not agree, a root has no legal action, or the model returns NaN.
    """
    check(root, 1, None, ties, invalid=invalid)
    check_finite(clip=clip, temperature=temperature)
    if clip <= 0 or temperature <= 0:
        raise UserError(f"clip={clip} and temperature={temperature} of a one-step search must be above 0")
    logits = legal_logits(root.prior_logits, invalid)
    batch, actions = logits.shape
    action = torch.arange(actions, device=logits.device)
    state = {k: v.repeat_interleave(actions, 0) for k, v in root.state.items()}
    output, _ = recurrent(state, action.repeat(batch))
    for name, tensor in zip(OUTPUTS, output, strict=True):
        if name != "prior_logits" and (bad := wrong(name, tensor)).any():
            raise UserError(bad_number(name, int(bad.nonzero()[0, 0]) // actions, 0))
    reward, discount, value = (x.view(batch, actions) for x in (output.reward, output.discount, output.value))
    q = reward + discount * value
    better = ((q - root.value[:, None]) / temperature).clamp(-clip, clip)
    improved = logits.log_softmax(-1) + better
    if noise is None and generator is not None:
        noise = gumbel_noise(logits, generator)
    if noise is not None:
        check_noise(noise, logits)
    chosen = best_of(improved if noise is None else improved + noise, ties)
    weights = improved.softmax(-1)
    first = root.value[:, None]
    tree = Tree(
        parent=torch.tensor([-1] + [0] * actions, device=logits.device).expand(batch, -1),
        action=torch.cat([action.new_full((1,), -1), action]).expand(batch, -1),
        visits=torch.tensor([actions + 1] + [1] * actions, device=logits.device).expand(batch, -1),
        value=torch.cat([first, value], 1),
        raw_value=torch.cat([first, value], 1),
        reward=torch.cat([torch.zeros_like(first), reward], 1),
        discount=torch.cat([torch.ones_like(first), discount], 1),
    )
    return SearchResult(chosen, weights, root.value, torch.ones_like(q, dtype=torch.int64), q, tree)

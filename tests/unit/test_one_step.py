"""One step of lookahead and no search at all, for a model that is known."""

import pytest
import torch
from torch import Tensor

from worldmodels.planning.one_step import one_step_search
from worldmodels.planning.prior import prior_search
from worldmodels.planning.tree import Root
from worldmodels.types import RecurrentOutput, State, UserError

REWARD = torch.tensor([[1.0, 0.0, 5.0], [0.0, -0.5, 0.25]])


def root() -> Root:
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.5, 0.5]])
    return Root(logits, torch.tensor([0.5, 0.0]), {"row": torch.arange(2)})


def known(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
    """Rewards by row and action, and then a value of 1 that counts half."""
    reward = REWARD[state["row"], action]
    half = torch.full_like(reward, 0.5)
    return RecurrentOutput(reward, half, torch.zeros(len(action), 3), 2 * half), state


def test_the_policy_is_the_prior_times_the_exponential_of_the_clipped_advantage() -> None:
    start = root()
    found = one_step_search(known, start, clip=1.0, temperature=0.5)
    q = REWARD + 0.5
    torch.testing.assert_close(found.q, q)
    better = ((q - start.value[:, None]) / 0.5).clamp(-1, 1)
    want = start.prior_logits.softmax(-1) * better.exp()
    torch.testing.assert_close(found.action_weights, want / want.sum(-1, keepdim=True))
    assert torch.equal(found.value, start.value)
    assert found.action.tolist() == found.action_weights.argmax(-1).tolist()
    invalid = torch.tensor([[False, True, False], [False, False, True]])
    assert (one_step_search(known, start, invalid=invalid).action_weights[invalid] == 0).all()


def test_actions_are_drawn_from_the_policy() -> None:
    many = Root(torch.tensor([[0.0, 1.0, -1.0]]).expand(4000, -1), torch.zeros(4000), {"row": torch.zeros(4000).long()})
    for search in (prior_search, one_step_search):
        found = search(known, many, generator=torch.Generator().manual_seed(0))
        share = found.action.bincount(minlength=3) / 4000
        torch.testing.assert_close(share, found.action_weights[0], atol=0.03, rtol=0)
    greedy = prior_search(known, many, temperature=0, generator=torch.Generator().manual_seed(0))
    assert (greedy.action == 1).all(), "the likeliest, whatever would be drawn"


@pytest.mark.parametrize("name", ["reward", "discount", "value"])
def test_a_model_that_gives_no_number_is_told(name: str) -> None:
    def broken(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        output, state = known(state, action)
        numbers = getattr(output, name).clone()
        numbers[4] = torch.nan
        return output._replace(**{name: numbers}), state

    with pytest.raises(UserError, match=f"{name} is no finite number in row 1"):
        one_step_search(broken, root())

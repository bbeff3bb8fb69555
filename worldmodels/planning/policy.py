"""A search that acts: a policy made of callables, so that it knows no model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from worldmodels.planning.tree import Root, SearchResult
from worldmodels.types import Recurrent, State


@dataclass
class SearchPolicy:
    """Acts by a new search at every step; a `types.Policy`.

    Args:
        begin: the state of n fresh rows, batch first; where it has a `taken` (B,) int64, the action of the search is
            put there before the next observation is seen.
        see: observation (B, C, H, W) uint8 and that state to the root and the state after this observation.
        recurrent: the model's step.
        search: `gumbel_search` or another of this package with its settings bound, the number of simulations among
            them; called as search(recurrent, root, generator=..., ties=...).
        actions: (A,) ALE's index of each action of the search.
        noise: explore with the generator that `act` is given; false acts as well as the search can, and draws from
            the generator among what is equally good alone.
        temperature: of the action that a search with noise draws, 0 for the best one, for searches that take it; None
            leaves it to the search. Without noise none draws: a search takes the action that it thinks best.
        acting: opens the block in which weights do not change, and what depends on them alone may be kept.
    """

    begin: Callable[[int], State]
    see: Callable[[Tensor, State], tuple[Root, State]]
    recurrent: Recurrent
    search: Callable[..., SearchResult]
    actions: Sequence[int]
    noise: bool = False
    temperature: float | None = None
    acting: Callable[[], AbstractContextManager[None]] = nullcontext

    def start(self, n: int) -> State:
        """The state of `n` fresh rows."""
        return self.begin(n)

    @torch.no_grad()
    def act(self, observation: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Tensor, State]:
        """Actions (B,) int64 in the 18-action set for observations (B, C, H, W) uint8.

        Without a generator it is the first of what is equally good.
        """
        settings = {} if self.temperature is None else {"temperature": self.temperature}
        with self.acting():
            root, state = self.see(observation, state)
            ties = None if generator is None else _draws(root.prior_logits, generator)
            noise = generator if self.noise else None
            result = self.search(self.recurrent, root, generator=noise, ties=ties, **settings)
        if "taken" in state:
            state = state | {"taken": result.action}
        return torch.tensor(self.actions, device=result.action.device)[result.action], state


def _draws(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform draws of the shape of `like`; they take one number of the generator, so that a row is as it is alone."""
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device).item()
    return torch.rand(like.shape, generator=torch.Generator(like.device).manual_seed(int(seed)), device=like.device)

"""A search that acts: a policy made of callables, so that it knows no model."""

from collections.abc import Callable, Sequence
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
            them; called as search(recurrent, root, generator=...).
        actions: (A,) ALE's index of each action of the search.
        noise: explore with the generator that `act` is given; false acts as well as the search can.
        temperature: of the action that a search with noise draws, 0 for the best one, for searches that take it; None
            leaves it to the search. Without noise none draws: a search takes the action that it thinks best.
    """

    begin: Callable[[int], State]
    see: Callable[[Tensor, State], tuple[Root, State]]
    recurrent: Recurrent
    search: Callable[..., SearchResult]
    actions: Sequence[int]
    noise: bool = False
    temperature: float | None = None

    def start(self, n: int) -> State:
        """The state of `n` fresh rows."""
        return self.begin(n)

    @torch.no_grad()
    def act(self, observation: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Tensor, State]:
        """Actions (B,) int64 in the 18-action set for observations (B, C, H, W) uint8."""
        root, state = self.see(observation, state)
        settings = {} if self.temperature is None else {"temperature": self.temperature}
        result = self.search(self.recurrent, root, generator=generator if self.noise else None, **settings)
        if "taken" in state:
            state = state | {"taken": result.action}
        return torch.tensor(self.actions, device=result.action.device)[result.action], state

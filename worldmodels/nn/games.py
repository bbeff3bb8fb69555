"""Several games in one model: which of them a row is of, by name, and what may be done in it.

Legend: B rows, G games, A = 18 actions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from worldmodels.types import ACTIONS, Segment, UserError, game_key

NOBODY = -1
"""In place of a `game_key`, where it is not said which game it is."""


class Games(nn.Module):
    """A vocabulary of games: row 1, 2, ... of an embedding for each by the order of their names, row 0 for any other.

    It holds no weights and nothing of the state: a checkpoint has the vocabulary among the settings of its model.

    Args:
        actions: indices into the 18-action set that each game has, by its name.
        unknown: share of the training windows whose game is withheld, so that row 0 learns what games have in common:
            a new game begins with it.

    Raises:
        UserError: there is no game, one without actions or with others than those of the set, or a share out of range.
    """

    def __init__(self, actions: Mapping[str, Sequence[int]] | None = None, unknown: float = 0.1) -> None:
        super().__init__()
        if not actions or not isinstance(actions, Mapping) or not all(isinstance(name, str) for name in actions):
            raise UserError(
                "model.games names no game; leave out its actions, and `worldmodels train` takes them from the stores"
            )
        if not isinstance(unknown, int | float) or not 0 <= unknown < 1:
            raise UserError(f"model.games.unknown={unknown} must be a share from 0 to below 1")
        self.names, self.unknown = sorted(actions), unknown
        legal = torch.zeros(1 + len(self.names), len(ACTIONS), dtype=torch.bool)
        legal[0] = True
        for row, name in enumerate(self.names, 1):
            mine = actions[name]
            if not isinstance(mine, Sequence) or not mine or not all(a in range(len(ACTIONS)) for a in mine):
                raise UserError(
                    f"the actions of {name} are {mine} and must be indices 0 to {len(ACTIONS) - 1}, one at least"
                )
            legal[row, [int(action) for action in mine]] = True
        self.register_buffer("legal", legal, persistent=False)
        self.register_buffer("keys", torch.tensor([game_key(name) for name in self.names]), persistent=False)

    def __len__(self) -> int:
        return 1 + len(self.names)

    def row(self, name: str) -> int:
        """Of a game by its name; 0 if it is not in the vocabulary."""
        return self.names.index(name) + 1 if name in self.names else 0

    def rows(self, segment: Segment) -> Tensor:
        """(B,) int64: by the game that a segment says that its windows are of, 0 where it does not say."""
        if (key := segment.side.get("game")) is None:
            return torch.zeros(segment.batch_size, dtype=torch.long, device=segment.obs.device)
        same = key[:, None] == self.keys
        return torch.where(same.any(1), same.int().argmax(1) + 1, 0)

    def withheld(self, segment: Segment, generator: torch.Generator | None = None) -> Segment:
        """A segment as the networks are told of it: in training some of its windows are of a game that nobody knows."""
        if not self.training or not self.unknown or "game" not in segment.side:
            return segment
        key = segment.side["game"]
        drawn = torch.rand(key.shape, generator=generator, device=key.device) < self.unknown
        return replace(segment, side=segment.side | {"game": torch.where(drawn, NOBODY, key)})

    def has(self, segment: Segment) -> Tensor:
        """Which of the actions of a segment its games have, (B, T) bool."""
        return self.legal[self.rows(segment)].gather(1, segment.action)

    def refuse_illegal(self, rows: Tensor, action: Tensor) -> None:
        """Refuse actions (B,) that the games of their rows do not have.

        Raises:
            UserError: naming the first of them.
        """
        wrong = ~self.legal[rows, action]
        if wrong.any():
            k = int(wrong.nonzero()[0, 0])
            name, names = self.names[int(rows[k]) - 1], [ACTIONS[a] for a in self.legal[rows[k]].nonzero()[:, 0]]
            raise UserError(f"{ACTIONS[int(action[k])]} is no action of {name}, which has {', '.join(names)}")

"""Recurrent policies over ALE's action set: an actor with its critic, and action values.

Sources: the actor-critic of Alonso et al. 2024 (DIAMOND), appendix; action values with any head as in Farebrother et
al. 2024 ("Stop Regressing"). Both see through the same `RecurrentEncoder`.

Legend: B batch, T steps, C colour channels, H and W pixels, D features, A = 18 actions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.nn.games import Games
from worldmodels.nn.recurrent import RecurrentEncoder
from worldmodels.types import ACTIONS, Segment, State, UserError

Actions = Sequence[int] | Mapping[str, Sequence[int]]
NEVER = -1e9
"""Logit or value of an action that is not allowed: finite, so that 0 times it is 0."""


class RecurrentPolicy(nn.Module):
    """What both policies share: the encoder, the actions that may be taken, and how one is drawn.

    Args:
        image_channels: C.
        image_size: H = W.
        encoder: further settings of `RecurrentEncoder`.
        actions: indices into the 18-action set that may be taken: those of the log that it learns from. Of several
            games by the name of each: a window then has those of its game, and `play` says which is played.
        temperature: of the draw, below 1 nearer to the best action; at 0 it is taken. May be set later, by a protocol.

    Raises:
        UserError: there is no action, or one is not in the 18-action set.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        encoder: dict[str, Any],
        actions: Actions,
        temperature: float,
    ) -> None:
        super().__init__()
        by_game = dict(actions) if isinstance(actions, Mapping) else None
        self.games = None if by_game is None else Games(by_game)
        own: Any = actions if by_game is None else [a for mine in by_game.values() for a in mine]
        self.actions: list[int] = sorted(set(own))
        if not self.actions or self.actions[0] < 0 or self.actions[-1] >= len(ACTIONS):
            raise UserError(
                f"the policy's actions={list(actions)} must be indices 0 to {len(ACTIONS) - 1}, one at least"
            )
        self.encoder = RecurrentEncoder(image_channels, image_size, **encoder)
        self.temperature = temperature
        legal = torch.zeros(len(ACTIONS), dtype=torch.bool)
        legal[self.actions] = True
        self.register_buffer("legal", legal, persistent=False)

    def preferences(self, features: Tensor, legal: Tensor | None = None) -> Tensor:
        """(..., A) float32 for features (..., D): what a softmax draws from; `NEVER` where an action is not allowed.

        Allowed are those of `legal` (..., A) bool; by default all that the policy has, or those of the game it plays.
        """
        raise NotImplementedError

    def play(self, game: str) -> "RecurrentPolicy":
        """Take the actions of one of its games alone from now on, of which it has only one unless they are by game.

        Raises:
            UserError: it has learned other games.
        """
        if self.games is not None:
            if not (row := self.games.row(game)):
                raise UserError(f"the policy plays {' and '.join(self.games.names)}, and not {game}")
            self.legal.copy_(self.games.legal[row])
            self.actions = self.legal.nonzero()[:, 0].tolist()
        return self

    def legal_in(self, segment: Segment) -> Tensor | None:
        """(B, A) bool, the actions that the games of the windows have; None where all have the same."""
        return None if self.games is None else self.games.legal[self.games.rows(segment)]

    def allowed(self, segment: Segment) -> Tensor:
        """(B, T) bool, whether the policy may take the logged actions."""
        return self.legal[segment.action] if self.games is None else self.games.has(segment)

    def networks(self) -> list[nn.Module]:
        """What is worth compiling (`hardware.compile_in_place`)."""
        return [self.encoder.look]

    def start(self, n: int) -> State:
        """The state of `n` fresh rows."""
        return self.encoder.start(n)

    @torch.no_grad()
    def act(self, observation: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Tensor, State]:
        """Actions (B,) int64 for frames (B, C, H, W) uint8, and the state after them."""
        features, state = self.encoder(observation, state)
        return self.draw(features, generator), state

    def draw(self, features: Tensor, generator: torch.Generator | None = None, legal: Tensor | None = None) -> Tensor:
        """Actions (B,) int64 for features (B, D), of those that are `legal` as in `preferences`."""
        preferences = self.preferences(features, legal)
        if self.temperature == 0:
            return preferences.argmax(-1)
        chances = (preferences / self.temperature).softmax(-1)
        return torch.multinomial(chances, 1, generator=generator)[:, 0]

    def watch(self, segment: Segment, skip: int = 0) -> Tensor:
        """Features (B, T+1, D) of all frames of logged play; rows begin anew where an episode does.

        Those of the first `skip` frames are of no use: zero, and no work, where the encoder has no memory to fill.
        """
        state = self.start(segment.batch_size)
        # what is before the first real row is padding, and the frame after the last may be missing
        fresh = F.pad(~segment.mask, (1, 0))
        real = F.pad(segment.mask, (0, 1)) | F.pad(segment.mask & segment.next_mask, (1, 0))
        frames = torch.where(real[..., None, None, None], segment.obs, self.encoder.blank)
        stacks = self.encoder.stack(frames, state)
        if self.encoder.memory or not skip:
            return self.encoder.features(stacks, state, fresh)[..., : self.encoder.lstm]
        return F.pad(self.encoder.features(stacks[:, skip:], state)[..., : self.encoder.lstm], (0, 0, skip, 0))

    @torch.no_grad()
    def burn_in(self, context: Segment) -> State:
        """The state before the last frame of `context`, which `act` is to see next."""
        state = self.start(context.batch_size)
        for t in range(context.length):
            _, seen = self.encoder(context.obs[:, t], state)
            real = context.mask[:, t]
            state = {k: torch.where(real.view(-1, *[1] * (v.ndim - 1)), v, state[k]) for k, v in seen.items()}
        return state


class ActorCritic(RecurrentPolicy):
    """A distribution over actions and the value of the frame, from the same features.

    Args:
        image_channels: C.
        image_size: H = W.
        encoder: further settings of `RecurrentEncoder`.
        actions: indices that may be taken.
        head: makes the critic's head for a number of features (nn/heads.py).
        temperature: as in `RecurrentPolicy`.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        encoder: dict[str, Any],
        actions: Actions,
        head: Callable[..., nn.Module],
        temperature: float = 1.0,
    ) -> None:
        super().__init__(image_channels, image_size, encoder, actions, temperature)
        self.actor = nn.Linear(self.encoder.lstm, len(ACTIONS))
        self.critic: Any = head(features=self.encoder.lstm)
        for parameter in (*self.actor.parameters(), *self.critic.parameters()):
            nn.init.zeros_(parameter)

    def preferences(self, features: Tensor, legal: Tensor | None = None) -> Tensor:
        """Logits (..., A) float32."""
        return self.actor(features).float().masked_fill(~(self.legal if legal is None else legal), NEVER)


class ActionValues(RecurrentPolicy):
    """The value of each action; the best one is taken at the default temperature of 0.

    Args:
        image_channels: C.
        image_size: H = W.
        encoder: further settings of `RecurrentEncoder`.
        actions: indices that may be taken.
        head: makes the head for a number of features and of actions (nn/heads.py).
        temperature: as in `RecurrentPolicy`, of a softmax over values.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        encoder: dict[str, Any],
        actions: Actions,
        head: Callable[..., nn.Module],
        temperature: float = 0.0,
    ) -> None:
        super().__init__(image_channels, image_size, encoder, actions, temperature)
        self.values: Any = head(features=self.encoder.lstm, actions=len(ACTIONS))

    def preferences(self, features: Tensor, legal: Tensor | None = None) -> Tensor:
        """Values (..., A) float32."""
        return self.values.mean(features).masked_fill(~(self.legal if legal is None else legal), NEVER)

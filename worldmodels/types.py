"""The data shapes and the protocols that every part of the package agrees on.

Legend for shapes: B batch, T transitions of a segment, E episodes, C colour channels, H and W pixels.

Row t of an episode or segment is (obs_t, action_t, reward received after action_t, flags after action_t).
Actions are always indices into ALE's 18-action set, whatever set the log used.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

ACTIONS = (
    "NOOP FIRE UP RIGHT LEFT DOWN UPRIGHT UPLEFT DOWNRIGHT DOWNLEFT UPFIRE RIGHTFIRE LEFTFIRE DOWNFIRE "
    "UPRIGHTFIRE UPLEFTFIRE DOWNRIGHTFIRE DOWNLEFTFIRE"
).split()
"""Names of ALE's full action set, by index."""


def game_key(name: str) -> int:
    """The number that stands for a game in tensors: of its name alone, so that no list of games must be agreed on."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


State = dict[str, Tensor]
"""What a model or a policy carries between steps: batch first, opaque. `{k: v[i]}` gathers rows."""

Metrics = dict[str, Tensor]


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the cause, the place, what is allowed and the remedy.

    The command line prints it as one line on stderr and exits with code 2.
    """


@dataclass(frozen=True, slots=True)
class Episode:
    """One logged episode of T transitions.

    Args:
        obs: (T, H, W) or (T, H, W, 3) uint8, one frame a row (no stacks).
        action: (T,) uint8, index into ALE's 18-action set.
        reward: (T,) float32, as logged.
        terminated: (T,) bool, true where the game ended after the action.
        truncated: (T,) bool, true where the episode was cut (time limit, end of collecting) after the action.
        life_loss: (T,) bool, true where the action cost a life; all false where the source does not say.
        final_obs: (H, W) or (H, W, 3) uint8, the frame after the last action, where the source has it.
        info: plain data that is kept with the episode (behaviour, seed, ...).
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    life_loss: np.ndarray
    final_obs: np.ndarray | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.action)


@dataclass(frozen=True, slots=True)
class Segment:
    """A batch of equally long windows of logged (or imagined) play.

    Args:
        obs: (B, T+1, C, H, W) uint8; obs[:, T] is the frame after the last action. Padded frames are zero.
        action: (B, T) int64, index into the 18-action set.
        reward: (B, T) float32.
        terminated: (B, T) bool.
        truncated: (B, T) bool.
        mask: (B, T) bool, true where row t is real (false: padding before an episode's start or past its end).
        next_mask: (B, T) bool, true where obs[:, t+1] truly follows row t.
        side: any other column by name, batch first; of logged play `life_loss` (B, T) bool and `game` (B,) int64, the
            `game_key` of its game.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    mask: Tensor
    next_mask: Tensor
    side: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return self.action.shape[0]

    @property
    def length(self) -> int:
        """Number of transitions T."""
        return self.action.shape[1]

    def map(self, f: Callable[[Tensor], Tensor]) -> "Segment":
        """Apply `f` to every tensor, side columns included."""
        fields = (self.obs, self.action, self.reward, self.terminated, self.truncated, self.mask, self.next_mask)
        return Segment(*map(f, fields), side={k: f(v) for k, v in self.side.items()})

    def to(self, *args: Any, **kwargs: Any) -> "Segment":
        """Move to a device (as `Tensor.to`)."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def rows(self, index: Any) -> "Segment":
        """The batch rows `index` (a slice, an index tensor or a mask)."""
        return self.map(lambda x: x[index])

    def steps(self, start: int, stop: int) -> "Segment":
        """Transitions `start` to `stop`, with the frame after the last of them."""
        side = {k: v if k in PER_WINDOW else v[:, start:stop] for k, v in self.side.items()}
        cut = (getattr(self, k)[:, start:stop] for k in _COLUMNS)
        return Segment(self.obs[:, start : stop + 1], *cut, side=side)


PER_WINDOW = frozenset({"game", "store", "starts", "importance", "goal", "goal_offset"})
"""Columns of `side` that have one value a window, not one a row."""
_COLUMNS = ("action", "reward", "terminated", "truncated", "mask", "next_mask")


class Step(NamedTuple):
    """What one imagined transition gives.

    Args:
        frame: (B, C, H, W) uint8, or None for a model without frames.
        reward: (B,) float32, drawn from the model's distribution.
        terminated: (B,) bool, drawn from the model's distribution.
        reward_mean: (B,) float32.
        terminated_mean: (B,) float32, the probability.
        truncated: (B,) bool.
        uncertainty: (B,) float32 where the model gives one.
        life_loss: (B,) bool, drawn, where the model tells the loss of a life from termination.
        life_loss_mean: (B,) float32, its probability.
        reward_signs: (B, 2) float32, probabilities of a negative and a positive reward, where the model knows them.
    """

    frame: Tensor | None
    reward: Tensor
    terminated: Tensor
    reward_mean: Tensor
    terminated_mean: Tensor
    truncated: Tensor
    uncertainty: Tensor | None = None
    life_loss: Tensor | None = None
    life_loss_mean: Tensor | None = None
    reward_signs: Tensor | None = None

    def seen(self) -> Tensor:
        """The frame, for what needs one.

        Raises:
            UserError: the model gives none.
        """
        if self.frame is None:
            raise UserError(
                "this world model gives no frames to look at or to act on: give one that does, such as that of "
                "`worldmodels train` without learner=, or a MuZero with model.probe={hidden: 64}"
            )
        return self.frame


@runtime_checkable
class WorldModel(Protocol):
    """A model of the environment that owns its loss: training, imagination and metrics need nothing else."""

    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Scalar loss of a batch of segments, and scalar metrics by name.

        Among them may be `window_loss` (B,), by which windows are drawn where `data.priority` is on.
        """
        ...

    def start(self, context: Segment) -> State:
        """The state after the last frame of `context`."""
        ...

    def step(self, state: State, action: Tensor, generator: torch.Generator | None = None) -> tuple[State, Step]:
        """Take `action` (B,) int64 and imagine one transition."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Anything that acts: a network, a search, a script, a person at the keyboard."""

    def start(self, n: int) -> State:
        """The state of `n` fresh rows."""
        ...

    def act(self, observation: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Tensor, State]:
        """Actions (B,) int64 in the 18-action set for observations (B, C, H, W) uint8."""
        ...


class RecurrentOutput(NamedTuple):
    """What a search needs of one model step: reward (B,), discount (B,), prior_logits (B, A), value (B,)."""

    reward: Tensor
    discount: Tensor
    prior_logits: Tensor
    value: Tensor


Recurrent = Callable[[State, Tensor], tuple[RecurrentOutput, State]]
Source = Callable[..., Iterator[Episode]]


class Store(Protocol):
    """Logged episodes on disk.

    `starts` is an int64 array (B, 2) of (episode, first step); the first step may be negative or the window may
    run past the end: such rows are padding, and the masks of the segment say so.
    """

    @property
    def card(self) -> dict[str, Any]: ...

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def splits(self) -> dict[str, np.ndarray]: ...

    def read(self, starts: np.ndarray, length: int) -> Segment: ...

    def append(self, episode: Episode) -> None: ...

    def write_side(self, name: str, version: str, rows: Sequence[int] | np.ndarray, array: np.ndarray) -> None: ...

    def side(self, name: str, version: str) -> np.ndarray: ...

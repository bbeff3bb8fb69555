"""World models of frames alone, without rewards and ends, for comparisons of how frames are made.

Legend: B batch, L frames of context, C colour channels, H and W pixels.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from worldmodels.types import Metrics, Segment, State, Step


class FramesOnly(nn.Module, ABC):
    """A `WorldModel` that keeps the last L frames and actions; children say how the next frame is made and learned."""

    context = 4

    @abstractmethod
    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """As `WorldModel.loss`."""

    @abstractmethod
    def next_frame(self, frames: Tensor, action: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next frame (B, C, H, W) uint8 after `frames` (B, L, C, H, W) uint8 and actions (B, L) int64."""

    def start(self, context: Segment) -> State:
        """State after the last frame of `context`, which has at least L of them."""
        return {"frames": context.obs[:, -self.context :], "actions": context.action[:, 1 - self.context :]}

    @torch.no_grad()
    def step(self, state: State, action: Tensor, generator: torch.Generator | None = None) -> tuple[State, Step]:
        """Imagine one frame; nothing is earned and nothing ends."""
        actions = torch.cat([state["actions"], action[:, None]], 1)
        frame = self.next_frame(state["frames"], actions, generator)
        none, never = torch.zeros(len(action)), torch.zeros(len(action), dtype=torch.bool)
        state = {"frames": torch.cat([state["frames"][:, 1:], frame[:, None]], 1), "actions": actions[:, 1:]}
        return state, Step(frame, none, never, none, none, never)

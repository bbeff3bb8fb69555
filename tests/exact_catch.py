"""The toy game itself as a world model: what a perfect one would dream."""

import numpy as np
import torch
from torch import Tensor, nn

from worldmodels.envs.catch import MOVES, CatchEnv
from worldmodels.types import Metrics, Segment, State, Step

BALL, PADDLE = 236, 92  # red of each


class ExactCatch(nn.Module):
    """Reads ball and paddle from the last frame, and plays on by the rules; a `truncate_row` ends rows early there."""

    def __init__(self, cells: int = 5, size: int = 20, truncate_row: int | None = None) -> None:
        super().__init__()
        self.cells, self.size, self.truncate_row = cells, size, truncate_row

    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        return torch.zeros(()), {}

    def start(self, context: Segment) -> State:
        cell = self.size // self.cells
        red = context.obs[:, -1, 0, ::cell, ::cell]
        ball = (red == BALL).flatten(1).float().argmax(1)
        paddle = (red[:, -1] == PADDLE).float().argmax(1)
        return {"row": ball // self.cells, "ball": ball % self.cells, "paddle": paddle}

    def step(self, state: State, action: Tensor, generator: torch.Generator | None = None) -> tuple[State, Step]:
        move = torch.tensor([MOVES.get(int(a), 0) for a in action])
        state = dict(state, row=state["row"] + 1, paddle=(state["paddle"] + move).clamp(0, self.cells - 1))
        over = state["row"] >= self.cells - 1
        reward = torch.where(over, torch.where(state["ball"] == state["paddle"], 1.0, -1.0), 0.0)
        cut = (state["row"] == self.truncate_row) & ~over if self.truncate_row else torch.zeros_like(over)
        return state, Step(self._frames(state), reward, over, reward, over.float(), cut)

    def _frames(self, state: State) -> Tensor:
        env, frames = CatchEnv(self.cells, self.size), []
        for row, ball, paddle in zip(*(state[k].tolist() for k in ("row", "ball", "paddle")), strict=True):
            env.row, env.ball, env.paddle = min(row, self.cells - 1), ball, paddle
            frames.append(env._frame())
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()

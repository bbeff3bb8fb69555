"""Catch: a ball falls through a small grid, a paddle in the bottom row moves left or right to be under it in the end.

A toy that needs no ROM and runs in microseconds, for tests; it never stands in for Atari in a claim. The ball starts
in a random column of the top row and falls one row a step, the paddle starts in the middle. An episode of `cells` - 1
steps ends with +1 (caught) or -1 (missed). The best mean return is 1, that of a random player 2 / cells - 1 (-0.6 in
a 5x5 grid).
"""

import numpy as np

from worldmodels.types import UserError

NOOP, RIGHT, LEFT = 0, 3, 4  # ALE's indices
MOVES = {NOOP: 0, RIGHT: 1, LEFT: -1}
_BALL, _PADDLE, _GROUND = (236, 236, 236), (92, 186, 92), (0, 0, 0)


class CatchEnv:
    """The game of Catch with frames (size, size, 3) uint8.

    Args:
        cells: rows and columns of the grid.
        size: height and width of the frames in pixels, a multiple of `cells`.

    Raises:
        UserError: `size` is no multiple of `cells`, or the grid is too small.
    """

    def __init__(self, cells: int = 5, size: int = 20) -> None:
        if cells < 3 or size < cells or size % cells:
            raise UserError(f"size={size} must be a multiple of cells={cells}, and cells at least 3")
        self.cells, self.size = cells, size
        self.reset(0)

    def reset(self, seed: int) -> np.ndarray:
        """Start an episode; the seed decides the column of the ball. Returns the first frame."""
        self.ball = int(np.random.Generator(np.random.Philox(key=seed)).integers(self.cells))
        self.row, self.paddle = 0, self.cells // 2
        return self._frame()

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        """Move by an action of ALE's set (RIGHT, LEFT, anything else stays); returns frame, reward and terminated."""
        self.paddle = min(max(self.paddle + MOVES.get(action, 0), 0), self.cells - 1)
        self.row += 1
        terminated = self.row == self.cells - 1
        reward = (1.0 if self.ball == self.paddle else -1.0) if terminated else 0.0
        return self._frame(), reward, terminated

    def best_action(self) -> int:
        """The move towards the ball."""
        return NOOP if self.ball == self.paddle else RIGHT if self.ball > self.paddle else LEFT

    def _frame(self) -> np.ndarray:
        grid = np.full((self.cells, self.cells, 3), _GROUND, np.uint8)
        grid[-1, self.paddle] = _PADDLE
        grid[self.row, self.ball] = _BALL  # drawn over the paddle when it is caught
        return grid.repeat(self.size // self.cells, 0).repeat(self.size // self.cells, 1)

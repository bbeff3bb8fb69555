"""Catch: a ball falls through a small grid, a paddle in the bottom row moves left or right to be under it in the end.

A toy that needs no ROM and runs in microseconds, for tests; it never stands in for Atari in a claim. The ball starts
in a random column of the top row and falls one row a step, the paddle starts in the middle. After `cells` - 1 steps
there is +1 (caught) or -1 (missed), and another ball falls or, after the last, the episode ends. With one ball the best
mean return is 1, that of a random player 2 / cells - 1 (-0.6 in a 5x5 grid).
"""

from typing import Any

import gymnasium
import numpy as np

from worldmodels.types import ACTIONS, UserError

NOOP, RIGHT, LEFT = 0, 3, 4  # ALE's indices
MOVES = {NOOP: 0, RIGHT: 1, LEFT: -1}
_BALL, _PADDLE, _GROUND = (236, 236, 236), (92, 186, 92), (0, 0, 0)


class CatchEnv:
    """The game of Catch with frames (size, size, 3) uint8.

    Args:
        cells: rows and columns of the grid.
        size: height and width of the frames in pixels, a multiple of `cells`.
        balls: that fall one after the other.

    Raises:
        UserError: `size` is no multiple of `cells`, the grid is too small, or there is no ball.
    """

    def __init__(self, cells: int = 5, size: int = 20, balls: int = 1) -> None:
        if cells < 3 or size < cells or size % cells or balls < 1:
            raise UserError(f"size={size} must be a multiple of cells={cells}, cells at least 3, and balls={balls} 1")
        self.cells, self.size, self.balls = cells, size, balls
        self.reset(0)

    def reset(self, seed: int) -> np.ndarray:
        """Start an episode; the seed decides the columns of the balls. Returns the first frame."""
        self._columns = np.random.Generator(np.random.Philox(key=seed)).integers(self.cells, size=self.balls).tolist()
        self.ball, self.row, self.paddle = self._columns.pop(0), 0, self.cells // 2
        return self._frame()

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        """Move by an action of ALE's set (RIGHT, LEFT, anything else stays); returns frame, reward and terminated."""
        self.paddle = min(max(self.paddle + MOVES.get(action, 0), 0), self.cells - 1)
        self.row += 1
        landed = self.row == self.cells - 1
        reward = (1.0 if self.ball == self.paddle else -1.0) if landed else 0.0
        terminated = landed and not self._columns
        if landed and not terminated:
            self.ball, self.row = self._columns.pop(0), 0
        return self._frame(), reward, terminated

    def best_action(self) -> int:
        """The move towards the ball."""
        return NOOP if self.ball == self.paddle else RIGHT if self.ball > self.paddle else LEFT

    def _frame(self) -> np.ndarray:
        grid = np.full((self.cells, self.cells, 3), _GROUND, np.uint8)
        grid[-1, self.paddle] = _PADDLE
        grid[self.row, self.ball] = _BALL  # drawn over the paddle when it is caught
        return grid.repeat(self.size // self.cells, 0).repeat(self.size // self.cells, 1)


class CatchGames(gymnasium.vector.VectorEnv):
    """Games of Catch side by side, seen and stepped as AtariVectorEnv's are; a game that has ended stands still.

    Args:
        num_envs: number of games.
        cells: as of `CatchEnv`.
        size: as of `CatchEnv`.
        balls: as of `CatchEnv`.
    """

    def __init__(self, num_envs: int, cells: int = 5, size: int = 20, balls: int = 1) -> None:
        self.num_envs = num_envs
        self._games = [CatchEnv(cells, size, balls) for _ in range(num_envs)]
        self._over = np.zeros(num_envs, bool)
        space = gymnasium.spaces.Box(0, 255, (1, size, size, 3), np.uint8)
        self.single_observation_space, self.single_action_space = space, gymnasium.spaces.Discrete(len(ACTIONS))
        self.observation_space = gymnasium.vector.utils.batch_space(space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start all games; `seed` is one number a game. Returns frames (num_envs, 1, size, size, 3) uint8."""
        self._over[:] = False
        self._frames = np.stack([game.reset(int(s)) for game, s in zip(self._games, seed, strict=True)])[:, None]
        return self._frames.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all games that are not over."""
        reward, ends = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        for k in np.flatnonzero(~self._over):
            self._frames[k, 0], reward[k], ends[k] = self._games[k].step(int(actions[k]))
        self._over |= ends
        return self._frames.copy(), reward, ends, np.zeros(self.num_envs, bool), {}

    def __enter__(self) -> "CatchGames":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

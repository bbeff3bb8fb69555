"""MiniPacman in square mazes that are dug from a seed, many games at once, symmetric under rotations and flips.

Pac-Man eats food (+1) and power pills (+2) in a maze without dead ends. Ghosts hunt him: at a junction they go the way
that points to him most, evenly drawn among equals, never back, 5 % of their moves at random. For 20 steps after a pill
they run away and can be eaten (+5), and are gone until the next level. A maze eaten empty is filled again: level L has
1 + (L - 1) // 2 ghosts (at most 4) that move in a share 0.5 + 0.1 (L - 1) of the steps. A ghost costs a life, the last
life ends the game. These are the rules of the MiniPacman of I2A (Racaniere et al. 2017, "regular") but for the mazes,
square and random as in Guez et al. 2019, the even draws, and the cap of ghosts.

The game in a maze turned by an element of D4, with the same seed and turned actions, is the turned game, step for step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from worldmodels.envs import maze_rules as rules
from worldmodels.types import ACTIONS, UserError

PLANES = ("wall", "food", "pill", "pacman", "ghost", "edible")
"""What observations of planes have in each channel, 0 or 1; edible are ghosts under a pill's power."""
SETTINGS = {"cells": 15, "mazes": 1000, "maze_seed": 0, "unseen": False, "orientation": 0, "lives": 1}
"""What decides the games besides the time limit and the seeds: arguments of `MazeEnv` and their defaults."""
_ITEMS = np.array(((0, 0, 0), (180, 140, 100), (255, 255, 255), (72, 72, 96)), int)  # nothing, food, pill, wall
_ACTORS = np.array(((190, 190, 0), (30, 60, 190), (190, 20, 20)), int)  # Pac-Man, edible, ghost
_PALETTE = np.stack([_ITEMS, *(actor + _ITEMS // 4 for actor in _ACTORS)]).astype(np.uint8)
"""(actor, item, 3), nobody first: somebody's colour shows what lies under him."""


def turn(image: np.ndarray, g: int, axes: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """The image turned by element g of D4: g % 4 quarter turns counter-clockwise, then a left-right flip if g > 3."""
    turned = np.rot90(image, g % 4, axes)
    return np.flip(turned, axes[1]) if g > 3 else turned


def _turned_actions() -> np.ndarray:
    table = np.tile(np.arange(6), (8, 1))
    for action, place in {2: (0, 1), 3: (1, 2), 4: (1, 0), 5: (2, 1)}.items():
        for g in range(8):
            seen = np.zeros((3, 3), int)
            seen[place] = 1
            row, column = np.argwhere(turn(seen, g))[0]
            table[g, action] = {(0, 1): 2, (1, 2): 3, (1, 0): 4, (2, 1): 5}[row, column]
    return table


TURNED_ACTIONS = _turned_actions()
"""(8, 6): what element g of D4 makes of ALE's actions 0 to 5 (NOOP, FIRE, UP, RIGHT, LEFT, DOWN)."""


def maze_set(count: int, cells: int = 15, seed: int = 0, unseen: bool = False) -> np.ndarray:
    """A fixed set of mazes (count, cells, cells) uint8, 1 for a wall; a larger set begins with a smaller one.

    Args:
        count: how many.
        cells: of a side.
        seed: of the set.
        unseen: another set of the same seed, for tests: none of it is among the first `count` that are seen, however
            these are turned.

    Raises:
        UserError: a number is out of range, or no unseen mazes are left, since a small side has few.
    """
    if cells < 9 or not cells % 2:
        raise UserError(
            f"cells={cells} must be odd and at least 9, as rooms are at odd places inside the outer walls: "
            f"give cells={max(cells + 1 - cells % 2, 9)}"
        )
    if count < 1 or seed < 0:
        raise UserError(f"mazes={count} must be at least 1 and maze_seed={seed} at least 0")
    walls = _dug(count, cells, seed, unseen=False)
    if not unseen:
        return walls
    seen = {turn(maze, g).tobytes() for maze in walls for g in range(8)}
    for tried in (count, 8 * count, 64 * count):
        new = [maze for maze in _dug(tried, cells, seed, unseen=True) if maze.tobytes() not in seen]
        if len(new) >= count:
            return np.stack(new[:count])
    raise UserError(
        f"of {tried} mazes with cells={cells} only {len(new)} are none of the {count} seen ones turned: give fewer "
        f"mazes, or cells={cells + 2}"
    )


def _dug(count: int, cells: int, seed: int, unseen: bool) -> np.ndarray:
    walls = np.empty((count, cells * cells), np.uint8)
    rules.dig_all(walls, cells, seed, int(unseen))
    return walls.reshape(count, cells, cells)


def maze_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """All of `SETTINGS` with those that are given.

    Raises:
        UserError: one is unknown or of a wrong type.
    """
    for name, value in given.items():
        if name not in SETTINGS:
            raise UserError(f"maze has no setting {name}; it has {', '.join(SETTINGS)}")
        if type(value) is not type(SETTINGS[name]):
            raise UserError(
                f"{name}={value} of maze must be {'true or false' if name == 'unseen' else 'a whole number'}"
            )
    return SETTINGS | dict(given)


class MazeEnv(gymnasium.vector.VectorEnv):
    """Games side by side. One that ends begins anew in the same step, in another maze of the set.

    Args:
        num_envs: number of games.
        cells: of a side of the mazes, odd.
        mazes: how many there are.
        maze_seed: of their set.
        unseen: play in the set's counterpart for tests.
        orientation: element of D4, as `turn` has it, that the mazes are turned by; one for all games or one for each.
        lives: of a game; Pac-Man and the ghosts start again after a loss, and the food stays eaten.
        time_limit: steps after which a game is cut.
        observation: "planes" for (6, cells, cells) uint8 of 0 and 1, see `PLANES`; "frames" for pictures
            (size, size, 3) uint8 of one colour a cell, in which the blue in Pac-Man is the power that is left.
        size: height and width of frames in pixels, a multiple of `cells`; None for one pixel a cell.
        render_mode: None or "rgb_array".

    Raises:
        UserError: a number is out of range.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int,
        cells: int = 15,
        mazes: int = 1000,
        maze_seed: int = 0,
        unseen: bool = False,
        orientation: int | Sequence[int] = 0,
        lives: int = 1,
        time_limit: int = 3000,
        observation: str = "planes",
        size: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self._mazes = maze_set(mazes, cells, maze_seed, unseen).reshape(mazes, -1)
        size = cells if size is None else size
        if type(size) is not int or size < cells or size % cells:
            raise UserError(
                f"size={size} must be a multiple of cells={cells}: give size={max(round(size / cells), 1) * cells}"
            )
        if not np.isin(orientation, range(8)).all() or np.size(orientation) not in (1, num_envs):
            raise UserError(f"orientation={orientation} must be 0 to 7, one for all {num_envs} games or one for each")
        if num_envs < 1 or lives < 1 or time_limit < 1:
            raise UserError(f"num_envs={num_envs}, lives={lives} and time_limit={time_limit} must be at least 1")
        if observation not in ("planes", "frames") or render_mode not in (None, "rgb_array"):
            raise UserError(
                f"observation={observation} must be planes or frames, and render_mode={render_mode} None or rgb_array"
            )
        self.num_envs, self.cells, self.render_mode = num_envs, cells, render_mode
        self._lives, self._time_limit, self._scale = lives, time_limit, size // cells
        self._frames = observation == "frames"
        self._games = np.zeros(num_envs, rules.GAME)
        self._games["orientation"] = orientation
        self._planes = np.zeros((num_envs, len(PLANES), cells * cells), np.uint8)
        places = np.arange(cells * cells).reshape(cells, cells)
        self._cells = np.stack([np.argsort(turn(places, g), axis=None) for g in range(8)])
        self._directions = TURNED_ACTIONS[:, 2:] - 2
        shape, high = ((len(PLANES), cells, cells), 1) if observation == "planes" else ((size, size, 3), 255)
        self.single_observation_space = gymnasium.spaces.Box(0, high, shape, np.uint8)
        self.single_action_space = gymnasium.spaces.Discrete(len(ACTIONS))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._begun = False

    def reset(
        self, *, seed: int | Sequence[int] | np.ndarray | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin all games anew.

        Args:
            seed: decides all that happens in the games: one number a game, or s for s, s + 1, ...; None to go on with
                the draws of before.
            options: not used.

        Returns:
            Observations (num_envs, ...) uint8 and the info, with `lives`, `level` and `maze` (num_envs,) int64.

        Raises:
            UserError: there is not one seed a game.
        """
        if isinstance(seed, int | np.integer):
            super().reset(seed=int(seed))
            seed = int(seed) + np.arange(self.num_envs)
        elif seed is None and not self._begun:
            seed = self.np_random.integers(2**63, size=self.num_envs)
        if seed is not None:
            if np.shape(seed) != (self.num_envs,):
                raise UserError(f"seed has the shape {np.shape(seed)}: give one number, or one for each game")
            self._games["key"] = seed
        self._begun = True
        self._begin(np.ones(self.num_envs, bool))
        return self._observe(), self._info()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Play one step of all games.

        Args:
            actions: (num_envs,) whole numbers, ALE's indices; all but UP, RIGHT, LEFT and DOWN are to stand still.

        Returns:
            Observations (num_envs, ...) uint8, rewards (num_envs,) float64, terminated and truncated (num_envs,) bool,
            and the info: `lives`, `level` and `maze` of what is observed, and where a game has ended its last
            observation in `final_obs`.

        Raises:
            UserError: there is not one action a game.
        """
        if not self._begun:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        actions = np.ascontiguousarray(actions, np.int64)
        if actions.shape != (self.num_envs,):
            raise UserError(f"actions have the shape {actions.shape}, not ({self.num_envs},), one for each game")
        reward, terminated, truncated = np.empty(self.num_envs), *np.empty((2, self.num_envs), bool)
        rules.advance(
            self._games, self._planes, self._cells, self._directions, actions, self._time_limit,
            reward, terminated, truncated,
        )  # fmt: skip
        ended, final = terminated | truncated, {}
        if ended.any():
            last = np.full(self.num_envs, None, object)
            for k, obs in zip(np.flatnonzero(ended), self._observe(ended), strict=True):
                last[k] = obs
            final = {"final_obs": last, "_final_obs": ended}
            self._begin(ended)
        return self._observe(), reward, terminated, truncated, self._info() | final

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture (12 * cells, 12 * cells, 3) uint8 of each game, if the render mode is rgb_array."""
        if self.render_mode is None:
            return None
        pixels = 12
        flat = self._paint(pixels)
        # food and pills are dots and everybody is round, about the middle of the cell as symmetry asks
        offset = (np.arange(pixels * self.cells) % pixels - (pixels - 1) / 2) ** 2
        square = offset[:, None] + offset
        inside = {rules.FOOD: 3, rules.PILL: 14, rules.PACMAN: 34, rules.GHOST: 34, rules.EDIBLE: 34, rules.WALL: 99}
        shown = np.zeros(flat.shape[:3], bool)
        for plane, radius in inside.items():
            here = self._planes[:, plane].reshape(-1, self.cells, self.cells).astype(bool)
            shown |= here.repeat(pixels, 1).repeat(pixels, 2) & (square < radius)
        return tuple(np.where(shown[..., None], flat, 0).astype(np.uint8))

    @property
    def planes(self) -> np.ndarray:
        """The games as they are now, (num_envs, 6, cells, cells) uint8, whatever is observed; to be read only."""
        return self._planes.reshape(-1, len(PLANES), self.cells, self.cells)

    def _begin(self, which: np.ndarray) -> None:
        rules.begin(self._games, self._planes, self._mazes, self._cells, which, self._lives)

    def _info(self) -> dict[str, Any]:
        return {name: self._games[name].copy() for name in ("lives", "level", "maze")}

    def _observe(self, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """A copy of the planes, or the frames, of these games."""
        if self._frames:
            return self._paint(self._scale, which)
        return self._planes[which].reshape(-1, len(PLANES), self.cells, self.cells).copy()

    def _paint(self, scale: int, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Frames (n, scale * cells, scale * cells, 3) uint8 of these games."""
        planes, games = self._planes[which], self._games[which]
        item = planes[:, rules.FOOD] + 2 * planes[:, rules.PILL] + 3 * planes[:, rules.WALL]
        actor = np.maximum(planes[:, rules.PACMAN], 2 * planes[:, rules.EDIBLE])
        actor = np.maximum(actor, 3 * planes[:, rules.GHOST])  # over Pac-Man where he is eaten
        image = _PALETTE.reshape(-1, 3).take(len(_ITEMS) * actor + item, axis=0)
        powered = np.flatnonzero(games["power"])
        image[powered, games["pacman"][powered], 2] = 12 * games["power"][powered]
        image = image.reshape(-1, self.cells, self.cells, 3)
        return image.repeat(scale, 1).repeat(scale, 2) if scale > 1 else image

    def __enter__(self) -> "MazeEnv":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

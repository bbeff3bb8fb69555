"""Players of the maze game that see all of it: one that only looks for food, and one that also looks out for ghosts."""

import numpy as np

from worldmodels.envs.maze_rules import EDIBLE, FOOD, GHOST, PACMAN, PILL, WALL, compiled

MOVES = np.array((0, 2, 3, 4, 5))
"""NOOP, UP, RIGHT, LEFT and DOWN as ALE's indices."""
_NEAR = 2
"""Steps from a ghost within which the cautious player does not go if he can help it."""
_FAR = 10_000


def seek(planes: np.ndarray, cautious: bool, rng: np.random.Generator) -> np.ndarray:
    """Actions (B,) int64 of ALE's set: a step on the shortest way to what can be eaten, evenly drawn among equals.

    Args:
        planes: (B, 6, N, N) uint8 as `MazeEnv` has them.
        cautious: keep away from ghosts, and hunt those that can be eaten.
        rng: draws among equal ways.
    """
    n, view = planes.shape[-1], planes.reshape(*planes.shape[:2], -1)
    food = view[:, FOOD] | view[:, PILL] | view[:, EDIBLE] * cautious
    danger = _distances(view[:, WALL], view[:, GHOST] * cautious, n)
    way = _distances(view[:, WALL] | (danger <= _NEAR), food, n)
    to = view[:, PACMAN].argmax(1)[:, None] + (0, -n, 1, -1, n)
    cost, near, wall = (np.take_along_axis(x, to, 1) for x in (way, danger, view[:, WALL]))
    cost = np.where((near <= _NEAR) | (cost == _FAR), 2 * _FAR - near, cost)  # to flee comes before to eat
    cost = np.where(wall, 3 * _FAR, cost)
    equal = cost == cost.min(1, keepdims=True)
    return MOVES[((1 - rng.random(cost.shape)) * equal).argmax(1)]


@compiled
def _distances(barred: np.ndarray, sources: np.ndarray, n: int) -> np.ndarray:
    """Steps from each cell to the nearest source, `_FAR` where what is barred leaves no way. All (B, n * n)."""
    distance, queue = np.full(barred.shape, _FAR), np.empty(n * n, np.int64)
    for i in range(len(barred)):
        first = last = 0
        for cell in range(n * n):
            if sources[i, cell] and not barred[i, cell]:
                distance[i, cell], queue[last] = 0, cell
                last += 1
        while first < last:
            cell = queue[first]
            first += 1
            for step in (-n, 1, -1, n):
                if not barred[i, cell + step] and distance[i, cell + step] == _FAR:
                    distance[i, cell + step], queue[last] = distance[i, cell] + 1, cell + step
                    last += 1
    return distance

"""Players of the maze game that see all of it: one that only looks for food, and one that also looks out for ghosts."""

import numpy as np
from numba import njit

from worldmodels.envs.maze_rules import EDIBLE, FOOD, GHOST, PACMAN, PILL, WALL

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
    actions, bits = np.empty(len(planes), np.int64), rng.integers(2**62, size=len(planes))
    _seek(np.ascontiguousarray(planes).reshape(*planes.shape[:2], -1), cautious, bits, actions)
    return actions


@njit(cache=True)
def _seek(planes, cautious, bits, actions):
    n = int(np.sqrt(planes.shape[2]))
    steps, cost = np.array((0, -n, 1, -1, n)), np.empty(5, np.int64)  # to stand still is an action, too
    for i in range(len(planes)):
        view = planes[i]
        here, food, barred = np.argmax(view[PACMAN]), view[FOOD] | view[PILL], view[WALL].copy()
        danger = _distances(view[WALL], view[GHOST], n) if cautious else np.full(n * n, _FAR)
        if cautious:
            food |= view[EDIBLE]
            barred |= danger <= _NEAR
        way = _distances(barred, food, n)
        for k in range(5):
            to = here + steps[k]
            if view[WALL, to]:
                cost[k] = 3 * _FAR
            elif danger[to] > _NEAR and way[to] < _FAR:
                cost[k] = way[to]
            else:
                cost[k] = 2 * _FAR - danger[to]
        best = cost.min()
        chosen = bits[i] % (cost == best).sum()
        for k in range(5):
            if cost[k] == best:
                if not chosen:
                    actions[i] = k + 1 if k else 0
                    break
                chosen -= 1


@njit(cache=True)
def _distances(barred, sources, n):
    """Steps from each cell to the nearest source, around what is barred; `_FAR` where there is no way."""
    distance, queue = np.full(n * n, _FAR), np.empty(n * n, np.int64)
    first, last = 0, 0
    for cell in range(n * n):
        if sources[cell] and not barred[cell]:
            distance[cell], queue[last] = 0, cell
            last += 1
    while first < last:
        cell = queue[first]
        first += 1
        for step in (-n, 1, -1, n):
            if not barred[cell + step] and distance[cell + step] == _FAR:
                distance[cell + step], queue[last] = distance[cell] + 1, cell + step
                last += 1
    return distance

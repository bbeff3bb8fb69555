"""The rules of the maze game, compiled: how mazes are dug, how games begin and how they go on.

Every random choice is a function of (the game's key, its step, a slot), and a choice among directions or cells is made
in the order that the unturned maze has them. So a game that is turned by an element of D4 and played with turned
actions is the turned game, exactly; and as ties are drawn evenly, the process itself is symmetric.

Legend: B games, M mazes, N cells a side, cell = row * N + column, element g of D4 as `turn` of maze.py has it,
direction d = 0..3 for UP, RIGHT, LEFT, DOWN (ALE's actions 2..5), so that 3 - d is the opposite one.

All compiled functions that call each other stay in this file: numba's cache looks at one file to see what is new.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

WALL, FOOD, PILL, PACMAN, GHOST, EDIBLE = range(6)
GHOSTS = 4
SAFE = 5
"""Rows and columns between Pac-Man and a ghost that begins."""
POWER = 20
"""Steps that a power pill lasts."""
FOOD_REWARD, PILL_REWARD, GHOST_REWARD = 1.0, 2.0, 5.0
PILLS = 2
STRAY = 0.05
"""Share of a ghost's moves that are random."""


def compiled(function: Callable) -> Callable:
    """The function compiled by numba, kept on the disk beside this file or in the user's cache where that can be."""
    try:
        return njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither can be written
        return njit(error_model="numpy")(function)


GAME = np.dtype(
    [
        ("key", "u8"),  # all randomness
        ("orientation", "i8"),  # element of D4
        ("maze", "i8"),
        ("step", "i8"),
        ("level", "i8"),
        ("lives", "i8"),
        ("left", "i8"),  # food and pills
        ("power", "i8"),  # steps for which ghosts can be eaten
        ("start", "i8"),  # Pac-Man's first cell
        ("pacman", "i8"),
        ("ghost", "i8", (GHOSTS,)),  # cells, -1 where there is none
        ("heading", "i8", (GHOSTS,)),  # directions, -1 at the beginning
    ],
    align=True,
)
"""A game but for its planes."""

# slots of the draws of one step
_MOVES, _STRAYS, _WAY, _STARTS, _PILL, _PACMAN, _MAZE, _NEXT, _SLOTS = 0, 4, 8, 12, 16, 18, 19, 20, 32
_GOLDEN = 0x9E3779B97F4A7C15


@compiled
def draw(key: int | np.uint64, counter: int) -> np.uint64:
    """Number `counter` of SplitMix64's stream of `key` (Steele, Lea and Flood 2014, with random access)."""
    x = np.uint64(key) + np.uint64(_GOLDEN) * np.uint64(counter + 1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _below(key, counter, n):
    """A whole number from 0 to n - 1."""
    return np.int64(draw(key, counter) % np.uint64(n))


@compiled
def _chance(key, counter):
    """A number from 0 to 1."""
    return np.float64(draw(key, counter) >> np.uint64(11)) * 2.0**-53


@compiled
def dig(walls: np.ndarray, n: int, key: np.uint64) -> None:
    """Dig a maze without dead ends: a random tree of rooms (depth first), and one more way out of each of its leaves.

    Args:
        walls: (n * n,) uint8, filled with 1 where there is a wall.
        n: odd; rooms are at odd rows and columns.
        key: decides the maze.
    """
    walls[:] = 1
    steps, rooms = np.array((-n, 1, -1, n)), n // 2
    open_to, stack = np.empty(4, np.int64), np.empty(rooms * rooms, np.int64)
    room, drawn, depth = _below(key, 0, rooms * rooms), 1, 1
    stack[0] = (2 * (room // rooms) + 1) * n + 2 * (room % rooms) + 1
    walls[stack[0]] = 0
    while depth:
        cell, found = stack[depth - 1], 0
        for d in range(4):
            if _room(cell, d, n) and walls[cell + 2 * steps[d]]:
                open_to[found] = steps[d]
                found += 1
        if not found:
            depth -= 1
            continue
        step = open_to[_below(key, drawn, found)]
        drawn += 1
        walls[cell + step] = walls[cell + 2 * step] = 0
        stack[depth] = cell + 2 * step
        depth += 1
    tree = walls.copy()  # the leaves of the tree, in whatever order they are looked at
    for room in range(rooms * rooms):
        cell, found, ways = (2 * (room // rooms) + 1) * n + 2 * (room % rooms) + 1, 0, 0
        for d in range(4):
            ways += 1 - tree[cell + steps[d]]
            if _room(cell, d, n) and tree[cell + steps[d]]:
                open_to[found] = steps[d]
                found += 1
        if ways == 1:
            walls[cell + open_to[_below(key, drawn + room, found)]] = 0


@compiled
def _room(cell, d, n):
    """Whether there is a room two cells from `cell` in direction `d`."""
    row, column = cell // n, cell % n
    return (row > 1, column < n - 2, column > 1, row < n - 2)[d]


@compiled
def dig_all(walls: np.ndarray, n: int, seed: int, unseen: int) -> None:
    """Fill (M, n * n) uint8 with mazes; maze k is a function of (seed, k, unseen)."""
    for k in range(len(walls)):
        dig(walls[k], n, draw(draw(0, seed), 2 * k + unseen))


@compiled
def begin(
    games: np.ndarray,
    planes: np.ndarray,
    mazes: np.ndarray,
    cells: np.ndarray,
    which: np.ndarray,
    lives: int,
) -> None:
    """Begin the next game, in a maze that is drawn, where `which` says so.

    Args:
        games: (B,) GAME; the next key is drawn from the present one.
        planes: (B, 6, N * N) uint8, of 0 and 1.
        mazes: (M, N * N) uint8.
        cells: (8, N * N) int64, where element g takes each cell to.
        which: (B,) bool.
        lives: of a game.
    """
    for i in range(len(games)):
        if not which[i]:
            continue
        game, to = games[i], cells[games[i].orientation]
        game.key = draw(game.key, _NEXT)
        game.step, game.level, game.lives = 0, 1, lives
        game.maze = _below(game.key, _MAZE, len(mazes))
        planes[i] = 0
        for cell in range(len(to)):
            planes[i, WALL, to[cell]] = mazes[game.maze, cell]
        _fill(game, planes[i], to)
        _place(game, planes[i], to)
        _show(game, planes[i])


@compiled
def advance(
    games: np.ndarray,
    planes: np.ndarray,
    cells: np.ndarray,
    directions: np.ndarray,
    actions: np.ndarray,
    time_limit: int,
    reward: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
) -> None:
    """Play one step of every game: Pac-Man goes and eats, then the ghosts go.

    Args:
        games: (B,) GAME.
        planes: (B, 6, N * N) uint8.
        cells: (8, N * N) int64, where element g takes each cell to.
        directions: (8, 4) int64, where element g takes each direction to.
        actions: (B,) int64, ALE's; what is no direction is to stand still.
        time_limit: steps after which a game is cut.
        reward: (B,) float64, written.
        terminated: (B,) bool, written.
        truncated: (B,) bool, written.
    """
    n = int(np.sqrt(cells.shape[1]))
    steps = np.array((-n, 1, -1, n))
    for i in range(len(games)):
        game, view, to = games[i], planes[i], cells[games[i].orientation]
        _hide(game, view)
        game.step += 1
        points = 0.0
        if 2 <= actions[i] <= 5 and not view[WALL, game.pacman + steps[actions[i] - 2]]:
            game.pacman += steps[actions[i] - 2]
        if view[FOOD, game.pacman]:
            view[FOOD, game.pacman] = 0
            game.left -= 1
            points += FOOD_REWARD
        elif view[PILL, game.pacman]:
            view[PILL, game.pacman] = 0
            game.left -= 1
            game.power = POWER + 1  # this step is none of them
            points += PILL_REWARD
        met = _meet(game)
        if met >= 0 and game.left:
            _chase(game, view[WALL], steps, directions[game.orientation], n)
            more = _meet(game)
            met = met + more if more >= 0 else -1
        points += GHOST_REWARD * max(met, 0)
        game.power = max(game.power - 1, 0)
        if met < 0:
            game.lives -= 1
            if game.lives:
                _place(game, view, to)
        elif not game.left:
            game.level += 1
            _fill(game, view, to)
            _place(game, view, to)
        reward[i], terminated[i] = points, game.lives == 0
        truncated[i] = game.lives > 0 and game.step >= time_limit
        _show(game, view)


@compiled
def _meet(game):
    """How many ghosts Pac-Man eats where he is, or -1 where they eat him."""
    eaten = 0
    for k in range(GHOSTS):
        if game.ghost[k] == game.pacman:
            if not game.power:
                return -1
            game.ghost[k] = -1
            eaten += 1
    return eaten


@compiled
def _chase(game, walls, steps, directions, n):
    """Move the ghosts: towards Pac-Man or away from power, never back, at times at random."""
    counter = game.step * _SLOTS
    for k in range(GHOSTS):
        cell = game.ghost[k]
        if cell < 0 or _chance(game.key, counter + _MOVES + k) >= 0.5 + 0.1 * (game.level - 1):
            continue
        down, right = game.pacman // n - cell // n, game.pacman % n - cell % n
        towards = (-down, right, -right, down)  # the way to Pac-Man times each direction
        sign = -1 if game.power else 1
        if _chance(game.key, counter + _STRAYS + k) < STRAY:
            sign = 0
        best, equal = -4 * n, 0
        for d in range(4):
            if not walls[cell + steps[d]] and d != 3 - game.heading[k]:
                score = sign * towards[d]
                equal = equal + 1 if score == best else 1 if score > best else equal
                best = max(score, best)
        if not equal:  # a dead end
            game.heading[k] = 3 - game.heading[k]
            game.ghost[k] = cell + steps[game.heading[k]]
            continue
        chosen = _below(game.key, counter + _WAY + k, equal)
        for unturned in range(4):
            d = directions[unturned]
            if not walls[cell + steps[d]] and d != 3 - game.heading[k] and sign * towards[d] == best:
                if not chosen:
                    game.heading[k], game.ghost[k] = d, cell + steps[d]
                    break
                chosen -= 1


@compiled
def _fill(game, view, to):
    """Put food everywhere but where Pac-Man begins and two pills are."""
    counter = game.step * _SLOTS
    game.start = _somewhere(view[WALL], view[WALL], to, 0, 0, draw(game.key, counter + _PACMAN))
    for k in range(PILLS):
        cell = _somewhere(view[WALL], view[PILL], to, game.start, 1, draw(game.key, counter + _PILL + k))
        view[PILL, cell] = 1
    game.left = PILLS
    for cell in range(len(to)):
        if not view[WALL, cell] and not view[PILL, cell] and cell != game.start:
            view[FOOD, cell] = 1
            game.left += 1


@compiled
def _place(game, view, to):
    """Put Pac-Man where he begins and the level's ghosts at a distance from him."""
    game.pacman, game.power = game.start, 0
    for k in range(GHOSTS):
        game.heading[k] = game.ghost[k] = -1
        if k < 1 + (game.level - 1) // 2:
            bits = draw(game.key, game.step * _SLOTS + _STARTS + k)
            game.ghost[k] = _somewhere(view[WALL], view[WALL], to, game.start, SAFE, bits)


@compiled
def _somewhere(walls, taken, to, centre, least, bits):
    """A cell that is free and not taken, `least` rows and columns or more from `centre`, all of them equally likely."""
    n, found = int(np.sqrt(len(to))), 0
    for unturned in range(len(to)):
        found += _fits(walls, taken, to[unturned], centre, least, n)
    chosen = np.int64(bits % np.uint64(found))
    for unturned in range(len(to)):
        if _fits(walls, taken, to[unturned], centre, least, n):
            if not chosen:
                return to[unturned]
            chosen -= 1
    return -1


@compiled
def _fits(walls, taken, cell, centre, least, n):
    far = abs(cell // n - centre // n) + abs(cell % n - centre % n) >= least
    return not walls[cell] and not taken[cell] and far


@compiled
def _show(game, view):
    view[PACMAN, game.pacman] = 1
    for k in range(GHOSTS):
        if game.ghost[k] >= 0:
            view[EDIBLE if game.power else GHOST, game.ghost[k]] = 1


@compiled
def _hide(game, view):
    view[PACMAN, game.pacman] = 0
    for k in range(GHOSTS):
        if game.ghost[k] >= 0:
            view[GHOST, game.ghost[k]] = view[EDIBLE, game.ghost[k]] = 0

"""Episodes of MiniPacman in mazes, each played by one of three behaviours with a share of random steps."""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np

from worldmodels.data.card import Card, make_card
from worldmodels.data.sources.playing import episode_rng, played, shares, until
from worldmodels.envs.maze import MazeEnv, maze_settings
from worldmodels.envs.maze_players import MOVES, seek
from worldmodels.types import Episode, UserError

MIXTURE = {"random": 0.2, "greedy": 0.4, "cautious": 0.4}

_PLAYERS: dict[str, Callable[[np.ndarray, np.random.Generator], int]] = {
    "random": lambda planes, rng: int(rng.choice(MOVES)),
    "greedy": lambda planes, rng: int(seek(planes, False, rng)[0]),
    "cautious": lambda planes, rng: int(seek(planes, True, rng)[0]),
}


def maze_card(
    seed: int,
    mixture: Mapping[str, float] | None = None,
    lapse: float = 0.1,
    size: int = 15,
    time_limit: int = 3000,
    **env: Any,
) -> Card:
    """The dataset card of what `maze_play` yields for the same settings; the mazes are in `dataset.env`.

    Raises:
        UserError: a setting is out of range or unknown.
    """
    _games(size, time_limit, env)
    obs = {"height": size, "width": size, "channels": 3, "resize": "none", "max_pool": False}
    return make_card(
        "maze_play",
        "maze",
        obs,
        action_set=MOVES.tolist(),
        frame_skip=1,
        time_limit=time_limit,
        policy={"type": "mixture", "weights": _weights(mixture, lapse), "lapse": lapse},
        seed=seed,
        licence="MIT",
        dataset={"env": maze_settings(env)},
    )


def maze_play(
    steps: int,
    seed: int,
    start_episode: int = 0,
    mixture: Mapping[str, float] | None = None,
    lapse: float = 0.1,
    size: int = 15,
    time_limit: int = 3000,
    **env: Any,
) -> Iterator[Episode]:
    """Play whole games until they hold at least `steps` steps together; episode k is a function of (seed, k).

    Args:
        steps: least number of steps.
        seed: decides all randomness together with the number of the episode.
        start_episode: number of the first episode, for going on with a collection.
        mixture: weight of each behaviour ("random", "greedy" for food, "cautious" of ghosts, too); None for `MIXTURE`.
        lapse: share of steps that are random, whoever plays.
        size: height and width of the frames in pixels, a multiple of the mazes' cells.
        time_limit: steps after which a game is cut.
        env: which mazes and how, as `worldmodels.envs.maze.SETTINGS` has it by default.

    Yields:
        Episodes with losses of lives, the final frame, and in `info` the numbers of the episode and of the maze, the
        seed, the return, and steps and return of the behaviour.

    Raises:
        UserError: a setting is out of range or unknown.
    """
    weights, games = _weights(mixture, lapse), _games(size, time_limit, env)
    yield from until(steps, (_episode(games, number, seed, weights, lapse) for number in count(start_episode)))


def _episode(games: MazeEnv, number: int, seed: int, weights: dict[str, float], lapse: float) -> Episode:
    rng = episode_rng(seed, number)
    behaviour = list(weights)[rng.choice(len(weights), p=list(weights.values()))]
    frame, info = games.reset(seed=rng.integers(2**63, size=1))
    frames, rows, lives, maze, done = [frame[0]], [], info["lives"][0], int(info["maze"][0]), False
    while not done:
        player = _PLAYERS["random" if rng.random() < lapse else behaviour]
        action = player(games.planes, rng)
        frame, reward, terminated, truncated, info = games.step(np.array([action]))
        done = bool(terminated[0] or truncated[0])
        frames.append(info["final_obs"][0] if done else frame[0])
        lost = bool(terminated[0]) or (not done and info["lives"][0] < lives)
        lives = info["lives"][0]
        rows.append((action, reward[0], terminated[0], truncated[0], lost))
    by_name = {behaviour: {"steps": len(rows), "return": float(sum(row[1] for row in rows))}}
    return played(frames, rows, {"episode": number, "seed": seed, "maze": maze, "behaviours": by_name})


def _games(size: int, time_limit: int, env: Mapping[str, Any]) -> MazeEnv:
    return MazeEnv(1, size=size, time_limit=time_limit, observation="frames", **maze_settings(env))


def _weights(mixture: Mapping[str, float] | None, lapse: float) -> dict[str, float]:
    if not 0 <= lapse <= 1:
        raise UserError(f"lapse={lapse} must be from 0 to 1")
    return shares("maze", mixture, MIXTURE)

"""MiniPacman in mazes: its rules, its exact symmetry under D4, its mazes, its pictures, Gymnasium's checks."""

import inspect
from typing import Any

import gymnasium
import numba
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from scipy import ndimage, stats

from worldmodels.envs import maze_rules
from worldmodels.envs.maze import (
    _PALETTE,
    PLANES,
    SETTINGS,
    TURNED_ACTIONS,
    MazeEnv,
    maze_set,
    maze_settings,
    turn,
)
from worldmodels.envs.maze_players import seek
from worldmodels.types import UserError

WALL, FOOD, PILL, PACMAN, GHOST, EDIBLE = range(6)
NOOP, UP, RIGHT, LEFT, DOWN = 0, 2, 3, 4, 5
SEEDS = 12


def mixed_actions(planes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Good play with a share of random steps: it reaches higher levels, and dies at last."""
    random = rng.choice((NOOP, UP, RIGHT, LEFT, DOWN), len(planes))
    return np.where(rng.random(len(planes)) < 0.1, random, seek(planes, True, rng))


def differences(env: MazeEnv, steps: int) -> tuple[list[str], dict[str, int]]:
    """Play 8 orientations of 12 games; what differs from the turned game of orientation 0, and what has happened."""
    rng, different, seen = np.random.default_rng(0), [], dict.fromkeys(("ends", "cuts", "lost", "eaten", "level"), 0)
    obs, info = env.reset(seed=np.tile(np.arange(SEEDS), 8))
    for t in range(steps):
        lives = info["lives"][:SEEDS]
        actions = mixed_actions(obs[:SEEDS], rng)
        obs, *rest, info = env.step(TURNED_ACTIONS[:, actions].reshape(-1))
        turned = np.concatenate([turn(obs[:SEEDS], g) for g in range(8)])
        if not np.array_equal(obs, turned):
            different.append(f"planes at {t}")
        for name, column in {"reward": rest[0], "end": rest[1], "cut": rest[2], **info}.items():
            if name == "final_obs":
                for k in np.flatnonzero(info["_final_obs"]):
                    unturned = column[k % SEEDS]
                    if unturned is None or not np.array_equal(column[k], turn(unturned, k // SEEDS)):
                        different.append(f"last planes at {t}")
            elif (column.reshape(8, SEEDS) != column[:SEEDS]).any():
                different.append(f"{name} at {t}")
        reward, ends, cuts = (column[:SEEDS] for column in rest)
        seen["ends"] += ends.sum()
        seen["cuts"] += cuts.sum()
        seen["lost"] += (~(ends | cuts) & (info["lives"][:SEEDS] < lives)).sum()
        seen["eaten"] += (reward >= maze_rules.GHOST_REWARD).sum()
        seen["level"] = max(seen["level"], info["level"][:SEEDS].max())
    return different, seen


def oriented(**settings: Any) -> MazeEnv:
    return MazeEnv(8 * SEEDS, orientation=np.arange(8).repeat(SEEDS), **settings)


def test_a_turned_game_is_an_exact_rotation_of_the_game():
    different, seen = differences(oriented(lives=2, time_limit=700), 3000)
    assert different == []
    assert min(seen.values()) >= 5, seen  # ends, time limits, lost lives, eaten ghosts, and level 5 with three ghosts


def test_the_comparison_sees_ties_that_are_broken_by_index():
    env = oriented()
    env._directions = np.tile(np.arange(4), (8, 1))  # the draws among equals are no longer turned
    assert differences(env, 300)[0]


def test_other_sizes_and_pictures_turn_as_well():
    env = MazeEnv(8, cells=9, orientation=range(8), observation="frames", size=27, render_mode="rgb_array")
    frames, _ = env.reset(seed=np.full(8, 4))
    rng, powered = np.random.default_rng(0), 0
    for t in range(300):
        pictures = env.render() if t % 10 == 0 else frames
        for g in range(8):
            np.testing.assert_array_equal(frames[g], turn(frames[0], g, (0, 1)))
            np.testing.assert_array_equal(pictures[g], turn(pictures[0], g, (0, 1)))
        powered += env.planes[0, EDIBLE].any()
        frames = env.step(TURNED_ACTIONS[:, mixed_actions(env.planes[:1], rng)[0]])[0]
    assert powered > 10


def test_actions_turn_as_pictures_do():
    sheet = "012345 014253 015432 013524 012435 013254 015342 014523"  # r0 r1 r2 r3, and a flip after each
    assert ["".join(map(str, row)) for row in TURNED_ACTIONS] == sheet.split()


def test_mazes_are_connected_and_have_no_dead_ends():
    for cells in (9, 15, 21):
        walls = maze_set(50, cells)
        assert walls.shape == (50, cells, cells) and set(np.unique(walls)) == {0, 1}
        for maze in walls:
            ways = ndimage.convolve(1 - maze.astype(int), [[0, 1, 0], [1, 0, 1], [0, 1, 0]], mode="constant")
            assert ways[maze == 0].min() >= 2
            assert ndimage.label(maze == 0)[1] == 1
            assert maze[0].all() and maze[-1].all() and maze[:, 0].all() and maze[:, -1].all()
            assert not maze[1::2, 1::2].any() and maze[::2, ::2].all()


def test_sets_of_mazes_are_fixed_and_the_unseen_are_none_of_them_however_turned():
    walls, unseen = maze_set(1000), maze_set(1000, unseen=True)
    np.testing.assert_array_equal(walls[:10], maze_set(10))
    known = {turn(maze, g).tobytes() for maze in walls for g in range(8)}
    assert len(known) == 8000
    assert not known & {maze.tobytes() for maze in unseen}
    assert not known & {maze.tobytes() for maze in maze_set(1000, seed=1)}
    env = MazeEnv(2000, mazes=3, unseen=True, orientation=5)
    _, info = env.reset(seed=0)
    assert np.bincount(info["maze"]).min() > 600
    for k in range(3):
        np.testing.assert_array_equal(env.planes[info["maze"] == k][0, WALL], turn(unseen[k], 5))


def test_small_mazes_are_unseen_as_well_or_there_are_none():
    """Of 9x9 cells there are not 300; of the first ten that are dug for tests one is a seen one, turned by a half."""
    known = {turn(maze, g).tobytes() for maze in maze_set(10, 9) for g in range(8)}
    unseen = maze_set(10, 9, unseen=True)
    assert len(unseen) == 10 and not known & {maze.tobytes() for maze in unseen}
    with pytest.raises(UserError, match="mazes with cells=9 only .* give fewer mazes, or cells=11"):
        maze_set(3000, 9, unseen=True)


def field(games: int = 1, **settings: Any) -> MazeEnv:
    """Games in a 9x9 maze without inner walls and without food but for one pill's cell in the corner (7, 7)."""
    env = MazeEnv(games, cells=9, mazes=1, **settings)
    inner = np.ones((9, 9), np.uint8)
    inner[1:-1, 1:-1] = 0
    env._mazes[0] = inner.reshape(-1)
    env.reset(seed=0)
    env._planes[:, FOOD:] = 0
    env._planes[:, PILL, 7 * 9 + 7] = env._games["left"] = 1
    env._games["ghost"] = -1
    place(env, pacman=(1, 1))
    return env


def place(env: MazeEnv, pacman: tuple[int, int] | None = None, ghost: tuple[int, int] | None = None) -> None:
    """Put Pac-Man or the first ghost somewhere."""
    for name, plane, cell in (("pacman", PACMAN, pacman), ("ghost", GHOST, ghost)):
        if cell:
            env._planes[:, plane] = 0
            env._planes[:, plane, cell[0] * 9 + cell[1]] = 1
            (env._games[name] if name == "pacman" else env._games[name][:, 0])[:] = cell[0] * 9 + cell[1]


def where(planes: np.ndarray, plane: int) -> list[list[int]]:
    return np.argwhere(planes[plane]).tolist()


def test_moves_food_and_walls():
    env = field()
    env._planes[0, FOOD, 9 + 2] = 1
    env._games["left"] = 2
    for action, cell, points in ((UP, [1, 1], 0), (LEFT, [1, 1], 0), (RIGHT, [1, 2], 1), (RIGHT, [1, 3], 0),
                                 (DOWN, [2, 3], 0), (NOOP, [2, 3], 0), (17, [2, 3], 0), (LEFT, [2, 2], 0)):  # fmt: skip
        obs, reward, terminated, truncated, _ = env.step(np.array([action]))
        assert (where(obs[0], PACMAN), reward[0], terminated[0], truncated[0]) == ([cell], points, False, False)
    assert not obs[0, FOOD].any()


def test_a_pill_lets_ghosts_be_eaten_for_twenty_steps_and_the_last_food_ends_the_level():
    env = field()
    place(env, pacman=(1, 1), ghost=(7, 1))
    env._planes[0, PILL, 9 + 2] = 1
    env._games["left"] = 2
    obs, reward, *_ = env.step(np.array([RIGHT]))
    assert reward[0] == maze_rules.PILL_REWARD == 2 and not obs[0, GHOST].any()
    lasting = [obs[0, EDIBLE].any()]
    for _ in range(25):
        obs = env.step(np.array([NOOP]))[0]
        lasting.append(obs[0, EDIBLE].any())
        assert obs[0, EDIBLE].any() != obs[0, GHOST].any()
    assert sum(lasting) == maze_rules.POWER == 20 and lasting[:20] == [True] * 20
    place(env, pacman=(1, 1), ghost=(1, 2))
    env._games["power"] = 5
    obs, reward, terminated, *_ = env.step(np.array([RIGHT]))
    assert reward[0] == maze_rules.GHOST_REWARD == 5 and not terminated[0]
    assert not obs[0, GHOST].any() and not obs[0, EDIBLE].any()
    place(env, pacman=(7, 6))
    obs, reward, terminated, _, info = env.step(np.array([RIGHT]))
    assert (reward[0], terminated[0], info["level"][0]) == (2, False, 2)
    assert obs[0, FOOD].sum() == 49 - 1 - 2 and obs[0, PILL].sum() == 2
    assert obs[0, GHOST].sum() == obs[0, PACMAN].sum() == 1


def test_a_ghost_costs_a_life_and_the_last_one_ends_the_game():
    env = field(lives=2)
    start = env._games["start"][0]
    place(env, pacman=(1, 1), ghost=(1, 2))
    obs, reward, terminated, _, info = env.step(np.array([RIGHT]))
    assert (reward[0], terminated[0], info["lives"][0]) == (0, False, 1)
    assert where(obs[0], PACMAN) == [[start // 9, start % 9]]
    assert where(obs[0], PILL) == [[7, 7]] and not obs[0, FOOD].any()  # what is eaten stays eaten
    place(env, pacman=(1, 1), ghost=(1, 2))
    obs, _, terminated, truncated, info = env.step(np.array([RIGHT]))
    assert terminated[0] and not truncated[0] and info["_final_obs"][0]
    assert where(info["final_obs"][0], PACMAN) == where(info["final_obs"][0], GHOST) == [[1, 2]]
    assert info["lives"][0] == 2 and obs[0, FOOD].sum() == 46  # of the next game


def test_ghosts_go_where_the_rules_say():
    env = field(20_000)
    env._games["level"] = 4  # 0.8 of the steps
    place(env, pacman=(2, 2), ghost=(5, 5))
    old = env._games.copy()
    env.step(np.zeros(20_000, int))
    moved = env._games["ghost"][:, 0] - old["ghost"][:, 0]
    shares = {step: (moved == step).mean() / 0.8 for step in (-9, -1, 9, 1)}  # up, left, down, right
    assert (moved == 0).mean() == pytest.approx(0.2, abs=0.01)
    assert shares[-9] == pytest.approx(0.475 + 0.0125, abs=0.012)  # an even draw: up and left are equally good
    assert shares[-1] == pytest.approx(0.475 + 0.0125, abs=0.012)
    assert shares[9] == pytest.approx(0.0125, abs=0.003)
    place(env, ghost=(5, 5))
    env._games["power"], env._games["heading"] = 10, 1  # to the right, so never to the left
    env.step(np.zeros(20_000, int))
    moved = env._games["ghost"][:, 0] - old["ghost"][:, 0]
    assert not (moved == -1).any()
    assert (moved == 9).mean() / 0.8 == pytest.approx(0.475 + 0.05 / 3, abs=0.012)  # away
    assert (moved == 1).mean() / 0.8 == pytest.approx(0.475 + 0.05 / 3, abs=0.012)


def test_levels_bring_ghosts_at_a_distance():
    env = MazeEnv(2000, mazes=1)
    for level, ghosts in ((1, 1), (2, 1), (3, 2), (6, 3), (7, 4), (12, 4)):
        env.reset(seed=level)
        env._games["level"], env._games["left"] = level - 1, 1
        env._planes[:, FOOD:] = 0
        env._games["ghost"] = -1
        env._planes[np.arange(2000), FOOD, env._games["pacman"]] = 1
        _, reward, _, _, info = env.step(np.zeros(2000, int))
        assert (reward == 1).all() and (info["level"] == level).all()
        cells = env._games["ghost"][:, :ghosts]
        assert (env._games["ghost"][:, ghosts:] == -1).all() and (cells >= 0).all()
        pacman = env._games["pacman"][:, None]
        assert (abs(cells // 15 - pacman // 15) + abs(cells % 15 - pacman % 15)).min() == 5
    free = np.flatnonzero(env._mazes[0] == 0)
    assert stats.chisquare(np.bincount(env._games["pacman"], minlength=225)[free]).pvalue > 1e-3


class OneRow(gymnasium.Env):
    """The first game alone, for Gymnasium's checker, which knows no vector environments."""

    metadata = MazeEnv.metadata
    render_mode = "rgb_array"

    def __init__(self) -> None:
        self.env = MazeEnv(1, render_mode="rgb_array")
        self.observation_space, self.action_space = self.env.single_observation_space, self.env.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        obs, info = self.env.reset(seed=seed, options=options)
        return obs[0], info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(np.array([action]))
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray:
        return self.env.render()[0]


@pytest.mark.filterwarnings("ignore:.*render.*:UserWarning")
def test_gymnasiums_checker_has_no_complaint():
    check_env(OneRow())


def test_observations_lie_in_their_spaces_and_games_begin_anew_in_the_same_step():
    assert MazeEnv.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    for observation in ("planes", "frames"):
        env = MazeEnv(64, observation=observation, time_limit=40)
        obs, _ = env.reset(seed=0)
        env.action_space.seed(0)
        before, ends = obs.copy(), 0
        for t in range(1, 81):
            assert obs in env.observation_space and obs.dtype == np.uint8
            new, reward, terminated, truncated, info = env.step(env.action_space.sample())
            np.testing.assert_array_equal(obs, before)  # nothing that was given is written again
            obs, before = new, new.copy()
            assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float64, bool, bool)
            assert ("final_obs" in info) == bool((over := terminated | truncated).any())
            if over.any():
                assert (info["_final_obs"] == over).all()
                assert all(o in env.single_observation_space for o in info["final_obs"][over])
                ends += over.sum()
            if t == 40:
                assert truncated.any() and not (terminated & truncated).any()
        assert ends > 64


def test_the_seed_decides_all():
    def play(seed: Any) -> np.ndarray:
        env, rng = MazeEnv(4), np.random.default_rng(0)
        seen = [env.reset(seed=seed)[0]]
        seen += [env.step(rng.integers(0, 6, 4))[0] for _ in range(200)]
        return np.stack(seen)

    np.testing.assert_array_equal(play(7), play([7, 8, 9, 10]))
    assert not np.array_equal(play(7), play(8))
    assert not np.array_equal(play(None), play(None))
    env = MazeEnv(1)
    first = env.reset(seed=3)[0]
    assert not np.array_equal(env.reset()[0], first)  # goes on


def test_wrappers_of_gymnasium_count_its_episodes():
    env = RecordEpisodeStatistics(MazeEnv(256))
    env.reset(seed=0)
    rng, returns = np.random.default_rng(0), []
    for _ in range(600):
        *_, info = env.step(rng.choice((NOOP, UP, RIGHT, LEFT, DOWN), 256))
        if "episode" in info:
            returns += info["episode"]["r"][info["_episode"]].tolist()
    assert len(returns) > 500 and 8 < np.mean(returns) < 13  # conf/game/maze.yaml has the score of random play


def test_frames_tell_what_planes_do():
    seen = [*_PALETTE[0], _PALETTE[1, 0], *_PALETTE[2, :3], *_PALETTE[3, :3]]
    # nothing, food, pill, wall, Pac-Man, and ghosts of both kinds over nothing, food and pill
    assert len({tuple(colour) for colour in seen}) == 11
    env, frames = MazeEnv(32, observation="frames"), MazeEnv(32, observation="frames", size=45)
    small, large = env.reset(seed=0)[0], frames.reset(seed=0)[0]
    rng, blues = np.random.default_rng(0), set()
    for _ in range(300):
        np.testing.assert_array_equal(large[:, 1::3, 1::3], small)
        np.testing.assert_array_equal(large, small.repeat(3, 1).repeat(3, 2))
        for plane, colour in ((WALL, _PALETTE[0, 3]), (FOOD, _PALETTE[0, 1])):
            bare = env.planes[:, plane].astype(bool) & ~env.planes[:, GHOST:].any(1)
            np.testing.assert_array_equal(bare, (small == colour).all(-1))
        games = env._games
        blue = small[np.arange(32), games["pacman"] // 15, games["pacman"] % 15, 2]
        np.testing.assert_array_equal(blue, 12 * games["power"])
        blues |= set(blue.tolist())
        actions = mixed_actions(env.planes, rng)
        small, large = env.step(actions)[0], frames.step(actions)[0]
    assert blues == set(range(0, 252, 12))


def test_players_are_as_good_as_said():
    """Against the means of 2,000 games that conf/source/maze_play.yaml names."""
    for cautious, known in ((False, 92), (True, 392)):
        env, rng = MazeEnv(100), np.random.default_rng(1)
        planes, _ = env.reset(seed=1000)
        total, running = np.zeros(100), np.ones(100, bool)
        while running.any():
            planes, reward, terminated, truncated, _ = env.step(seek(planes, cautious, rng))
            total += reward * running
            running &= ~(terminated | truncated)
        assert total.mean() == pytest.approx(known, abs=4 * total.std() / 10)


def test_it_is_compiled_where_nothing_can_be_kept(monkeypatch):
    def double(x):
        return x + x

    assert maze_rules.compiled(double)._cache.cache_path  # where it can
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "ZipCacheLocator")
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(double)
    assert maze_rules.compiled(double)(4) == 8


def test_settings_are_the_defaults():
    parameters = inspect.signature(MazeEnv).parameters
    assert {name: parameters[name].default for name in SETTINGS} == SETTINGS
    assert maze_settings({"lives": 3}) == SETTINGS | {"lives": 3}
    assert len(PLANES) == MazeEnv(1).single_observation_space.shape[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cells": 14}, "cells=14 must be odd .* give cells=15"),
        ({"cells": 7}, "give cells=9"),
        ({"size": 40}, "size=40 must be a multiple of cells=15: give size=45"),
        ({"mazes": 0}, "mazes=0"),
        ({"orientation": 8}, "orientation=8 must be 0 to 7"),
        ({"orientation": [0, 1, 2]}, "one for each"),
        ({"lives": 0}, "lives=0"),
        ({"observation": "pixels"}, "observation=pixels"),
    ],
)
def test_mistakes(settings, words):
    with pytest.raises(UserError, match=words):
        MazeEnv(2, **settings)


def test_mistakes_at_play():
    env = MazeEnv(2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(2, int))
    with pytest.raises(UserError, match="seed has the shape"):
        env.reset(seed=[1, 2, 3])
    env.reset(seed=0)
    with pytest.raises(UserError, match="actions have the shape"):
        env.step(np.zeros(3, int))
    wrong = ({"maze": 1}, "no setting maze"), ({"unseen": 1}, "true or false"), ({"lives": "2"}, "a whole number")
    for settings, words in wrong:
        with pytest.raises(UserError, match=words):
            maze_settings(settings)

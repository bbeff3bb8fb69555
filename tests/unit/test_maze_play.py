"""Logs of the maze game: episodes by seed and number, whole, with losses of lives; the card that says which mazes."""

import numpy as np
import pytest

from worldmodels.data.sources.maze_play import maze_card, maze_play
from worldmodels.envs.maze import _PALETTE, SETTINGS, maze_set, turn
from worldmodels.types import UserError


def test_episodes_are_a_function_of_seed_and_number():
    straight = list(maze_play(1500, 9, mazes=10))
    later = list(maze_play(1, 9, start_episode=len(straight) - 1, mazes=10))
    for name in ("obs", "action", "reward", "terminated", "truncated", "life_loss", "final_obs"):
        np.testing.assert_array_equal(getattr(straight[-1], name), getattr(later[0], name))
    assert straight[-1].info == later[0].info
    assert len({e.obs[0].tobytes() for e in straight}) == len(straight) > 2
    assert sum(map(len, straight)) >= 1500 > sum(map(len, straight[:-1]))


def test_a_log_holds_the_game_as_it_was_played():
    episodes = list(maze_play(3000, 1, lives=2, time_limit=400, mazes=4, orientation=6, unseen=True, size=30))
    mazes, cut = maze_set(4, unseen=True), 0
    for e in episodes:
        cut += e.truncated[-1]
        assert e.obs.shape == (len(e), 30, 30, 3) and e.final_obs.shape == (30, 30, 3)
        assert bool(e.terminated[-1]) != bool(e.truncated[-1]) and len(e) <= 400
        assert e.life_loss.sum() == 2 if e.terminated[-1] else e.life_loss.sum() < 2
        assert set(e.action.tolist()) <= {0, 2, 3, 4, 5} and set(e.reward.tolist()) <= set(range(13))
        assert e.info["return"] == e.reward.sum() == sum(b["return"] for b in e.info["behaviours"].values())
        for frame in (e.obs[0], e.obs[-1], e.final_obs):
            walls = (frame[::2, ::2] == _PALETTE[0, 3]).all(-1)
            np.testing.assert_array_equal(walls, turn(mazes[e.info["maze"]], 6))
        if e.terminated[-1]:  # it ends with a ghost where Pac-Man was: there is no yellow
            assert not (e.final_obs[..., :2] == 190).all(-1).any()
            assert (e.obs[-1][..., :2] == 190).all(-1).sum() == 4
    assert 0 < cut < len(episodes) > 5


def test_behaviours_are_of_different_quality():
    means = []
    for behaviour in ("random", "greedy", "cautious"):
        episodes = list(maze_play(1500, 0, mixture={behaviour: 1}))
        assert all(list(e.info["behaviours"]) == [behaviour] for e in episodes)
        means.append(np.mean([e.info["return"] for e in episodes]))
    assert means[0] < 30 < means[1] < means[2] / 2
    mixed = {name for e in maze_play(4000, 0) for name in e.info["behaviours"]}
    assert mixed == {"random", "greedy", "cautious"}
    taken = np.concatenate([e.action for e in maze_play(2000, 0, mixture={"cautious": 1}, lapse=1.0)])
    assert np.bincount(taken, minlength=6)[[0, 2, 3, 4, 5]].min() > 0.17 * len(taken)


def test_the_card_says_what_was_played():
    card = maze_card(3, mazes=5, orientation=2, size=30)
    assert (card["game"], card["action_set"], card["seed"]) == ("maze", [0, 2, 3, 4, 5], 3)
    assert (card["frame_skip"], card["time_limit"], card["obs"]["height"]) == (1, 3000, 30)
    assert card["dataset"]["env"] == SETTINGS | {"mazes": 5, "orientation": 2}
    assert card["policy"]["weights"] == {"random": 0.2, "greedy": 0.4, "cautious": 0.4}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cells": 14}, "give cells=15"),
        ({"size": 31}, "give size=30"),
        ({"ghosts": 2}, "no setting ghosts"),
        ({"lapse": 1.5}, "lapse=1.5"),
        ({"mixture": {"good": 1}}, "random, greedy, cautious"),
        ({"mixture": {"random": 0}}, "positive weight"),
        ({"mixture": {"random": -1}}, "positive weight"),
    ],
)
def test_mistakes_are_told_before_a_step_is_played(settings, words):
    with pytest.raises(UserError, match=words):
        maze_card(0, **settings)
    with pytest.raises(UserError, match=words):
        next(maze_play(10, 0, **settings))

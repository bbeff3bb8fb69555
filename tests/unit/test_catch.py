"""The toy game: its rules, its known returns, its frames."""

import numpy as np
import pytest

from worldmodels.data.sources.catch_play import catch_card, catch_play
from worldmodels.envs.catch import LEFT, RIGHT, CatchEnv
from worldmodels.types import UserError


def test_returns_of_random_and_best_play():
    random = [e.reward.sum() for e in catch_play(8000, 0)]
    best = [e.reward.sum() for e in catch_play(400, 0, skill=1.0)]
    assert len(random) == 2000
    assert np.mean(random) == pytest.approx(-0.6, abs=0.06)  # 2 / 5 - 1; three standard errors are 0.054
    assert set(best) == {1.0}


def test_frames_show_ball_and_paddle():
    env = CatchEnv(cells=5, size=5)
    frame = env.reset(1)
    assert frame.shape == (5, 5, 3)
    assert (frame.any(-1)).sum() == 2
    assert frame[4, 2].any()
    frame, reward, terminated = env.step(RIGHT)
    assert (frame[4, 3].any(), frame[4, 2].any()) == (True, False)
    assert frame[1, env.ball].any()
    assert (reward, terminated) == (0.0, False)
    for _ in range(3):
        frame, reward, terminated = env.step(LEFT)
    assert terminated
    assert reward == (1.0 if env.ball == 0 else -1.0)
    big = CatchEnv(cells=5, size=20).reset(1)
    np.testing.assert_array_equal(big[::4, ::4], CatchEnv(cells=5, size=5).reset(1))


def test_episodes_are_a_function_of_seed_and_number():
    straight = list(catch_play(40, 9))
    later = list(catch_play(20, 9, start_episode=5))
    for a, b in zip(straight[5:], later, strict=True):
        np.testing.assert_array_equal(a.obs, b.obs)
        np.testing.assert_array_equal(a.action, b.action)
    assert all(e.terminated.tolist() == [False] * 3 + [True] for e in straight)
    assert len({e.obs.tobytes() for e in straight}) > 5


def test_settings():
    assert catch_card(0)["game"] == "catch"
    with pytest.raises(UserError, match="multiple of cells=5"):
        list(catch_play(1, 0, size=12))


def test_contrary_play_leaves_the_ball():
    worst = [e.reward.sum() for e in catch_play(800, 0, contrary=1.0)]
    assert set(worst) == {-1.0}
    mixed = catch_card(0, skill=0.3, contrary=0.4)["policy"]
    assert mixed["contrary"] == 0.4
    assert mixed["random"] == pytest.approx(0.3)
    assert "contrary" not in catch_card(0, skill=0.3)["policy"]
    for shares in ({"skill": 0.7, "contrary": 0.4}, {"contrary": -0.1}):
        with pytest.raises(UserError, match="at most 1 together"):
            catch_card(0, **shares)
        with pytest.raises(UserError, match="at most 1 together"):
            next(catch_play(1, 0, **shares))

"""The Atari environment: both interfaces agree, ends are fresh, states can be restored, mistakes are told."""

import importlib.util
from pathlib import Path

import ale_py
import cv2
import numpy as np
import pytest
from ale_py import roms

from worldmodels.data.sources.atari_play import atari_card, atari_play, weights
from worldmodels.envs.atari import AtariEnv, Protocol, vector_env
from worldmodels.evaluation.play import OWN_GAMES
from worldmodels.types import UserError

ROOT = Path(__file__).parents[2]


def actions(n: int) -> list[int]:
    return np.random.default_rng(1).integers(18, size=n).tolist()


@pytest.mark.parametrize(
    ("game", "settings"),
    [
        ("pong", {}),
        ("pong", {"sticky_prob": 0.25, "time_limit": 150}),
        ("breakout", {"sticky_prob": 0.25}),
        ("breakout", {"max_pool": False}),
        ("breakout", {"colour": "ale_gray", "size": 84, "frame_skip": 3}),
    ],
)
def test_both_interfaces_give_the_same_frames_rewards_and_flags(game, settings):
    protocol = Protocol(game, noop_max=0, **settings)
    single, batch = AtariEnv(protocol), vector_env(protocol, 1, num_threads=1)
    frames, info = batch.reset(seed=7)
    np.testing.assert_array_equal(single.reset(7), frames[0, 0])
    rewards, lives = [], info["lives"][0]
    for action in actions(350):
        one = single.step(action)
        frames, reward, terminated, truncated, info = batch.step(np.array([action]))
        lost, lives = info["lives"][0] < lives, info["lives"][0]
        assert one[1:] == (reward[0], terminated[0], truncated[0], lost)
        rewards.append(one.reward)
        if one.terminated or one.truncated:  # the batch's last frame is stale: see the module's docstring
            break
        np.testing.assert_array_equal(one.obs, frames[0, 0])
    assert any(rewards)
    assert one.truncated == (settings.get("time_limit") == len(rewards))
    assert one.terminated == (game == "breakout")


def test_the_last_frame_of_a_game_is_the_one_that_ended_it():
    env, ale, seen = AtariEnv(Protocol("pong", noop_max=0)), ale_py.ALEInterface(), []
    ale.setFloat("repeat_action_probability", 0.0)
    ale.setInt("random_seed", 0)
    ale.loadROM(roms.get_rom_path("pong"))
    env.reset(0)
    ale.reset_game()
    for action in actions(2000):
        seen = []
        for k in range(4):
            ale.act(ale_py.Action(action))
            if k >= 2 or ale.game_over():
                seen.append(ale.getScreenRGB())
            if ale.game_over():
                break
        one = env.step(action)
        if one.terminated:
            break
    assert one.terminated
    assert one.reward == -1
    np.testing.assert_array_equal(one.obs, cv2.resize(np.max(seen, 0), (64, 64), interpolation=cv2.INTER_AREA))


def test_every_lost_life_is_reported_and_ends_nothing():
    env = AtariEnv(Protocol("breakout"))
    env.reset(3)
    lost = []
    for action in np.random.default_rng(0).choice(env.minimal_actions, 2000):
        outcome = env.step(action)
        lost.append(outcome.life_loss)
        if outcome.terminated:
            break
    assert outcome.terminated
    assert sum(lost) == 5


def test_a_seed_decides_the_start_and_a_kept_state_the_future():
    env = AtariEnv(Protocol("pong", sticky_prob=0.25))
    first = env.reset(5)
    for action in actions(30):
        env.step(action)
    state = env.clone()
    once = [env.step(a) for a in actions(40)]
    env.restore(state)
    for a, outcome in zip(actions(40), once, strict=True):
        np.testing.assert_array_equal(env.step(a).obs, outcome.obs)
    np.testing.assert_array_equal(env.reset(5), first)
    assert env.ram.shape == (128,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"game": "brekout"}, "did you mean breakout"),
        ({"game": "combat"}, "needs two players"),
        ({"game": "pong", "colour": "red"}, "rgb, ale_gray"),
        ({"game": "pong", "sticky_prob": 1.5}, "sticky_prob=1.5"),
        ({"game": "pong", "frame_skip": 0}, "frame_skip=0"),
    ],
)
def test_mistakes_are_told(settings, words):
    with pytest.raises(UserError, match=words):
        Protocol(**settings)


def test_mixtures_that_cannot_be_played_are_refused():
    assert set(weights("pong")) == {"scripted", "sticky", "random"}
    assert weights("seaquest") == pytest.approx({"sticky": 0.6, "random": 0.4})
    with pytest.raises(UserError, match="seaquest cannot be played by scripted"):
        weights("seaquest", {"scripted": 1})
    with pytest.raises(UserError, match="positive weight"):
        weights("pong", {"random": 0})


def test_episodes_do_not_depend_on_processes_or_interruptions():
    settings = {"game": "pong", "time_limit": 60}
    straight = list(atari_play(200, 1, **settings))
    assert [len(e) for e in straight] == [60] * 4
    parallel, later = list(atari_play(200, 1, processes=2, **settings)), list(atari_play(80, 1, 2, **settings))
    for expected, other in ((straight, parallel), (straight[2:], later)):
        for a, b in zip(expected, other, strict=True):
            assert a.info == b.info
            for name in ("obs", "action", "reward", "terminated", "truncated", "life_loss", "final_obs"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert straight[0].truncated[-1]
    assert not np.array_equal(straight[0].obs, straight[1].obs)


def test_the_scripted_player_returns_the_ball():
    def returned(**mixture: float) -> float:
        episodes = list(atari_play(600, 0, game="breakout", mixture=mixture, time_limit=600))
        return 1000 * sum(e.info["return"] for e in episodes) / sum(map(len, episodes))

    assert returned(scripted=1) > 2 * returned(random=1)


def test_points_fall_on_both_sides_of_pong():
    rewards = np.concatenate([e.reward for e in atari_play(1500, 0, game="pong", time_limit=1500)])
    assert (rewards > 0).sum() >= 2
    assert (rewards < 0).sum() >= 2


def test_the_card_says_what_was_played():
    card = atari_card(3, game="pong", sticky_prob=0.25, colour="ale_gray", size=84)
    assert (card["game"], card["sticky_prob"], card["seed"]) == ("pong", 0.25, 3)
    obs = {"height": 84, "width": 84, "channels": 1, "colour": "ale_gray", "resize": "area", "max_pool": True}
    assert obs.items() <= card["obs"].items()


def test_game_configs_are_what_the_script_writes():
    spec = importlib.util.spec_from_file_location("make_game_configs", ROOT / "scripts" / "make_game_configs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {p.name: p.read_text(encoding="utf-8") for p in module.GAMES.glob("*.yaml") if p.stem not in OWN_GAMES}
    assert written == module.configs()
    assert len(written) >= 60

"""A world model as Gymnasium's vector environment: its checks, its restarts, and a library of others in it."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from tests.conformance import check_policy
from tests.exact_catch import ExactCatch
from worldmodels.data.store import Store
from worldmodels.envs.catch import CatchEnv
from worldmodels.imagination import HumanPolicy, ImaginationEnv
from worldmodels.types import UserError

ACTIONS = (0, 3, 4)


@pytest.fixture
def make(catch_store: Path):
    def make(num_envs: int = 4, **settings: Any) -> ImaginationEnv:
        given = {"context": 4, "left_padding": 4, "actions": ACTIONS, "horizon": 50, "model": ExactCatch()} | settings
        return ImaginationEnv(store=Store.open(catch_store), num_envs=num_envs, **given)

    return make


class OneRow(gymnasium.Env):
    """The first row alone, for Gymnasium's checker, which knows no vector environments."""

    metadata = {"render_modes": []}
    render_mode = None

    def __init__(self, env: ImaginationEnv) -> None:
        self.env = env
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        obs, info = self.env.reset(seed=seed, options=options)
        return obs[0], info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(np.array([action]))
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


@pytest.mark.filterwarnings("ignore:.*(Box|low|rendering).*:UserWarning")
def test_gymnasiums_checker_has_no_complaint(make) -> None:
    check_env(OneRow(make(1)), skip_render_check=True)


def test_observations_lie_in_their_spaces(make) -> None:
    env = make()
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, info = env.reset(seed=0)
    env.action_space.seed(0)
    assert obs in env.observation_space and info == {}
    for _ in range(12):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert obs in env.observation_space and obs.flags["OWNDATA"]
        assert (reward.shape, reward.dtype) == ((4,), np.float64)
        assert terminated.dtype == truncated.dtype == bool and terminated.shape == truncated.shape == (4,)


def place(frame: np.ndarray) -> CatchEnv:
    """The real game in the state that a frame (3, 20, 20) shows."""
    env, state = CatchEnv(), ExactCatch().start(type("Context", (), {"obs": torch.from_numpy(frame)[None, None]}))
    env.row, env.ball, env.paddle = (int(state[k]) for k in ("row", "ball", "paddle"))
    return env


def test_rows_play_the_real_game_and_begin_anew_in_the_step_that_ends_them(make) -> None:
    env = make(6)
    obs, _ = env.reset(seed=1)
    real, ended, rng = [place(frame) for frame in obs], 0, np.random.default_rng(0)
    for _ in range(20):
        actions = rng.integers(3, size=6)
        obs, reward, terminated, truncated, info = env.step(actions)
        for k, game in enumerate(real):
            frame, points, over = game.step(ACTIONS[actions[k]])
            assert (reward[k], terminated[k]) == (points, over)
            last = info["final_obs"][k] if over else obs[k]
            np.testing.assert_array_equal(last, frame.transpose(2, 0, 1))
            if over:
                assert info["_final_obs"][k]
                real[k], ended = place(obs[k]), ended + 1
                assert real[k].row < 4
    assert ended > 20
    assert not truncated.any()


def test_rows_are_cut_at_the_horizon_and_where_the_model_says(make) -> None:
    env = make(8, horizon=2)
    env.reset(seed=0)
    ages = np.zeros(8)
    for _ in range(9):
        _, _, terminated, truncated, info = env.step(np.zeros(8, int))
        ages += 1
        np.testing.assert_array_equal(truncated, (ages == 2) & ~terminated)
        ages[terminated | truncated] = 0
    env = make(8, model=ExactCatch(truncate_row=3))
    env.reset(seed=0)
    flags = np.stack([env.step(np.zeros(8, int))[2:4] for _ in range(6)])
    assert flags[:, 1].any() and not (flags[:, 0] & flags[:, 1]).any()


def trajectory(env: ImaginationEnv, seed: int | None, global_seed: int) -> list[np.ndarray]:
    torch.manual_seed(global_seed)
    seen = [env.reset(seed=seed)[0]]
    return seen + [env.step(np.array([k % 3] * 4))[0] for k in range(10)]


def test_the_seed_decides_all(make) -> None:
    first, again, other = (trajectory(make(), *seeds) for seeds in ((1, 1), (1, 2), (2, 1)))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    env = make()
    goes_on = trajectory(env, 1, 1), trajectory(env, None, 1)
    assert not all(np.array_equal(a, b) for a, b in zip(*goes_on, strict=True))


def test_wrappers_of_gymnasium_count_its_episodes(make) -> None:
    env = RecordEpisodeStatistics(make(5))
    env.reset(seed=0)
    returns = []
    for _ in range(30):
        *_, info = env.step(np.zeros(5, int))
        if "episode" in info:
            returns += info["episode"]["r"][info["_episode"]].tolist()
    assert len(returns) > 30 and set(returns) == {-1.0, 1.0}


def test_starts_may_not_lie_before_the_episode_unless_asked(make) -> None:
    env = make(64, context=2, left_padding=0)
    rows = {place(frame).row for frame in env.reset(seed=0)[0]}
    assert rows == {2, 3}
    rows = {place(frame).row for frame in make(64).reset(seed=0)[0]}
    assert rows == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"horizon": 0}, "horizon=0"),
        ({"left_padding": 5}, "left_padding=5"),
        ({"context": 4, "left_padding": 0}, "more than 4"),
    ],
)
def test_mistakes(make, settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(**settings)
    with pytest.raises(gymnasium.error.ResetNeeded):
        make().step(np.zeros(4, int))


def test_a_person_may_press_only_what_counts() -> None:
    pressed = iter([3, 17, 0, 0, 0, 0, 0, 0, 0])
    policy = HumanPolicy(lambda: next(pressed), actions=ACTIONS)
    frames = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert policy.act(frames, policy.start(2))[0].tolist() == [3, 3]
    assert policy.act(frames, policy.start(2))[0].tolist() == [0, 0]
    check_policy(policy, frames)


def test_ppo_of_stable_baselines_learns_in_it(make) -> None:
    base = pytest.importorskip(
        "stable_baselines3", reason="Stable-Baselines3 is missing: pip install worldmodels[ppo]"
    ).common.vec_env.base_vec_env
    from stable_baselines3 import PPO

    class Adapter(base.VecEnv):
        """Its own interface over a vector environment of Gymnasium."""

        def __init__(self, env: ImaginationEnv) -> None:
            self.env = env
            super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

        def reset(self) -> np.ndarray:
            return self.env.reset(seed=0)[0]

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
            obs, reward, terminated, truncated, info = self.env.step(self.actions)
            infos: list[dict] = [{"TimeLimit.truncated": bool(t)} for t in truncated]
            for k in np.flatnonzero(terminated | truncated):
                infos[k]["terminal_observation"] = info["final_obs"][k]
            return obs, reward.astype(np.float32), terminated | truncated, infos

        def close(self) -> None:
            self.env.close()

        def get_attr(self, name: str, indices: Any = None) -> list:
            return [getattr(self.env, name)] * self.num_envs

        def set_attr(self, *_: Any) -> None: ...

        def env_method(self, *_: Any, **__: Any) -> list:
            return []

        def env_is_wrapped(self, *_: Any) -> list[bool]:
            return [False] * self.num_envs

    def mean_return(model: Any) -> float:
        env = make(64)
        obs, total, games = env.reset(seed=9)[0], 0.0, 0
        for _ in range(12):
            obs, reward, terminated, *_ = env.step(model.predict(obs, deterministic=False)[0])
            total, games = total + reward.sum(), games + terminated.sum()
        return total / games

    torch.set_num_threads(1)
    ppo = PPO("MlpPolicy", Adapter(make(32)), n_steps=16, batch_size=128, seed=0, device="cpu", learning_rate=1e-3)
    before = mean_return(ppo)
    ppo.learn(20 * 512)
    assert mean_return(ppo) > before + 0.5

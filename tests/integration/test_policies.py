"""Policies learn the toy game from logs and from dreams, and are told from world models."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import QUICK
from worldmodels.data.sources.catch_play import catch_card, catch_play
from worldmodels.data.store import Store
from worldmodels.envs.catch import CatchEnv
from worldmodels.learners.policy import load_policy
from worldmodels.types import Policy

RUN = Callable[..., tuple[int, str, str]]
RANDOM = -0.6


def write_store(path: Path, skill: float, steps: int = 2000) -> Path:
    with Store.create(path, catch_card(0, skill)) as store:
        for episode in catch_play(steps, 0, skill=skill):
            store.append(episode)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 episodes of a player that is right in half of its steps."""
    return write_store(tmp_path_factory.mktemp("stores") / "mixed", skill=0.5)


def catch_return(policy: Policy, games: int = 200) -> float:
    """Mean return of whole games of the real Catch."""
    envs = [CatchEnv() for _ in range(games)]
    frames = np.stack([env.reset(10_000 + k) for k, env in enumerate(envs)])
    state, generator, total = policy.start(games), torch.Generator().manual_seed(0), 0.0
    for _ in range(4):
        action, state = policy.act(torch.from_numpy(frames).permute(0, 3, 1, 2), state, generator)
        steps = [env.step(int(a)) for env, a in zip(envs, action, strict=True)]
        frames, total = np.stack([s[0] for s in steps]), total + sum(s[1] for s in steps)
    return total / games


@pytest.fixture
def train(in_process: RUN, tmp_path: Path) -> Callable[..., tuple[Policy, dict]]:
    def run(name: str, store: Path, *settings: str, out: str = "run") -> tuple[Policy, dict]:
        folder = tmp_path / out
        quick = [q for q in QUICK if "windows" not in q]
        code, _, err = in_process("train", f"experiment={name}", f"store={store}", f"out={folder}", *quick, *settings)
        assert code == 0, err
        stored = torch.load(folder / "best.ckpt", weights_only=True)
        policy, card = load_policy(folder / "best.ckpt")
        assert card == Store.open(store).card == stored["hyper_parameters"]["card"]
        assert policy.actions == [0, 3, 4]
        return policy, json.loads((folder / "metrics.json").read_text())

    return run


def test_the_clone_of_a_good_player_is_good(train: Callable[..., tuple[Policy, dict]], tmp_path: Path) -> None:
    store = write_store(tmp_path / "good", skill=0.95)
    policy, metrics = train("catch_cloning", store)
    assert metrics["best_log_likelihood"] > -0.4  # by chance -1.1
    assert metrics["final"]["accuracy"] > 0.85
    assert catch_return(policy) > 0.5 > RANDOM + 1


def test_the_clone_of_the_best_episodes_or_rows_is_better_than_that_of_all(
    train: Callable[..., tuple[Policy, dict]], mixed: Path
) -> None:
    behaviour = np.mean([Store.open(mixed).episode_info(i)["return"] for i in range(500)])
    everything = catch_return(train("catch_cloning", mixed, out="all")[0])
    best = catch_return(train("catch_cloning", mixed, "data.best_share=0.4", out="best")[0])
    weighted = catch_return(train("catch_cloning", mixed, "data.weights.return=0.2", out="weighted")[0])
    rows = catch_return(train("catch_cloning", mixed, "learner.advantage=0.3", out="rows")[0])
    print(behaviour, everything, best, weighted, rows)
    assert abs(everything - behaviour) < 0.2
    assert min(best, weighted, rows) > everything + 0.1

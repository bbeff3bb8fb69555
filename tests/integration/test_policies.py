"""Policies learn the toy game from logs and from dreams, and are told from world models."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import QUICK, ROOT
from tests.integration.test_resume import same
from worldmodels.config import plain, sized
from worldmodels.data.sources.catch_play import catch_card, catch_play
from worldmodels.data.store import Store
from worldmodels.envs.catch import CatchEnv
from worldmodels.learners.fit import fit
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


def behaviour(store: Path) -> float:
    opened = Store.open(store)
    return float(np.mean([opened.episode_info(i)["return"] for i in range(len(opened.lengths))]))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "settings",
    [["data.best_share=0.4"], ["learner.advantage=0.3"], ["data.ahead=4", "learner.least_ahead=1"]],
    ids=["best episodes", "best rows", "rows before a point"],
)
def test_the_clone_of_what_turned_out_well_beats_the_behaviour(
    train: Callable[..., tuple[Policy, dict]], mixed: Path, settings: list[str]
) -> None:
    everything = catch_return(train("catch_cloning", mixed, out="all")[0])
    assert abs(everything - behaviour(mixed)) < 0.25
    assert catch_return(train("catch_cloning", mixed, *settings, out="best")[0]) > everything + 0.15


BINS = ["head@model.head=hl_gauss", "model.head.low=-2", "model.head.high=2", "trainer.max_steps=1500"]


@pytest.mark.parametrize(
    "head", [["head@model.head=mse"], pytest.param(BINS, marks=pytest.mark.exhaustive)], ids=["mse", "hl_gauss"]
)
def test_offline_q_learning_beats_the_behaviour(
    train: Callable[..., tuple[Policy, dict]], mixed: Path, head: list[str]
) -> None:
    policy, metrics = train("catch_offline_q", mixed, *head)
    assert metrics["best_step"] == metrics["steps"]
    assert catch_return(policy) > behaviour(mixed) + 0.3


def write_world_model(mixed: Path, folder: Path, steps: int) -> Path:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        places = ["experiment=catch", f"store={mixed}", f"out={folder}", f"trainer.max_steps={steps}"]
        settings = plain(compose("train", [*places, *QUICK]))
    fit({**settings, "model": sized(settings["model"])}, folder)
    return folder / "best.ckpt"


@pytest.fixture(scope="module")
def new_model(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world model of Catch that knows next to nothing."""
    return write_world_model(mixed, tmp_path_factory.mktemp("models") / "new", 2)


@pytest.mark.exhaustive
def test_dreams_make_a_policy_better_in_the_real_game(
    train: Callable[..., tuple[Policy, dict]], mixed: Path, tmp_path: Path
) -> None:
    # After 600 steps it knows when a ball lands, and not yet whether it is caught.
    model = f"learner.world_model={write_world_model(mixed, tmp_path / 'model', 1500)}"
    policy, metrics = train("catch_actor_critic", mixed, model, out="scratch")
    assert metrics["best_imagined_return"] > 0.2
    assert catch_return(policy) > RANDOM + 0.5
    clone = catch_return(train("catch_cloning", mixed, "head@model.head=mse", out="clone")[0])
    start = f"learner.policy={tmp_path / 'clone' / 'best.ckpt'}"
    better, _ = train("catch_actor_critic", mixed, model, start, "learner.lr=1e-3", out="dream")
    assert catch_return(better) > clone + 0.2


@pytest.mark.parametrize("name", ["catch_cloning", "catch_offline_q", "catch_actor_critic"])
def test_a_policy_that_is_resumed_is_the_same_bit_for_bit(
    name: str, in_process: RUN, mixed: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    settings = [f"experiment={name}", f"store={mixed}", *QUICK, "learner.schedule=constant", "callbacks.last.every=5"]
    if name == "catch_offline_q":
        settings += ["learner.target_every=5"]
    if name == "catch_actor_critic":
        settings += [
            f"learner.world_model={request.getfixturevalue('new_model')}",
            "learner.reuse=3",
            "learner.real_weight=0.1",
        ]
    for out, stops in (("straight", [10]), ("broken", [7, 10])):
        for steps in stops:
            code, _, err = in_process("train", *settings, f"out={tmp_path / out}", f"trainer.max_steps={steps}")
            assert code == 0, err
    a, b = (torch.load(tmp_path / out / "last.ckpt", weights_only=True) for out in ("straight", "broken"))
    parts = {"state_dict", "current_model_state", "averaging_state", "optimizer_states", "target", "rollout"}
    for part in parts & a.keys():
        same(a[part], b[part], part)
    assert ("target" in a, "rollout" in a) == (name == "catch_offline_q", name == "catch_actor_critic")


def test_mistakes_end_in_one_sentence(in_process: RUN, mixed: Path, new_model: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with Store.create(large, catch_card(0, cells=4, size=32)) as store:
        for episode in catch_play(60, 0, cells=4, size=32):
            store.append(episode)
    lazy = tmp_path / "lazy"
    with Store.create(lazy, catch_card(0)) as store:
        for episode in catch_play(60, 0):
            store.append(replace(episode, action=np.zeros_like(episode.action)))
    settings = [*QUICK, "trainer.max_steps=2"]
    code, _, err = in_process(
        "train", "experiment=catch_cloning", f"store={lazy}", f"out={tmp_path / 'clone'}", *settings
    )
    assert code == 0, err
    clone = tmp_path / "clone" / "best.ckpt"
    dream = ["experiment=catch_actor_critic", f"store={mixed}", f"learner.world_model={new_model}"]
    mistakes = [
        (["experiment=catch_actor_critic", f"store={mixed}"], ["learner.world_model"]),
        ([*dream, f"learner.world_model={clone}"], ["holds a policy and no world model"]),
        ([*dream, f"store={large}", "data.validation.length=2"], ["obs.height=32", "world model", "20"]),
        ([*dream, f"learner.policy={new_model}"], ["holds a world model and no policy"]),
        ([*dream, f"learner.policy={clone}", "head@model.head=hl_gauss"], ["takes the actions [0]", "[0, 3, 4]"]),
        ([*dream, "data.validation.length=5"], ["data.validation.length=5", "4 transitions"]),
        ([*dream, "data.left_padding=0"], ["data.length less data.left_padding=5", "4 transitions", "train"]),
        ([*dream, "learner.spare=1"], ["spare=1"]),
        (["experiment=catch_cloning", f"store={mixed}", "learner.burn_in=4"], ["data.length=4", "learner.burn_in=4"]),
        (["experiment=catch_cloning", f"store={mixed}", "data.best_share=0"], ["data.best_share=0", "above 0"]),
        (["experiment=catch_cloning", f"store={mixed}", "model.head.bins=1"], ["bins=1"]),
        (["experiment=catch_cloning", f"store={mixed}", "learner.least_ahead=0"], ["least_ahead", "give data.ahead=N"]),
        (["experiment=catch_cloning", f"store={mixed}", "learner.burn_in=-1"], ["learner.burn_in=-1", "at least 0"]),
        (["experiment=catch_cloning", f"store={mixed}", "learner.actions=3"], ["learner.actions=3 must be a list"]),
        (
            ["experiment=catch_cloning", f"store={mixed}", "learner.actions=[2]"],
            ["none of the log of catch", "[0, 3, 4]"],
        ),
        (["experiment=catch_offline_q", f"store={mixed}", "learner.steps_ahead=1.5"], ["learner.steps_ahead=1.5"]),
        (["learner=cloning", "model=diffusion", f"store={mixed}"], ["is no policy", "model=actor_critic"]),
    ]
    for given, parts in mistakes:
        out = tmp_path / "out"
        code, _, err = in_process("train", *given, f"out={out}", *settings)
        assert (code, err.count("\n")) == (2, 1), err
        for part in parts:
            assert part in err
        assert not list(out.glob("*.ckpt"))
    code, _, err = in_process("train", *dream, "head@model.head=hl_gauss", f"out={clone.parent}", *settings)
    assert code == 2 and "CloningLearner and not of worldmodels.learners.actor_critic.ActorCriticLearner" in err
    code, _, err = in_process("imagine", f"checkpoint={clone}", f"store={mixed}", f"out={tmp_path / 'x'}")
    assert code == 2 and "holds a policy and no world model" in err
    code, _, err = in_process("plan", "experiment=catch_cloning")
    assert code == 2 and "depends on its log: give store=" in err
    for command in ("train", "plan"):
        code, _, err = in_process(command, "learner=policy", f"store={mixed}", f"out={tmp_path / 'x'}", *settings)
        assert code == 2 and "learner=policy is what the learners of policies share" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["catch_cloning", "catch_offline_q", "catch_actor_critic"])
def test_what_a_policy_costs_is_told(name: str, in_process: RUN, mixed: Path, new_model: Path, tmp_path: Path) -> None:
    teacher = [f"learner.world_model={new_model}"] if name == "catch_actor_critic" else []
    settings = [*teacher, *QUICK, "trainer.max_steps=1000", "trainer.val_check_interval=500"]
    code, _, err = in_process("plan", f"experiment={name}", f"store={mixed}", f"out={tmp_path}", *settings)
    assert code == 0, err
    plan = json.loads((tmp_path / "metrics.json").read_text())
    assert plan["seconds"] >= plan["training_seconds"] > 0
    assert plan["training_seconds"] == pytest.approx(1000 * plan["seconds_a_step"], abs=1)
    assert plan["parameters"] > 1000
    assert not list(tmp_path.glob("*.ckpt"))

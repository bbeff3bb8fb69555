"""The online loop: what is played is recorded as it was, killed runs go on to the same end, and fresh play is fresh."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from tests.conftest import ROOT, write_catch
from worldmodels.config import plain, sized
from worldmodels.data.reanalyse import ReanalyseDataModule
from worldmodels.data.sources.catch_play import catch_card
from worldmodels.data.store import Store
from worldmodels.data.targets import COLUMNS, STEP, about_targets
from worldmodels.envs.catch import CatchEnv
from worldmodels.envs.maze import MazeEnv
from worldmodels.evaluation.play import drawn_seed, open_games
from worldmodels.evaluation.protocols import Rules
from worldmodels.evaluation.recording import Remembering, record
from worldmodels.imagination import RandomPolicy
from worldmodels.learners.acting import as_policy
from worldmodels.learners.muzero import MuZeroLearner, load_muzero
from worldmodels.learners.online import online
from worldmodels.types import UserError

RULES = Rules("store", 1, 0.0, False, 0, 4, "minimal")
SMALL = [
    *("experiment=catch_muzero", "trainer.accelerator=cpu", "store=null", "learner.search.num_simulations=3"),
    *("data.batch_size=8", "data.validation.windows=4", "round_steps=3", "trainer.max_steps=9", "slots=4"),
    *("data.fraction=0.5", "learner.target_every=2", "callbacks.last.every=2", "logger=csv"),
    "model.sizes.tiny={representation:{layers:[conv 4]},readout:{channels:2,width:8}}",
]


def run(out: Path, *changes: str, card: Any = None) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("online", [*SMALL, f"out={out}", *changes])
    del cfg.game, cfg.source
    settings = plain(cfg)
    return online(settings | {"model": sized(settings["model"])}, card or catch_card(0), out)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("online") / "straight"
    return out, run(out)


def contents(out: Path) -> list[Any]:
    """All that was played and found, with the numbers of its rows."""
    store = Store.open(out / "play")
    episodes = [store.episode(k) for k in range(len(store.lengths))]
    sides = [store.side(name, f"play-{len(episodes)}").filled(-1).tolist() for name in (*COLUMNS.values(), STEP)]
    return [[e.obs.tolist(), e.action.tolist(), e.reward.tolist(), dict(e.info)] for e in episodes] + sides


def test_rounds_of_play_and_training(straight: tuple[Path, dict[str, Any]]) -> None:
    out, figures = straight
    store = Store.open(out / "play")
    assert store.card["source"] == "online"
    assert (store.card["reward"]["clipped"], store.card["game"], store.card["licence"]) == (False, "catch", "MIT")
    assert figures["steps"] == 9
    # a round of 3 steps with 8 windows, half of them fresh, needs 12 steps of play, and 4 games have 16
    assert [(p["round"], p["behaviour"], p["step"], p["play_steps"]) for p in figures["curve"]] == [
        (0, "random", None, 16),
        (1, "search", 3, 32),
        (2, "search", 6, 48),
    ]
    returns = [store.episode_info(k)["return"] for k in range(4, 8)]
    assert figures["curve"][1]["mean_return"] == np.mean(returns)
    info = store.episode_info(5)["info"]
    assert (info["episode"], info["step"], info["search"]["num_simulations"]) == (5, 3, 3)
    version = "play-12"
    assert [p.name for p in (out / "play" / "side" / STEP).iterdir() if p.is_dir()] == [version]
    value, step = store.side(COLUMNS["value"], version), store.side(STEP, version)
    assert np.ma.getmaskarray(value).tolist() == [True] * 16 + [False] * 32
    assert step[16:].tolist() == [3] * 16 + [6] * 16
    np.testing.assert_allclose(store.side(COLUMNS["policy"], version)[16:].sum(1), 1, atol=1e-5)
    assert store.side_about(COLUMNS["value"], version)["fresh"] == [8, 12]
    assert json.loads((out / "metrics.json").read_text()) == figures


def test_chance_plays_until_searches_begin(tmp_path: Path) -> None:
    figures = run(tmp_path / "run", "data.search_from=4")
    played = [(p["behaviour"], p["step"]) for p in figures["curve"]]
    assert played == [("random", None), ("random", None), ("search", 6)]
    step = Store.open(tmp_path / "run" / "play").side(STEP, "play-12")
    assert np.ma.getmaskarray(step).tolist() == [True] * 32 + [False] * 16 and step[32:].tolist() == [6] * 16


def test_play_grows_colder(tmp_path: Path) -> None:
    run(tmp_path, "planner@learner.search=puct", "learner.row_noise=false", "temperatures={4:0.5,0:1.0,6:0.25}")
    store = Store.open(tmp_path / "play")
    infos = [store.episode_info(k)["info"] for k in range(len(store.lengths))]
    assert {i["step"]: i["search"]["temperature"] for i in infos if "step" in i} == {3: 1.0, 6: 0.25}


def test_finished_runs_are_left_alone(straight: tuple[Path, dict[str, Any]]) -> None:
    out, figures = straight
    before = (out / "last.ckpt").stat().st_mtime_ns
    assert run(out) == figures
    assert (out / "last.ckpt").stat().st_mtime_ns == before


@pytest.mark.parametrize(("where", "when"), [("append", 6), ("training", 5), ("search", 7)])
def test_killed_runs_go_on_to_the_same_end(
    where: str, when: int, straight: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = {
        "append": (Store, "append"),
        "training": (MuZeroLearner, "training_step"),
        "search": (Remembering, "__call__"),
    }[where]
    calls, real = [], getattr(owner, name)

    def interrupted(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    figures = run(tmp_path)
    out, expected = straight
    assert figures["weights_sha256_by_rank"] == expected["weights_sha256_by_rank"]
    assert figures["curve"] == expected["curve"]
    assert contents(tmp_path) == contents(out)


def test_to_begin_again_forgets_the_play(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=3")
    with pytest.raises(UserError, match="begun with fraction=0.5 and cannot go on with 0.25"):
        run(tmp_path, "data.fraction=0.25")
    figures = run(tmp_path, "trainer.max_steps=3", "data.fraction=0.25", "resume=never")
    assert [(p["behaviour"], p["play_steps"]) for p in figures["curve"]] == [("random", 32)]  # 18 steps, 8 games


def test_a_log_comes_first(tmp_path: Path) -> None:
    """Its first round plays nothing; and all of it is searched again where the fraction is 1."""
    log = write_catch(tmp_path / "log", 120)
    figures = run(tmp_path / "half", f"store={log}", "trainer.max_steps=6")
    assert [(p["round"], p["behaviour"], p["step"]) for p in figures["curve"]] == [(1, "search", 3)]
    figures = run(tmp_path / "whole", f"store={log}", "trainer.max_steps=6", "data.fraction=1.0")
    assert figures["curve"] == []
    assert not (tmp_path / "whole" / "play").exists()
    assert figures["steps"] == 6


@pytest.mark.parametrize(("fraction", "searched"), [(0.75, [12]), (0.71875, [11, 12])])
def test_windows_that_are_not_searched_again_are_fresh(tmp_path: Path, fraction: float, searched: list[int]) -> None:
    store = Store.open(write_catch(tmp_path / "catch", 120), write=True)
    with store:
        store.seal()
    rows = store.offsets[-1]
    for name, array in ((STEP, np.full(rows, 4)), (COLUMNS["value"], np.arange(rows, dtype=np.float32))):
        store.write_side(name, "play", range(rows), array, about_targets(store, "play", [0, 3, 4], fresh=[25, 30]))
    windows = {"batch_size": 16, "length": 8, "left_padding": 1, "right_padding": 6}
    other = write_catch(tmp_path / "other", 80)
    data = ReanalyseDataModule([str(other), str(tmp_path / "catch")], fraction, [None, "play"], **windows)
    batches = iter(data.train_dataloader())
    moved = {20 + k for k in range(25, 30)} & set(data.store.splits["train"].tolist())
    seen = set()
    for k in range(6):
        starts = next(batches).side["starts"].numpy()
        order, count = data._order(16, 0, k), searched[k % len(searched)]
        seen |= set(starts[order[count:], 0].tolist())
        assert not set(starts[order[:count], 0].tolist()) <= moved
    assert seen == moved


def test_a_game_is_recorded_as_it_was_played(straight: tuple[Path, dict[str, Any]]) -> None:
    model, given = load_muzero(straight[0] / "last.ckpt")
    policy = as_policy(model, given["search"], noise=True)
    games = []
    for _ in range(2):
        search = Remembering(policy.search)
        acting = as_policy(model, given["search"], noise=True)
        object.__setattr__(acting, "search", search)
        with open_games("catch", RULES, 3, 20, "rgb") as env:
            games.append(record(acting, env, "catch", range(4, 7), 9, "cpu", {"round": 2}, search))
    for game, again, number in zip(*games, range(4, 7), strict=True):
        episode, real = game.episode, CatchEnv()
        frames, rewards = [real.reset(drawn_seed(9, 2, number))], []
        for action in episode.action:
            frame, reward, over = real.step(int(action))
            frames.append(frame)
            rewards.append(reward)
        assert over
        assert np.array_equal(np.stack(frames[:-1]), episode.obs)
        assert np.array_equal(frames[-1], episode.final_obs)
        assert episode.reward.tolist() == rewards
        assert episode.terminated.tolist() == [False] * 3 + [True]
        assert episode.info == {"round": 2, "episode": number, "seed": 9, "return": sum(rewards)}
        assert game.policy.shape == (4, 3)
        assert np.array_equal(game.policy, again.policy)
        assert np.array_equal(game.value, again.value)


def test_a_maze_shows_its_last_frame_and_lost_lives() -> None:
    rules = Rules("store", 1, 0.0, False, 0, 60, "minimal")
    env = {"cells": 9, "lives": 2}
    with open_games("maze", rules, 4, 9, "rgb", env) as games:
        played = record(RandomPolicy([0, 2, 3, 4, 5]), games, "maze", range(4), 0, "cpu", {})
    for number, game in enumerate(played):
        episode = game.episode
        assert game.policy is None
        real = MazeEnv(1, size=9, time_limit=60, observation="frames", cells=9, lives=2)
        real.reset(seed=np.array([drawn_seed(0, 2, number)]))
        for k, action in enumerate(episode.action):
            frame, _, terminated, truncated, info = real.step(np.array([action]))
            if k + 1 < len(episode):
                assert np.array_equal(frame[0], episode.obs[k + 1])
        assert np.array_equal(info["final_obs"][0], episode.final_obs)
        assert (terminated[0], truncated[0]) == (episode.terminated[-1], episode.truncated[-1])
        assert episode.life_loss.sum() == 2 if terminated[0] else episode.life_loss.sum() < 2
    assert any(game.episode.terminated[-1] for game in played)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["data.fraction=1.0"], "data.fraction=1.0 nothing is played"),
        (["data.fraction=1.5"], "data.fraction=1.5 must be from 0"),
        (["data.search_from=-1"], "data.search_from=-1 must be a whole number"),
        (["learner.search=null"], "give learner=muzero"),
        (["trainer.devices=2"], "trainer.devices=1"),
        (["data.transform.size=10"], "leave data.transform out"),
        (["data.version=newest"], "give that as store="),
        (["learner.actions=[0,2]"], "may take UP"),
        (["store=nowhere"], "there is no store at nowhere"),
        (["resume=maybe"], "choose auto or never"),
        (["temperatures={0:1.0}"], "are of no use to worldmodels.planning.planners.gumbel, which"),
        (["temperatures={5:1.0}", "planner@learner.search=puct"], "the first of them 0, e.g."),
        (["temperatures={0:-1.0}", "planner@learner.search=puct"], "a number of at least 0"),
        (["learner.search.max_considered=4"], "max_considered=4 is more than the 3 legal actions"),
    ],
)
def test_mistakes(changes: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        run(tmp_path / "out", *changes)
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_command_is_not_gone_on_with(straight: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes((straight[0] / "last.ckpt").read_bytes())
    with pytest.raises(UserError, match="holds a run of `worldmodels train`"):
        run(tmp_path)


def test_the_command(in_process: Any, tmp_path: Path) -> None:
    code, _, err = in_process("online", "experiment=catch_muzero", "store=null", f"out={tmp_path}")
    assert (code, err.count("\n")) == (2, 1)
    assert "the game is missing; give it as game=" in err
    code, out, _ = in_process("online", *SMALL, "game=catch", f"out={tmp_path}", "trainer.max_steps=3")
    assert code == 0
    assert "round 1/1: 16 steps of play, the newest 4 games by random play with a mean return of" in out
    assert "round 1/1 done, step 3/3  ETA 0:00" in out
    assert out.endswith(f"{tmp_path}\n")


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_the_loop_learns(in_process: Any, tmp_path: Path) -> None:
    """From random play alone, to more balls caught than missed."""
    settings = ["experiment=catch_muzero", "game=catch", "store=null", "trainer.max_steps=2600", "round_steps=200"]
    code, *_ = in_process("online", *settings, "learner.target_every=100", f"out={tmp_path}", "trainer.accelerator=cpu")
    curve = json.loads((tmp_path / "metrics.json").read_text())["curve"]
    assert code == 0
    assert curve[0]["mean_return"] < -0.5
    assert curve[-1]["mean_return"] > 0.2

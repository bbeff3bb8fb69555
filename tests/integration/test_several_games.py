"""One model of two games by the program itself, whose rewards are 100 times apart and whose actions are others."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import QUICK
from tests.integration.test_resume import same
from worldmodels.data.sources.catch_play import catch_card, catch_play
from worldmodels.data.store import Store
from worldmodels.learners.policy import load_policy
from worldmodels.learners.world_model import load_learner
from worldmodels.portable.folder import load_model, read_starts
from worldmodels.types import UserError

RUN = Callable[..., tuple[int, str, str]]
BALLS = {"balls": 4, "at_most": 0.6}
MOVES = np.arange(18, dtype=np.uint8)
MOVES[[3, 4]] = 2, 5
WORLD = [*QUICK, "experiment=catch", "learner.schedule=constant", "model.games={unknown: 0.2}", "data.weights.game=0"]
WORLD += ["trainer.max_steps=6", "trainer.val_check_interval=3", "callbacks.last.every=2", "data.batch_size=4"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Catch, and what calls itself Freeway: up and down in place of right and left, and 100 points a ball."""
    folder = tmp_path_factory.mktemp("stores")
    with Store.create(folder / "catch", catch_card(0, 0.45, **BALLS)) as store:
        for episode in catch_play(640, 0, skill=0.45, **BALLS):
            store.append(episode)
    card = catch_card(1, 0.45, **BALLS) | {"game": "freeway", "action_set": [0, 2, 5]}
    with Store.create(folder / "freeway", card) as store:
        for episode in catch_play(320, 1, skill=0.45, **BALLS):
            store.append(replace(episode, action=MOVES[episode.action], reward=100 * episode.reward))
    return folder / "catch", folder / "freeway"


def both(stores: tuple[Path, Path]) -> str:
    return f"store=[{stores[0]},{stores[1]}]"


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def is_mean_over_games(final: dict, name: str) -> None:
    games = [final[f"{game}/{name}"] for game in ("catch", "freeway")]
    assert final[name] == pytest.approx(np.mean(games), rel=1e-5)


def test_a_world_model_of_two_games(ok, stores: tuple[Path, Path], tmp_path: Path) -> None:
    run, turned = tmp_path / "run", (stores[1], stores[0])
    ok("train", *WORLD, both(stores), f"out={run}")
    final = metrics(run)["final"]
    for name in ("rollout_psnr_changed", "psnr_changed_1", "psnr_changed_2"):
        is_mean_over_games(final, name)
        assert final[f"catch/{name}"] != final[f"freeway/{name}"]
    assert metrics(run)["best_rollout_psnr_changed_db"] >= final["rollout_psnr_changed"] - 1e-6
    with (run / "metrics.csv").open() as file:
        assert {"val/catch/psnr_changed_1", "val/freeway/rollout_psnr_changed"} <= set(next(csv.reader(file)))

    learner = load_learner(run / "best.ckpt")
    assert learner.hparams["model"]["games"] == {"actions": {"catch": [0, 3, 4], "freeway": [0, 2, 5]}, "unknown": 0.2}
    ok("train", *WORLD, both(turned), f"out={tmp_path / 'turned'}")
    other = load_learner(tmp_path / "turned" / "best.ckpt").model
    for path in stores:  # what a game is called by does not hang on the place of its store
        segment = Store.open(path).read([[0, 0], [1, 0]], 5)
        for model in (learner.model, other):
            assert set(model.start(segment)["game"].tolist()) == {1 if path == stores[0] else 2}
    # in its own store alone and in both, in whatever order, a game is judged alike
    judge = ["device=cpu", "burn_in=4", "horizons=[1,2]", "windows=5", "reward_rows=9", "spread.windows=0"]
    judge += ["other_actions.windows=2", "other_actions.steps=2", f"checkpoint={run / 'best.ckpt'}"]
    ok("quality", *judge, both(turned), f"out={tmp_path / 'judged'}")
    ok("quality", *judge, f"store={stores[1]}", f"out={tmp_path / 'alone'}")
    judged, alone = metrics(tmp_path / "judged"), metrics(tmp_path / "alone")
    assert judged["stores"][str(stores[1])]["psnr_db"] == alone["psnr_db"]
    assert judged["games"]["freeway"]["psnr_db"] == alone["psnr_db"] != judged["games"]["catch"]["psnr_db"]
    ok("imagine", f"checkpoint={run / 'best.ckpt'}", f"store={stores[1]}", f"out={tmp_path / 'dreams'}", "device=cpu",
       "burn_in=2", "horizon=3", "rollouts=3", "shown=1")  # fmt: skip
    dreamed = Store.open(tmp_path / "dreams" / "store")
    assert dreamed.card["game"] == "freeway" and set(dreamed.column("action")) <= {0, 2, 5}


def test_a_run_that_is_cut_short_goes_on_bit_for_bit(ok, stores: tuple[Path, Path], tmp_path: Path) -> None:
    for out, stops in (("straight", [6]), ("broken", [4, 6])):
        for steps in stops:
            ok("train", *WORLD, both(stores), f"out={tmp_path / out}", f"trainer.max_steps={steps}")
    a, b = (torch.load(tmp_path / out / "last.ckpt", weights_only=True) for out in ("straight", "broken"))
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "hyper_parameters"):
        same(a[part], b[part], part)


def test_a_folder_carries_the_vocabulary(ok, stores: tuple[Path, Path], tmp_path: Path) -> None:
    ok("train", *WORLD, both(stores), f"out={tmp_path / 'run'}", "trainer.max_steps=2")
    ok("export-model", f"checkpoint={tmp_path / 'run' / 'best.ckpt'}", f"out={tmp_path / 'model'}", both(stores),
       "starts=4", "burn_in=3")  # fmt: skip
    model, about = load_model(tmp_path / "model")
    assert about["model"]["games"]["actions"] == {"catch": [0, 3, 4], "freeway": [0, 2, 5]}
    assert set(model.start(read_starts(tmp_path / "model"))["game"].tolist()) == {1, 2}
    same(model.state_dict(), load_learner(tmp_path / "run" / "best.ckpt").model.state_dict())


def test_a_checkpoint_without_games_is_as_before(ok, stores: tuple[Path, Path], tmp_path: Path) -> None:
    """It is trained on, though it is from before the setting was there."""
    plain = [s for s in WORLD if "games" not in s]
    ok("train", *plain, f"store={stores[0]}", f"out={tmp_path / 'run'}", "trainer.max_steps=4")
    path = tmp_path / "run" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["model"].pop("games") is None
    for name in ("symmetry", "turned"):
        assert stored["hyper_parameters"]["model"].pop(name) == "none"
    assert not [name for name in stored["state_dict"] if "game" in name]
    torch.save(stored, path)
    same(load_learner(path).state_dict(), stored["state_dict"])
    assert "resuming" in ok("train", *plain, f"store={stores[0]}", f"out={tmp_path / 'run'}")
    assert metrics(tmp_path / "run")["final"].keys() == {"psnr_changed_1", "psnr_changed_2", "rollout_psnr_changed"}


def test_windows_are_turned_as_play_of_the_game_nearly_is(
    ok, refused, stores: tuple[Path, Path], tmp_path: Path
) -> None:
    turned, out = [*WORLD, "model.turned=game"], tmp_path / "run"
    ok("train", *turned, f"store={stores[1]}", f"out={out}", "trainer.max_steps=2")
    assert torch.load(out / "last.ckpt", weights_only=True)["hyper_parameters"]["model"]["turned"] == "flip_lr"
    assert "resuming" in ok("train", *turned, f"store={stores[1]}", f"out={out}", "trainer.max_steps=4")
    assert "another model" in refused("train", *WORLD, f"store={stores[1]}", f"out={out}", "trainer.max_steps=6")
    none = refused("train", *turned, f"store={stores[0]}", f"out={tmp_path / 'none'}")
    assert "model.turned=game" in none and "(catch none)" in none
    assert "(catch none, freeway flip_lr)" in refused("train", *turned, both(stores), f"out={tmp_path / 'both'}")


def test_a_new_game_begins_with_what_games_have_in_common(ok, refused, stores, tmp_path: Path) -> None:
    ok("train", *WORLD, f"store={stores[0]}", f"out={tmp_path / 'run'}", "trainer.max_steps=2")
    given = [f"checkpoint={tmp_path / 'run' / 'best.ckpt'}", f"store={stores[1]}"]
    wrong = refused("imagine", *given, f"out={tmp_path / 'x'}", "device=cpu")
    assert "game='freeway' but the checkpoint" in wrong and "worldmodels finetune" in wrong
    short = [*QUICK, "trainer.max_steps=2", "trainer.val_check_interval=2", "data.length=5", "data.left_padding=4"]
    short += ["data.validation.length=4", "learner.horizons=[1,2]", "horizons=[1,2]", "burn_in=1", "windows=5"]
    told = ok("finetune", *given, f"out={tmp_path / 'moved'}", *short, "scratch=false", "method=bias")
    assert "a game that the model does not know" not in told
    tuned = tmp_path / "moved" / "finetuned"
    base, model = (load_learner(path).model for path in (tmp_path / "run" / "best.ckpt", tuned / "best.ckpt"))
    assert base.games.names == ["catch"] and model.games.names == ["catch", "freeway"]
    assert model.start(Store.open(stores[1]).read([[0, 0]], 4))["game"].item() == 2
    rows = model.reward_model.game.weight
    assert torch.equal(rows[[0, 1]], base.reward_model.game.weight) and torch.equal(rows[2], rows[0])
    shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    shutil.copy(tmp_path / "run" / "best.ckpt", tmp_path / "base.ckpt")
    alone = load_learner(tmp_path / "adapter").model
    assert alone.games.names == model.games.names
    same(alone.state_dict(), model.state_dict())


def test_a_muzero_of_two_games(ok, refused, stores: tuple[Path, Path], tmp_path: Path) -> None:
    """Points as logged, of one head that covers both games; each is searched, and played, with its own actions."""
    run = tmp_path / "run"
    wide = ["model.reward={low: -500, high: 500, bins: 51, transform: h}", "learner.clip_rewards=false"]
    wide += ["model.value={low: -999, high: 999, bins: 51, transform: h}", "head@model.value=two_hot"]
    wide += ["model.games={unknown: 0.1}", "learner.schedule=constant", "learner.target_every=3"]
    few = ["data.batch_size=4", "learner.search.num_simulations=3", "learner.search.rescale=true"]
    train = ["train", *QUICK, "experiment=catch_muzero", *wide, *few, "data.weights.game=0", "callbacks.last.every=2"]
    ok(*train, both(stores), f"out={run}", "trainer.max_steps=6")
    final = metrics(run)["final"]
    for name in ("loss", "loss_reward", "loss_policy", "value"):
        is_mean_over_games(final, name)
    for steps in (4, 6):
        ok(*train, both(stores), f"out={tmp_path / 'broken'}", f"trainer.max_steps={steps}")
    a, b = (torch.load(out / "last.ckpt", weights_only=True) for out in (run, tmp_path / "broken"))
    for part in ("state_dict", "averaging_state", "optimizer_states", "target", "hyper_parameters"):
        same(a[part], b[part], part)
    given = [f"checkpoint={run / 'best.ckpt'}", "device=cpu", "episodes=3", "slots=3", "protocol=store"]
    ok("evaluate", *given, f"out={tmp_path / 'scored'}", "game=catch")
    assert metrics(tmp_path / "scored")["game"] == "catch"
    assert "game is missing" in refused("evaluate", *given, f"out={tmp_path / 'x'}")
    assert "plays catch and freeway, and not game=pong" in refused("evaluate", *given, f"out={tmp_path}", "game=pong")
    searched = [
        "reanalyse",
        f"checkpoint={run / 'best.ckpt'}",
        "trainer.accelerator=cpu",
        f"out={tmp_path / 'targets'}",
    ]
    ok(*searched, f"store={stores[1]}", "version=both")
    policy = Store.open(stores[1]).side("reanalysed_policy", "both").data
    assert policy.shape[1] == 18 and np.delete(policy, [0, 2, 5], axis=1).max() == 0 and policy[:, 2].max() > 0
    narrow = refused(*[s for s in train if "model.reward" not in s], both(stores), f"out={tmp_path / 'narrow'}")
    assert "the rewards of freeway in the log go from -100 to 100, and model.reward from -2 to 2" in narrow
    one = refused(*train, both(stores), f"out={tmp_path / 'one'}", "learner.actions={catch: [0,3,4]}")
    assert "are none of the log of freeway, which holds [0, 2, 5]" in one


@pytest.mark.parametrize("learner", ["cloning", "offline_q", "actor_critic"])
def test_policies_of_two_games(ok, refused, stores: tuple[Path, Path], tmp_path: Path, learner: str) -> None:
    more = ["head@model.head=mse", "trainer.max_steps=2", "data.batch_size=8", "data.weights.game=0"]
    if learner == "actor_critic":
        ok("train", *WORLD, both(stores), f"out={tmp_path / 'world'}", "trainer.max_steps=2")
        more += [f"learner.world_model={tmp_path / 'world' / 'best.ckpt'}"]  # which refuses other games' actions
    run = tmp_path / "run"
    ok("train", *QUICK, f"experiment=catch_{learner}", *more, both(stores), f"out={run}")
    name = {"cloning": "log_likelihood", "offline_q": "loss", "actor_critic": "imagined_return"}[learner]
    is_mean_over_games(metrics(run)["final"], name)
    ok("export-model", f"checkpoint={run / 'best.ckpt'}", f"out={tmp_path / 'model'}")
    legal = {"catch": [0, 3, 4], "freeway": [0, 2, 5]}
    for path in (run / "best.ckpt", tmp_path / "model"):
        for game, mine in legal.items():
            policy = load_policy(path)[0].play(game)
            frames = torch.randint(0, 256, (64, 3, 20, 20), dtype=torch.uint8)
            taken, _ = policy.act(frames, policy.start(64), torch.Generator().manual_seed(0))
            assert policy.actions == mine and set(taken.tolist()) <= set(mine)
        with pytest.raises(UserError, match="plays catch and freeway, and not pong"):
            load_policy(path)[0].play("pong")
    given = [f"checkpoint={run / 'best.ckpt'}", "device=cpu", "episodes=3", "slots=3", "protocol=store"]
    ok("evaluate", *given, f"out={tmp_path / 'scored'}", "game=catch")


def test_bad_settings_are_told_in_a_sentence(refused, stores: tuple[Path, Path], tmp_path: Path) -> None:
    plain = [s for s in WORLD if "games" not in s]
    for setting, told in (
        ("model.games={unknown: 2}", "model.games.unknown=2 must be a share"),
        ("model.games=true", "must be null or have settings, such as model.games={unknown: 0.1}"),
        ("model.games={embed: true}", "unexpected keyword argument 'embed'"),
        ("model.games={actions: {catch: [40]}}", "the actions of catch are [40]"),
        ("model.games={actions: {catch: [0, 3]}}", "LEFT is no action of catch, which has NOOP, RIGHT"),
    ):
        assert told in refused("train", *plain, setting, both(stores), f"out={tmp_path / 'run'}")
        assert not list(tmp_path.rglob("metrics.csv")), "and not only where a dream takes it"

"""Every experiment composes, trains, and leaves a checkpoint that describes itself and loads with weights_only=True."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from tests.conftest import QUICK, ROOT, write_catch
from worldmodels.config import build, plain, sized
from worldmodels.learners.acting import muzero_policy
from worldmodels.learners.building import told_games
from worldmodels.learners.fit import fit
from worldmodels.learners.policy import load_policy
from worldmodels.learners.world_model import WorldModelLearner, load_learner

EVERY = sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))
POLICIES = [name for name in EVERY if name.endswith(("_cloning", "_offline_q", "_actor_critic", "_imagination"))]
SEARCHES = [name for name in EVERY if name.endswith("_muzero")]
EXPERIMENTS = [name for name in EVERY if name not in POLICIES + SEARCHES]
SMALL = ["data.batch_size=1", "data.validation.windows=1", "trainer.max_steps=2"]


@pytest.fixture(scope="module")
def large_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catch in frames of 64x64."""
    return write_catch(tmp_path_factory.mktemp("stores") / "large", cells=16, size=64)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name: str, tmp_path: Path, catch_store: Path, large_store: Path) -> None:
    store = catch_store if name == "catch" else large_store
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        length = 4 if name == "catch" else 6
        places = [f"experiment={name}", f"store={store}", f"out={tmp_path}", f"data.validation.length={length}"]
        frames = ["data.transform.size=84", "data.transform.colour=gray"] if name == "grey84_tiny" else []
        settings = plain(compose("train", [*places, *QUICK, *SMALL, *frames, "learner.horizons=[1]"]))
    settings["model"] = sized(settings["model"])
    figures = fit(settings, tmp_path)
    assert figures["steps"] == 2
    for file in ("best.ckpt", "last.ckpt"):
        stored = torch.load(tmp_path / file, weights_only=True)
        learner = WorldModelLearner.load_from_checkpoint(tmp_path / file)
        assert learner.hparams["model"] == told_games(settings["model"], {"catch": [0, 3, 4]})
        assert learner.hparams["card"] == build(settings["data"]).card
        same = load_learner(tmp_path / file).state_dict()
        assert all(torch.equal(v, learner.state_dict()[k].cpu()) for k, v in same.items())
        assert all(torch.equal(v, stored["state_dict"][k]) for k, v in same.items())
    assert learner.model.components().keys() == {"denoiser", "reward_model"}


@pytest.mark.parametrize("name", POLICIES)
def test_experiment_of_a_policy(name: str, tmp_path: Path, catch_store: Path, large_store: Path) -> None:
    store, world_model = (catch_store, "catch") if name.startswith(("catch", "maze")) else (large_store, "pong_tiny")
    size = 2 if name == "catch_actor_critic" else 4
    more = [f"data.batch_size={size}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        if name.endswith(("_actor_critic", "_imagination")):
            length = "data.validation.length=4" if world_model == "catch" else "data.validation.length=6"
            places = [f"experiment={world_model}", f"store={store}", f"out={tmp_path / 'model'}", length]
            settings = plain(compose("train", [*places, *QUICK, *SMALL, "learner.horizons=[1]"]))
            fit({**settings, "model": sized(settings["model"])}, tmp_path / "model")
            more += [f"learner.world_model={tmp_path / 'model' / 'best.ckpt'}"]
            if world_model != "catch":  # its episodes last 15 steps
                more += ["data.length=6", "data.validation.length=6"]
        places = [f"experiment={name}", f"store={store}", f"out={tmp_path}"]
        settings = plain(compose("train", [*places, *QUICK, *SMALL, *more]))
    settings["model"] = sized(settings["model"])
    figures = fit(settings, tmp_path)
    assert figures["steps"] == 2
    for file in ("best.ckpt", "last.ckpt"):
        stored = torch.load(tmp_path / file, weights_only=True)
        policy, card = load_policy(tmp_path / file)
        assert card == build(settings["data"]).card
        assert policy.actions == stored["hyper_parameters"]["actions"] == [0, 3, 4]
        assert all(torch.equal(v, stored["state_dict"][f"model.{k}"]) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("name", SEARCHES)
def test_experiment_of_a_search(name: str, tmp_path: Path, catch_store: Path, large_store: Path) -> None:
    store = catch_store if name.startswith("catch") else large_store
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        places = [f"experiment={name}", f"store={store}", f"out={tmp_path}", "learner.search.num_simulations=2"]
        searched = ["data.fraction=1", "data.search_from=0", "data.batch_size=2"]
        settings = plain(compose("train", [*places, *QUICK, *SMALL, *searched]))
    settings["model"] = sized(settings["model"])
    assert fit(settings, tmp_path)["steps"] == 2
    for file in ("best.ckpt", "last.ckpt"):
        stored = torch.load(tmp_path / file, weights_only=True)
        policy, card = muzero_policy(tmp_path / file)
        assert card == build(settings["data"]).card
        several = name == "several_muzero"
        assert policy.actions == [0, 3, 4]
        assert stored["hyper_parameters"]["actions"] == ({"catch": [0, 3, 4]} if several else [0, 3, 4])

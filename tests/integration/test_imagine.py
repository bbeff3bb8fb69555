"""The commands that look at a checkpoint: imagine, quality, report, end to end on the toy game."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import QUICK, ROOT, write_catch
from worldmodels.commands._results import settings_of
from worldmodels.config import build, plain, sized
from worldmodels.data.store import Store
from worldmodels.learners.muzero import load_muzero
from worldmodels.learners.world_model import WorldModelLearner

SETTINGS = ["device=cpu", "burn_in=4"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catch on 20 rows, so that an episode lasts 19 steps."""
    return write_catch(tmp_path_factory.mktemp("stores") / "long", 600, cells=20)


@pytest.fixture(scope="module")
def checkpoint(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, as the trainer saves it."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        model = sized(compose("train", ["experiment=catch"]).model)
    torch.manual_seed(0)
    learner = WorldModelLearner(model, card=Store.open(store).card)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(learner)
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def imagine(in_process: Any, store: Path, checkpoint: Path, tmp_path: Path):
    def run(*more: str) -> tuple[int, str, str]:
        given = [f"checkpoint={checkpoint}", f"store={store}", f"out={tmp_path / 'dreams'}", *SETTINGS]
        return in_process("imagine", *given, "horizon=10", "rollouts=5", "shown=2", "batch_size=3", *more)

    return run


def test_imagine_writes_films_strips_arrays_and_a_store(imagine, in_process, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "dreams"
    code, printed, _ = imagine()
    assert code == 0 and printed.splitlines()[-1] == str(out)
    names = {f"{kind}.{suffix}" for kind in ("logged", "random") for suffix in ("mp4", "gif", "npz")}
    names |= {"strip_logged.png", "strip_random.png", "store", "metrics.json"}
    assert {p.name for p in out.iterdir()} == names
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["rollouts"], metrics["steps"], metrics["frames"]) == (5, 10, 100) and metrics["seconds"] > 0

    logged, chance = np.load(out / "logged.npz"), np.load(out / "random.npz")
    real = Store.open(store).read(logged["start"], 14)
    assert logged["obs"].shape == (5, 11, 3, 20, 20) and logged["obs"].dtype == np.uint8
    np.testing.assert_array_equal(logged["real_obs"], real.obs[:, 4:])
    np.testing.assert_array_equal(logged["obs"][:, 0], real.obs[:, 4])  # the last real frame
    np.testing.assert_array_equal(logged["action"], real.action[:, 4:])
    assert not np.array_equal(chance["action"], logged["action"]) and "real_obs" not in chance
    assert set(np.unique(chance["action"])) <= set(np.unique(Store.open(store).column("action")))
    assert not np.array_equal(logged["obs"][0, 1], logged["obs"][1, 1])

    dreams = Store.open(out / "store")
    assert dreams.card["source"] == dreams.card["policy"]["type"] == "imagined"
    assert dreams.card["policy"]["checkpoint_sha256"] == metrics["settings"]["checkpoint_sha256"]
    assert len(dreams.lengths) == 10
    lengths = np.concatenate([logged["mask"].sum(1), chance["mask"].sum(1)])
    np.testing.assert_array_equal(dreams.lengths, lengths)
    first, n = dreams.episode(0), int(lengths[0])
    np.testing.assert_array_equal(first.obs, logged["obs"][0, :n].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(first.final_obs, logged["obs"][0, n].transpose(1, 2, 0))
    assert first.terminated[-1] != first.truncated[-1]
    np.testing.assert_array_equal(first.life_loss, logged["life_loss"][0, :n])
    assert logged["life_loss"].any() and not logged["life_loss"].all()

    settings = [*QUICK, "trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch_size=2"]
    code, _, stderr = in_process(
        "train", "experiment=catch", f"store={out / 'store'}", f"out={tmp_path / 'on'}", *settings
    )
    assert code == 0 and (tmp_path / "on" / "best.ckpt").is_file(), stderr


def test_the_same_work_is_not_done_twice(imagine, tmp_path: Path) -> None:
    file = tmp_path / "dreams" / "logged.npz"
    assert imagine()[0] == 0
    before, first = file.stat().st_mtime_ns, np.load(file)["obs"]
    code, printed, _ = imagine()
    assert code == 0 and "Already done" in printed and file.stat().st_mtime_ns == before
    code, printed, _ = imagine("seed=1")
    assert code == 0 and "Already done" not in printed
    assert not np.array_equal(np.load(file)["obs"], first)
    assert imagine("seed=0")[0] == 0
    np.testing.assert_array_equal(np.load(file)["obs"], first)


def test_quality_and_report(in_process, store: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run" / "quality"
    arguments = ["quality", f"checkpoint={checkpoint}", f"store={store}", f"out={out}", *SETTINGS]
    arguments += ["windows=6", "horizons=[1,2,8]", "reward_rows=20", f"baseline={checkpoint}"]
    arguments += ["other_actions.windows=3", "spread.windows=2", "spread.after=2"]
    code, printed, stderr = in_process(*arguments)
    assert code == 0, stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["windows"] == 6 and len(metrics["psnr_gain_changed_db"]) == 3
    for value in metrics["psnr_changed_db"]:
        assert f"{value:.2f}" in printed
    assert metrics["reward_f1_events"] == sum(c["events"] for c in metrics["reward_by_class"].values()) > 0
    films = {f"{name}.{kind}" for name in ("logged", "other_actions") for kind in ("mp4", "gif")}
    pictures = {"psnr.svg", "quality.svg", "reliability.svg", "strip_logged.png", "strip_other_actions.png"}
    assert {p.name for p in out.iterdir()} == films | pictures | {"metrics.json"}
    assert metrics["baseline"]["psnr_db"] == metrics["psnr_db"]  # the same weights and the same noise
    assert metrics["baseline"]["psnr_gain_changed_db"] == [0.0] * 3
    assert metrics["other_actions"]["steps"] == 14 and "cannot be played again" in printed  # as long as a game lasts
    assert metrics["sample_spread"]["samples"] == 4 and "LPIPS was not measured" in printed
    assert "Already done" in in_process(*arguments)[1]
    code, printed, _ = in_process("report", f"run={tmp_path / 'run'}", f"stores.pong={store}")
    assert code == 0 and printed.split() == [str(tmp_path / "run" / name) for name in ("index.html", "report.json")]


@pytest.mark.parametrize("name", ["checkpoint", "baseline", "lpips", "fvd"])
def test_a_file_that_has_changed_makes_other_work(store: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "file"
    cfg, data = OmegaConf.create({name: str(file)}), Store.open(store)
    file.write_bytes(b"before")
    before = settings_of(cfg, data)
    assert settings_of(cfg, data) == before
    file.write_bytes(b"after")
    assert settings_of(cfg, data) != before


@pytest.mark.parametrize("command", ["imagine", "quality"])
def test_mistakes_are_told_in_one_sentence(
    in_process, command: str, store: Path, checkpoint: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "half.ckpt"
    damaged.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    other = write_catch(tmp_path / "other", 60, size=40, cells=20)
    mistakes = {
        "there is no store at": {"store": tmp_path / "none"},
        "truncated or damaged": {"checkpoint": damaged},
        "no checkpoint at": {"checkpoint": tmp_path / "none.ckpt"},
        "obs.height=40": {"store": other},
        "no episode of more than": {"burn_in": 19},
        "split": {"split": "tset"},
    }
    for sentence, wrong in mistakes.items():
        given = {
            "checkpoint": checkpoint,
            "store": store,
            "out": tmp_path / "out",
            "device": "cpu",
            "burn_in": 4,
        } | wrong
        code, _, stderr = in_process(command, *(f"{k}={v}" for k, v in given.items()))
        assert code == 2 and sentence in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_report_of_nothing_is_refused(in_process, tmp_path: Path) -> None:
    code, _, stderr = in_process("report", f"run={tmp_path / 'none'}")
    assert code == 2 and "there is no run at" in stderr


def test_a_precision_that_dreams_do_not_have_is_refused(imagine) -> None:
    code, _, stderr = imagine("precision=16-mixed")
    assert code == 2 and "choose auto, bf16-mixed or 32-true" in stderr


def test_dreams_do_not_overwrite_something_else(imagine, tmp_path: Path) -> None:
    (tmp_path / "dreams" / "store").mkdir(parents=True)
    (tmp_path / "dreams" / "store" / "mine.txt").write_text("keep")
    code, _, stderr = imagine()
    assert code == 2 and "something other than imagined play" in stderr
    assert (tmp_path / "dreams" / "store" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("probe", ["{hidden:8}", "null"])
def test_a_muzero_shows_what_its_probe_draws(in_process: Any, store: Path, tmp_path: Path, probe: str) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = plain(compose("train", ["experiment=catch_muzero", f"model.probe={probe}", f"out={tmp_path}"]))
    learner = build(cfg["learner"] | {"actions": [0, 3, 4]}, model=sized(cfg["model"]), card=Store.open(store).card)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(learner)
    trainer.save_checkpoint(path := tmp_path / "best.ckpt")
    given, out = [f"checkpoint={path}", f"store={store}", f"out={tmp_path / 'dreams'}", *SETTINGS], tmp_path / "dreams"
    code, _, err = in_process("imagine", *given, "horizon=6", "rollouts=5", "shown=2", "batch_size=3")
    if probe == "null":
        assert (code, err.count("\n")) == (2, 1) and "train it with model.probe={hidden: 64}" in err
        assert not out.exists()
        code, _, err = in_process("quality", *given)
        assert (code, err.count("\n")) == (2, 1) and "holds a MuZero" in err and "`worldmodels imagine`" in err
        return
    assert code == 0, err
    names = {f"{kind}.{suffix}" for kind in ("logged", "random") for suffix in ("mp4", "gif", "npz")}
    names |= {"strip_logged.png", "strip_random.png", "store", "metrics.json"}
    assert {p.name for p in out.iterdir()} == names
    dreams, model = np.load(out / "logged.npz"), load_muzero(path)[0]
    windows = Store.open(store).read(dreams["start"], 10)
    state = model.start(windows.steps(0, 4))
    for k in range(6):
        state, step = model.step(state, windows.action[:, 4 + k])
        np.testing.assert_allclose(dreams["obs"][:, k + 1].astype(int), step.seen().numpy(), atol=1)
    assert dreams["obs"][:, 1].std() > 0 and len(Store.open(out / "store").lengths) == 10

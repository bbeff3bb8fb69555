"""Training improves, is found finished, warns of other settings, moves to another store, and plans ahead."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import QUICK, write_catch

RUN = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def test_train_finish_and_resume_longer(in_process: RUN, catch_store: Path, run_folder: Path) -> None:
    args = ["train", "experiment=catch", f"store={catch_store}", f"out={run_folder}", *QUICK]
    args += ["trainer.val_check_interval=25", "callbacks.last.every=10", "callbacks.progress.every=0"]
    code, out, err = in_process(*args, "trainer.max_steps=50")
    assert (code, err) == (0, "")
    assert out.rstrip().endswith(str(run_folder))
    assert re.search(r"step 5/50  loss \d", out)
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["steps"] == 50
    assert metrics["seconds"] > 0
    assert metrics["cpu_seconds"] > 0
    assert metrics["best_rollout_psnr_changed_db"] >= metrics["final"]["rollout_psnr_changed"]
    losses = _column(run_folder / "metrics.csv", "train/loss")
    assert losses[-1] < losses[0] / 2

    before = (run_folder / "last.ckpt").read_bytes()
    code, out, _ = in_process(*args, "trainer.max_steps=50")
    assert code == 0
    assert "finished before, at step 50" in out
    assert (run_folder / "last.ckpt").read_bytes() == before

    # killed in the validation after the last step: it is made up for
    best = torch.load(run_folder / "best.ckpt", weights_only=True)
    for name in ("metrics.json", "best.ckpt"):
        (run_folder / name).unlink()
    code, out, err = in_process(*args, "trainer.max_steps=50")
    assert code == 0, err
    again = json.loads((run_folder / "metrics.json").read_text())
    assert again["final"] == pytest.approx(metrics["final"])
    if metrics["final"]["rollout_psnr_changed"] == metrics["best_rollout_psnr_changed_db"]:
        now = torch.load(run_folder / "best.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(v, now[k]) for k, v in best["state_dict"].items())

    code, out, err = in_process(*args, "trainer.max_steps=55", "learner.lr=0.5")
    assert code == 0
    assert "learner.lr was 0.001 and is 0.5" in err
    assert "max_steps" not in err
    assert "resuming from" in out
    longer = json.loads((run_folder / "metrics.json").read_text())
    assert longer["steps"] == 55
    assert longer["seconds"] >= metrics["seconds"], "over all resumes (rounded to a tenth)"
    assert longer["cpu_seconds"] >= metrics["cpu_seconds"]


def test_another_model_in_the_same_folder_is_refused(in_process: RUN, catch_store: Path, run_folder: Path) -> None:
    args = ["train", "experiment=catch", f"store={catch_store}", f"out={run_folder}", *QUICK, "trainer.max_steps=60"]
    code, _, err = in_process(*args, "model.sizes.tiny.denoiser.network.cond_channels=64")
    assert code == 2
    assert "holds a run of another model" in err


def test_finetune(in_process: RUN, run_folder: Path, tmp_path: Path) -> None:
    other = write_catch(tmp_path / "other", cells=10, size=20, steps=240)
    out = tmp_path / "moved"
    checkpoint = shutil.copy(run_folder / "best.ckpt", tmp_path / "start.ckpt")
    args = ["finetune", f"checkpoint={checkpoint}", f"store={other}", f"out={out}", *QUICK, "windows=8"]
    args += ["data.length=5", "data.left_padding=4", "data.validation.length=3", "learner.horizons=[1]"]
    args += ["trainer.max_steps=8", "trainer.val_check_interval=4", "horizons=[1]", "burn_in=2"]
    code, shown, err = in_process(*args)
    assert code == 0, err
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["finetune_psnr_changed_db"]) == len(metrics["scratch_psnr_changed_db"]) == 1
    # eight steps do not undo fifty of training: the one that starts ahead stays ahead
    assert metrics["finetune_psnr_changed_db"][0] > metrics["scratch_psnr_changed_db"][0]
    assert len(metrics["psnr_changed_static_db"]) == len(metrics["psnr_static_db"]) == 11
    assert len(metrics["finetune_psnr_db"]) == 1
    assert "best static blend" in shown
    for name in ("finetuned/best.ckpt", "scratch/last.ckpt", "curves.svg", "curves.png"):
        assert (out / name).stat().st_size > 0
    written = (out / "metrics.json").stat().st_mtime_ns
    code, shown, _ = in_process(*args)
    assert code == 0
    assert shown.count("finished before") == 2
    assert (out / "metrics.json").stat().st_mtime_ns == written
    changed = torch.load(checkpoint, weights_only=True)
    next(iter(changed["state_dict"].values())).add_(1.0)
    torch.save(changed, checkpoint)
    code, _, err = in_process(*args)
    assert code == 2 and "holds a run that began with other weights" in err
    assert (out / "metrics.json").stat().st_mtime_ns == written


def test_plan(in_process: RUN, tmp_path: Path) -> None:
    code, out, _ = in_process("plan", "experiment=catch", f"out={tmp_path}", "trainer.max_steps=100")
    assert code == 0
    plan = json.loads((tmp_path / "metrics.json").read_text())
    assert plan["seconds"] >= plan["training_seconds"] > 0
    assert plan["training_seconds"] == pytest.approx(100 * plan["seconds_a_step"], abs=1)
    assert 0 < plan["memory_gib"] < 64
    assert plan["disk_gib"] > 0
    assert "parameters" in out


def test_plan_of_a_symmetry_of_the_game(in_process: RUN, tmp_path: Path) -> None:
    asked = "plan", "experiment=pong_tiny", "model.turned=game", f"out={tmp_path}"
    code, _, err = in_process(*asked, "store=null")
    assert (code, err) == (2, "worldmodels: what model.turned=game means depends on the log: give store=...\n")


def test_doctor(in_process: RUN, tmp_path: Path) -> None:
    code, out, _ = in_process("doctor", f"out={tmp_path}")
    assert code == 0
    facts = json.loads((tmp_path / "metrics.json").read_text())
    assert facts["cores"] >= 1
    assert facts["conv_gmac_per_s"] > 0
    assert facts["games"].startswith("108") or "ROMs" in facts["games"]
    assert str(tmp_path) in out


def _column(path: Path, name: str) -> list[float]:
    import csv

    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_windows_that_are_hard_are_drawn_more_often(in_process: RUN, catch_store: Path, tmp_path: Path) -> None:
    settings = ["data.priority.alpha=1.0", "data.priority.beta=0", "data.priority.block=1", "data.event_share=0.25"]
    args = ["train", "experiment=catch", f"store={catch_store}", f"out={tmp_path}", *QUICK, "trainer.max_steps=40"]
    code, _, err = in_process(*args, *settings)
    assert code == 0, err
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    leaves = state["StoreDataModule"]["priorities"]["leaves"]
    seen = leaves[leaves != 1]
    assert 20 < len(seen) < len(leaves) and (seen > 0).all() and len(seen.unique()) > 15, "losses, not constants"

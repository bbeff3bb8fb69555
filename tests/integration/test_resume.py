"""A run that is killed, interrupted or requeued goes on exactly where it stopped."""

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import QUICK, arguments, environment

CLI = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = [
    "experiment=catch",
    *QUICK,
    "trainer.max_steps=24",
    "trainer.val_check_interval=9",
    "callbacks.last.every=5",
]
SETTINGS += ["trainer.log_every_n_steps=1", "callbacks.progress.every=0"]


def start(*settings: str, **more_environment: str) -> subprocess.Popen[str]:
    command, env = arguments("train", *SETTINGS, *settings), environment() | more_environment
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # a shell that runs the tests in the background has them, and so their children, ignore Ctrl-C
    return subprocess.Popen(command, env=env, preexec_fn=heed_interrupts, **streams)


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"step {step} never came:\n{''.join(seen)}")


def same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, with the place of the first difference."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{k}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_bit_for_bit(catch_store: Path, tmp_path: Path, cli: CLI) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    done = cli("train", *SETTINGS, f"store={catch_store}", f"out={straight}")
    assert done.returncode == 0, done.stderr

    # with W&B beside it, to see that the run keeps its id
    process = start(f"store={catch_store}", f"out={broken}", "logger=wandb")
    wait_for_step(process, 12)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "metrics.json").exists()
    stopped = torch.load(broken / "last.ckpt", weights_only=True)["global_step"]
    assert 5 <= stopped < 24

    done = cli("train", *SETTINGS, f"store={catch_store}", f"out={broken}", "logger=wandb")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert "warning" not in done.stderr
    a, b = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (straight, broken))
    assert a["global_step"] == b["global_step"] == 24
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        same(a[part], b[part], part)
    same(a["callbacks"]["RandomState"]["torch"], b["callbacks"]["RandomState"]["torch"])
    x, y = (torch.load(folder / "best.ckpt", weights_only=True) for folder in (straight, broken))
    same(x["state_dict"], y["state_dict"], "best")

    runs = {path.name.rpartition("-")[2] for path in (broken / "wandb").glob("offline-run-*")}
    assert runs == {(broken / "wandb_id").read_text()}
    with (broken / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(24))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_saves_and_exits_130(number: signal.Signals, catch_store: Path, tmp_path: Path) -> None:
    process = start(f"store={catch_store}", f"out={tmp_path}", "callbacks.last.every=1000")
    wait_for_step(process, 3)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert "interrupted" in out
    assert "Traceback" not in out
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] >= 3


@pytest.mark.slow
def test_slurm_requeue(catch_store: Path, tmp_path: Path, cli: CLI) -> None:
    out, tools = tmp_path / "run", tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/scontrol.txt\n')
    (tools / "scontrol").chmod(0o755)
    names = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "NODEID": "0"}
    names |= {"PROCID": "0", "LOCALID": "0", "NODELIST": "localhost"}
    slurm = {f"SLURM_{k}": v for k, v in names.items()} | {"PATH": f"{tools}:{os.environ['PATH']}"}
    process = start(f"store={catch_store}", f"out={out}", "callbacks.last.every=1000", **slurm)
    wait_for_step(process, 3)
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "scontrol.txt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", "7"]
    assert list(out.glob("hpc_ckpt_*.ckpt"))

    done = cli("train", *SETTINGS, f"store={catch_store}", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert json.loads((out / "metrics.json").read_text())["steps"] == 24
    assert not list(out.glob("hpc_ckpt_*.ckpt"))

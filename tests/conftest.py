"""What many tests share: a store of the toy game, and ways to run the program."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from worldmodels.__main__ import main
from worldmodels.data.sources.catch_play import catch_card, catch_play
from worldmodels.data.store import Store

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["logger=csv", "callbacks.dream=null", "trainer.accelerator=cpu", "data.validation.windows=4"]
"""Settings that keep a training run in a test short."""


def write_catch(path: Path, steps: int = 240, **settings: int) -> Path:
    with Store.create(path, catch_card(0, 0.5, **settings)) as store:
        for episode in catch_play(steps, 0, skill=0.5, **settings):
            store.append(episode)
    return path


@pytest.fixture(scope="session")
def catch_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 episodes of Catch, 20x20."""
    return write_catch(tmp_path_factory.mktemp("stores") / "catch")


def arguments(command: str, *settings: str) -> list[str]:
    return [sys.executable, "-m", "worldmodels", command, *settings]


def environment() -> dict[str, str]:
    """One thread, as one core may be all that there is; W&B offline; this checkout first."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "WANDB_", "HYDRA_"))}
    return keep | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program as a user does, from an empty folder."""

    def run(command: str, *settings: str) -> subprocess.CompletedProcess[str]:
        cwd = tmp_path / "cwd"
        cwd.mkdir(exist_ok=True)
        return subprocess.run(
            arguments(command, *settings), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The same without a new process, for what needs no isolation: (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr(sys, "argv", ["worldmodels", *args])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            GlobalHydra.instance().clear()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def ok(in_process: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """The same, which must end well: stdout."""

    def run(*arguments: object) -> str:
        code, out, err = in_process(*map(str, arguments))
        assert code == 0, err
        return out

    return run


@pytest.fixture
def refused(in_process: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """The same, which must end in one sentence and with exit code 2: the sentence."""

    def run(*arguments: object) -> str:
        code, _, err = in_process(*map(str, arguments))
        assert code == 2, err
        assert err.startswith("worldmodels: ") and err.count("\n") == 1, err
        return err

    return run

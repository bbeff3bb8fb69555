"""compile=true: networks by torch.compile, and what happens where it cannot be had."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import QUICK
from worldmodels import hardware
from worldmodels.types import UserError

RUN = Callable[..., tuple[int, str, str]]


def train(in_process: RUN, store: Path, out: Path, *settings: str) -> str:
    args = ["train", "experiment=catch", f"store={store}", f"out={out}", *QUICK, "trainer.max_steps=4"]
    code, _, err = in_process(*args, *settings)
    assert code == 0, err
    return err


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_network_learns_the_same(in_process: RUN, catch_store: Path, tmp_path: Path) -> None:
    weights = {}
    for setting in ("true", "false"):
        assert not train(in_process, catch_store, tmp_path / setting, f"compile={setting}")
        weights[setting] = torch.load(tmp_path / setting / "last.ckpt", weights_only=True)["state_dict"]
    assert weights["true"].keys() == weights["false"].keys(), "compiled in place"
    # in another order of additions
    for name, value in weights["false"].items():
        torch.testing.assert_close(weights["true"][name], value, atol=1e-3, rtol=1e-2)
    assert any(not torch.equal(weights["true"][n], v) for n, v in weights["false"].items()), "it was compiled"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_policy_is_compiled_too(in_process: RUN, catch_store: Path, tmp_path: Path) -> None:
    torch._dynamo.utils.counters.clear()
    args = ["train", "experiment=catch_cloning", f"store={catch_store}", *QUICK, "trainer.max_steps=2"]
    for setting, compiled in (("false", False), ("true", True)):
        code, _, err = in_process(*args, f"out={tmp_path / setting}", f"compile={setting}")
        assert code == 0 and not err, err
        # the probe is one graph
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1) == compiled


def test_without_a_compiler_training_goes_on(
    in_process: RUN, catch_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no_compiler"),))
    torch.compiler.reset()
    err = train(in_process, catch_store, tmp_path / "run", "compile=true")
    assert err.startswith("warning: training goes on uncompiled, as torch.compile failed here: ")
    assert err.count("\n") == 1
    assert (tmp_path / "run" / "best.ckpt").exists()


def test_automatic_compiling_is_for_gpus() -> None:
    network = torch.nn.Linear(2, 2)
    assert not hardware.compile_in_place([network], "auto", "cpu")
    assert not hardware.compile_in_place([network], False, "cuda")
    with pytest.raises(UserError, match="compile=maybe is unknown"):
        hardware.compile_in_place([network], "maybe")

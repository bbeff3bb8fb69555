"""Two processes on the CPU train one model."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import QUICK


@pytest.mark.slow
def test_two_ranks_end_with_the_same_weights(
    catch_store: Path, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    shared = ["experiment=catch", *QUICK, f"store={catch_store}", "trainer.max_steps=6"]
    done = cli("train", *shared, f"out={tmp_path / 'two'}", "trainer.devices=2", "trainer.strategy=ddp")
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())["weights_sha256_by_rank"]
    assert len(two) == 2
    assert two[0] == two[1]
    # and each rank saw batches of its own: one process alone ends elsewhere
    done = cli("train", *shared, f"out={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    one = json.loads((tmp_path / "one" / "metrics.json").read_text())["weights_sha256_by_rank"]
    assert one != two[:1]

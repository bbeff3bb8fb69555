"""Two processes on the CPU train one model, and share a search of one store."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import QUICK
from worldmodels.data.store import Store
from worldmodels.data.targets import COLUMNS
from worldmodels.learners import reanalysing


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


@pytest.mark.slow
def test_two_ranks_share_a_bulk_search(
    catch_store: Path,
    tmp_path: Path,
    cli: Callable[..., subprocess.CompletedProcess[str]],
    in_process: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each row once, with the targets that one rank gives it; and the last chunk, which one rank alone has, as well."""
    store = tmp_path / "store"
    shutil.copytree(catch_store, store)
    small = [*QUICK, "data.batch_size=4", "learner.search.num_simulations=3", "trainer.max_steps=2"]
    assert in_process("train", "experiment=catch_muzero", *small, f"store={store}", f"out={tmp_path}")[0] == 0
    search = [f"checkpoint={tmp_path / 'best.ckpt'}", f"store={store}", "windows=4", "trainer.accelerator=cpu"]
    two = ["trainer.devices=2", "trainer.strategy=ddp", f"out={tmp_path / 'two'}"]
    assert in_process("reanalyse", *search, "version=one", f"out={tmp_path / 'one'}")[0] == 0
    done = cli("reanalyse", *search, "version=two", *two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("have targets two") == 1
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"metrics.json"}
    monkeypatch.setattr(reanalysing, "remove", lambda _: None)  # as one that is killed before it
    assert in_process("reanalyse", *search, "version=kept", f"out={tmp_path / 'two'}")[0] == 0
    paths = sorted((tmp_path / "two" / "parts").rglob("*.npz"))
    rows = np.concatenate([np.load(path)["rows"] for path in paths])
    assert len(paths) > 2
    assert np.array_equal(np.sort(rows), np.arange(Store.open(store).offsets[-1]))
    paths[0].unlink()
    done = cli("reanalyse", *search, "version=three", *two)
    assert done.returncode == 0, done.stderr
    for name in COLUMNS.values():
        one, *others = (Store.open(store).side(name, version) for version in ("one", "two", "three"))
        assert not np.ma.getmaskarray(one).any()
        for other in others:
            np.testing.assert_allclose(one, other, atol=1e-5)

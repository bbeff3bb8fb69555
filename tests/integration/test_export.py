"""`worldmodels export`, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import arguments, environment, write_catch
from worldmodels.data.store import Store


@pytest.mark.parametrize("form", ["npz", "minari"])
def test_the_command(in_process: Any, catch_store: Path, tmp_path: Path, form: str) -> None:
    out, args = tmp_path / "out", ["export", f"store={catch_store}", f"out={tmp_path / 'out'}", f"format={form}"]
    code, printed, err = in_process(*args)
    assert code == 0, err
    assert printed.splitlines()[-1] == str(out)
    metrics, store = json.loads((out / "metrics.json").read_text()), Store.open(catch_store)
    assert (metrics["episodes"], metrics["steps"]) == (len(store.lengths), store.lengths.sum())
    for figure in ("episodes", "steps", "bytes"):
        assert str(metrics[figure]) in printed
    before = sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*"))
    code, printed, _ = in_process(*args)
    assert code == 0 and "Already done" in printed
    assert sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*")) == before


def test_minari_by_the_command_that_is_printed(in_process: Any, catch_store: Path, tmp_path: Path) -> None:
    _, printed, _ = in_process("export", f"store={catch_store}", f"out={tmp_path}", "format=minari")
    line = next(line for line in printed.splitlines() if line.startswith("MINARI_DATASETS_PATH="))
    line = line.replace("minari.load", "d = minari.load").removesuffix("'") + "; print(d.total_steps, d[7].actions)'"
    env = environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(line, shell=True, env=env, capture_output=True, text=True, timeout=120)
    store = Store.open(catch_store)
    assert done.stdout.split(maxsplit=1) == [str(store.lengths.sum()), f"{store.episode(7).action.astype(int)}\n"], done


def test_an_interrupted_command_goes_on(tmp_path: Path) -> None:
    store, out = write_catch(tmp_path / "store", 1200), tmp_path / "out"
    command = arguments("export", f"store={store}", f"out={out}")
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(list(out.glob("*.npz"))) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err.count("\n")) == (130, 1), err
    assert 3 <= len(list(out.glob("*.npz"))) < 300
    assert not (out / "metrics.json").exists()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.npz"))) == 300 and not list(out.glob("*.tmp*"))
    np.testing.assert_array_equal(np.load(out / "000000299.npz")["action"], Store.open(store).episode(299).action)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["format=avi"], "format=avi is unknown; there are npz, minari"),
        (["store=nowhere"], "there is no store at nowhere"),
        (["out=/proc/x"], "no folder can be made at /proc/x"),
        (["out=STORE"], "holds other things"),
    ],
)
def test_mistakes(in_process: Any, catch_store: Path, tmp_path: Path, settings: list[str], match: str) -> None:
    settings = [s.replace("STORE", str(catch_store)) for s in settings]
    code, _, err = in_process("export", f"store={catch_store}", f"out={tmp_path / 'out'}", *settings)
    assert code == 2 and err.count("\n") == 1
    assert match in err
    assert not (tmp_path / "out").exists()

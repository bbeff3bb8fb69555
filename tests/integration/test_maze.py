"""The maze game through the program: collected, learned from, and played as in the log or in other mazes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import QUICK
from worldmodels.data.store import Store

RUN = Callable[..., tuple[int, str, str]]
PLAY = ["game=maze", "protocol=store", "device=cpu", "episodes=6", "slots=6", "films=0"]


@pytest.fixture
def maze_log(in_process: RUN, tmp_path: Path) -> Path:
    settings = ["source.mazes=5", "source.size=30", "source.time_limit=30", "source.orientation=1"]
    code, _, err = in_process("collect", "game=maze", "steps=300", f"store={tmp_path / 'log'}", *settings)
    assert code == 0, err
    return tmp_path / "log"


def test_from_a_log_to_scores(in_process: RUN, maze_log: Path, tmp_path: Path) -> None:
    store = Store.open(maze_log)
    assert store.card["game"] == "maze" and store.lengths.sum() >= 300
    assert store.read(np.array([(0, 0)]), 4).obs.shape == (1, 5, 3, 30, 30)
    assert json.loads((maze_log / "metrics.json").read_text())["behaviours"]["cautious"]["return_per_1000_steps"] > 100

    run = tmp_path / "run"
    settings = [*QUICK, "trainer.max_steps=1", "trainer.val_check_interval=1", "model.sizes.tiny.encoder.patch=2"]
    games = ["callbacks=scored", "callbacks.games.episodes=2", "callbacks.games.slots=2", "callbacks.dream=null"]
    code, _, err = in_process("train", "experiment=catch_cloning", f"store={maze_log}", f"out={run}", *settings, *games)
    assert code == 0, err
    assert "val/return" in (run / "metrics.csv").read_text()

    found = []
    for env in ("null", "{unseen:true}"):
        out = tmp_path / str(len(found))
        code, _, err = in_process("evaluate", f"checkpoint={run / 'best.ckpt'}", *PLAY, f"env={env}", f"out={out}")
        assert code == 0, err
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        found.append([(line["return"], line["length"]) for line in lines])
        assert len(lines) == 6 and max(line["length"] for line in lines) <= 30
        assert {str(line["env"]) for line in lines} == {"{}" if env == "null" else "{'unseen': True}"}
    assert found[0] != found[1]


def test_mistakes(in_process: RUN, maze_log: Path, catch_store: Path, tmp_path: Path) -> None:
    maze = ["evaluate", "policy=random", *PLAY, f"store={maze_log}", f"out={tmp_path / 'x'}"]
    catch = [
        "evaluate",
        "policy=random",
        "game=catch",
        "protocol=store",
        f"store={catch_store}",
        f"out={tmp_path / 'x'}",
    ]
    for args, words in (
        ([*maze, "env={walls:3}"], "no setting walls; it has cells, mazes"),
        ([*maze, "env={cells:17}"], "size=30 must be a multiple of cells=17: give size=34"),
        ([*maze[:-2], f"out={tmp_path / 'x'}", "protocol=diamond-100k"], "maze is not played by protocol=diamond-100k"),
        ([*catch, "env={cells:3}"], "of catch is {balls: N}"),
        (["collect", "game=maze", f"store={tmp_path / 'new'}", "source.cells=12"], "give cells=13"),
        (["collect", "game=maze", "steps=900", f"store={maze_log}"], "was collected with"),
    ):
        code, _, err = in_process(*args)
        assert code == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists() and not (tmp_path / "new").exists()

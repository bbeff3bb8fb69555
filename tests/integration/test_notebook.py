"""The notebook runs, cell by cell, as it stands; its outputs are those of a real model and were made in one go."""

import json
from typing import Any

import lightning as L
import numpy as np
import pytest

from tests.conftest import ROOT
from worldmodels.config import sized
from worldmodels.data.card import make_card
from worldmodels.data.store import Store
from worldmodels.learners.world_model import WorldModelLearner
from worldmodels.types import Episode

CELLS = json.loads((ROOT / "notebooks/imagine.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_it_was_executed_from_top_to_bottom_without_an_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = [output["output_type"] for cell in CODE for output in cell["outputs"]]
    assert "error" not in kinds and kinds.count("display_data") == 3


def test_its_code_runs(tmp_path, monkeypatch):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        model = sized(compose("train", ["experiment=pong_tiny"]).model)
    rng, no = np.random.default_rng(0), np.zeros(540, bool)
    with Store.create(
        tmp_path / "data/pong", make_card("toy", "pong", {"height": 64, "width": 64, "channels": 3})
    ) as s:
        for _ in range(3):
            frames = rng.integers(0, 256, (540, 64, 64, 3), np.uint8)
            s.append(Episode(frames, np.zeros(540, np.uint8), np.zeros(540, np.float32), no, no, no))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(WorldModelLearner(model, card=s.card))
    trainer.save_checkpoint(tmp_path / "runs/quickstart/pong/best.ckpt")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib").use("Agg")
    names: dict[str, Any] = {}
    for cell in CODE:
        exec("".join(cell["source"]), names)
    assert names["wild"].obs.shape == names["dream"].obs.shape == (4, 33, 3, 64, 64)

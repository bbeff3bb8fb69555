"""What the dataset card of dreams says of their rewards."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.stores import card, episode
from worldmodels.data.store import Store
from worldmodels.evaluation.dreams import write_store


@pytest.mark.parametrize(("signs", "largest", "clipped"), [(False, 4, False), (True, 4, True), (True, 1, False)])
def test_rewards_are_clipped_where_the_model_knows_signs_alone(tmp_path, signs, largest, clipped):
    """Dreams that happened to draw only -1, 0 and 1 are not taken for clipped ones."""
    with Store.create(tmp_path / "real", card()) as real:
        real.append(replace(episode(1, 5), reward=np.array([0, 0, 1, 0, largest], np.float32)))
    never = torch.zeros(1, 3, dtype=torch.bool)
    dream = {
        "obs": torch.zeros(1, 4, 3, 8, 8, dtype=torch.uint8),
        "action": torch.zeros(1, 3, dtype=torch.long),
        "reward": torch.tensor([[0.0, 1.0, 0.0]]),
        "terminated": never,
        "mask": ~never,
    }
    write_store(tmp_path / "s", {"logged": dream}, Store.open(tmp_path / "real"), np.array([[0, 0]]), "0" * 64, signs)
    assert Store.open(tmp_path / "s").card["reward"]["clipped"] is clipped

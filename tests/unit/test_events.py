"""Precision, recall and calibration of rewards and terminations, on values known by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.test_quality import Still, make_store, walk
from worldmodels.evaluation.events import calibration, end_quality, reward_quality


class Ends(Still):
    """Foresees an end with a probability that the column's place tells, and says nothing of rewards."""

    def __init__(self, probability) -> None:
        super().__init__()
        self.probability = torch.tensor(probability)

    def step(self, state, action, generator=None):
        state, step = super().step(state, action, generator)
        place = state["frame"][:, 0, 2].argmax(-1)
        return state, step._replace(terminated_mean=self.probability[place])


@pytest.fixture
def ending(tmp_path):
    """30 walks that end in a game over, whatever the column's place."""
    last = np.arange(80) == 79
    return make_store(tmp_path / "ending", [replace(walk(i), terminated=last) for i in range(30)])


def last_places(store):
    """Place of the column before the last action, of the episodes of the test split."""
    return [int(store.episode(int(e)).obs[-1, 2, :, 0].argmax()) for e in store.splits["test"]]


@pytest.mark.parametrize("zero_rows", [10_000, 40])
def test_terminations_are_counted_by_hand(ending, zero_rows):
    ends = last_places(ending)
    figures = reward_quality(Ends([float(k == ends[0]) for k in range(8)]), ending, zero_rows=zero_rows, progress=False)
    told = figures["termination"]
    hits = ends.count(ends[0])
    places = np.concatenate([ending.episode(int(e)).obs[8:, 2, :, 0].argmax(1) for e in ending.splits["test"]])
    assert told["events"] == len(ends) == 3 and told["recall"] == pytest.approx(hits / 3)
    if zero_rows == 10_000:
        assert told["precision"] == pytest.approx(hits / (places == ends[0]).sum())
        assert told["calibration"]["alarms"] == (places == ends[0]).sum()
    low, high = told["f1_interval"]
    assert low <= told["f1"] <= high


def test_ends_count_as_much_as_all_other_rows(ending):
    """Found by odds that are far from even: all ends of both held-out splits, at a share of the other rows."""
    held_out = [int(e) for name in ("validation", "test") for e in ending.splits[name]]
    ends = [int(ending.episode(e).obs[-1, 2, :, 0].argmax()) for e in held_out]
    others = np.concatenate([ending.episode(e).obs[8:-1, 2, :, 0].argmax(1) for e in held_out])
    sure = [0.1 if k in ends[:2] else 0.001 for k in range(8)]
    told = end_quality(Ends(sure), ending, rows=10_000, progress=False)
    assert (told["events"], told["others"], told["share"]) == (6, len(others), 1 / 80)
    hits, false = np.isin(ends, ends[:2]).mean(), np.isin(others, ends[:2]).mean()
    assert told["recall"] == pytest.approx(hits) and told["precision"] == pytest.approx(hits / (hits + false))
    assert told["f1"] == pytest.approx(2 * hits / (hits + false + 1))
    assert told["auc"] == pytest.approx(0.5 + (hits - false) / 2, abs=1e-4)
    low, high = told["f1_interval"]
    assert low <= told["f1"] <= high
    few = end_quality(Ends(sure), ending, split="train", rows=50, progress=False)
    assert (few["events"], few["others"], few["splits"]) == (24, 50, ["train"])
    none = reward_quality(Ends(sure), ending, progress=False)["termination"]
    assert none["f1"] == 0  # where even odds are asked for


def test_a_model_that_knows_nothing_of_ends_is_at_chance(ending):
    told = end_quality(Ends([0.5] * 8), ending, progress=False)
    assert (told["recall"], told["precision"], told["auc"]) == (1.0, pytest.approx(0.5), 0.5)
    assert end_quality(Still(), ending, progress=False)["f1"] == 0.0


def test_without_ends_there_is_nothing_to_find(tmp_path):
    told = end_quality(Still(), make_store(tmp_path / "walks", [walk(i) for i in range(5)]), progress=False)
    assert (told["events"], told["f1"], told["auc"]) == (0, None, None)


def test_an_end_without_reward_is_judged_once(ending):
    figures = reward_quality(Still(), ending, zero_rows=10_000, progress=False)
    assert figures["reward_rows"] == sum(int(ending.lengths[e]) - 8 for e in ending.splits["test"])
    assert figures["termination"]["recall"] == figures["termination"]["f1"] == 0.0


@pytest.mark.parametrize("signs", [False, True])
def test_rewards_are_compared_as_logged_or_by_sign_as_the_model_knows_them(tmp_path, signs):
    """Not by the size of what is predicted: a model that always expects 1 is right about signs alone."""
    tens = [replace(walk(i), reward=np.full(80, 10, np.float32)) for i in range(5)]
    model = Still(1.0)
    model.signs = signs
    told = reward_quality(model, make_store(tmp_path / "tens", tens), progress=False)["reward_calibration"]
    assert (told["of"], told["error"]) == (("signs", 0.0) if signs else ("rewards", 9.0))


def test_calibration_by_hand():
    predicted = torch.tensor([0.0, 0.0, 0.9, 0.9, -0.6]).double()
    came = torch.tensor([0.0, 0.0, 1.0, 0.0, -1.0]).double()
    told = calibration(predicted, came, torch.tensor([3.0, 3.0, 1.0, 1.0, 2.0]).double())
    # bins: 0 is right, 0.9 comes to 0.5, -0.6 to -1
    assert told["error"] == pytest.approx((2 * 0.4 + 2 * 0.4) / 10)
    assert told["error_of_alarms"] == pytest.approx((2 * 0.4 + 2 * 0.4) / 4) and told["alarms"] == 4
    assert told["curve"][0] == {"predicted": -0.6, "came": -1.0, "rows": 2.0}
    assert sum(b["rows"] for b in told["curve"]) == 10


def test_a_prediction_that_comes_as_often_as_it_says_is_calibrated():
    random = np.random.default_rng(0)
    predicted = random.random(50_000)
    came = random.random(50_000) < predicted
    told = calibration(torch.from_numpy(predicted), torch.from_numpy(came).double(), torch.ones(50_000).double())
    assert told["error"] < 0.01 and len(told["curve"]) == 10
    sure = calibration(
        torch.from_numpy(predicted).round(), torch.from_numpy(came).double(), torch.ones(50_000).double()
    )
    assert sure["error"] == pytest.approx(0.25, abs=0.01)

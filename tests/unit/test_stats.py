"""Resampled episodes, and scores over games and runs."""

import numpy as np
import pytest
import torch

from worldmodels.evaluation.scores import normalised, published
from worldmodels.evaluation.stats import (
    RESAMPLES,
    aggregate,
    episode_weights,
    interval,
    number,
    plain,
    probability_of_improvement,
    resample_episodes,
    weighted_mean,
)
from worldmodels.types import UserError


def test_windows_of_an_episode_are_drawn_together():
    weights = episode_weights(np.array([7, 7, 2, 9]), seed=3)
    assert weights.shape == (1001, 4) and bool((weights[0] == 1).all())
    assert torch.equal(weights[:, 0], weights[:, 1]) and not torch.equal(weights[:, 0], weights[:, 2])
    assert bool((weights[:, 1:].sum(1) == 3).all())  # as many episodes as there are
    assert torch.equal(weights, episode_weights(np.array([7, 7, 2, 9]), seed=3))
    assert not torch.equal(weights, episode_weights(np.array([7, 7, 2, 9]), seed=4))


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double() + torch.tensor([0.0, 5.0])
    means = weighted_mean(episode_weights(np.arange(400)), values)
    for column, (low, high) in enumerate(interval(means)):
        error = values[:, column].std().item() / 20
        assert low == pytest.approx(values[:, column].mean().item() - 1.96 * error, abs=0.3 * error)
        assert high == pytest.approx(values[:, column].mean().item() + 1.96 * error, abs=0.3 * error)


def test_what_is_unknown_is_left_out_of_means_and_is_none_in_json():
    values = torch.tensor([[1.0, torch.nan], [3.0, torch.nan], [torch.nan, torch.nan]])
    means = weighted_mean(episode_weights(np.arange(3)), values)
    assert plain(means[0]) == [2.0, None] and interval(means) == [[1.0, 3.0], [None, None]]
    assert number(float("inf")) is None and number(1 / 3) == 0.3333


def test_sums_are_those_of_the_weights_and_take_room_by_episodes():
    episode, values = np.repeat([5, 3, 8], [4_000, 3, 1_000]), torch.arange(5_003).double()
    drawn = resample_episodes(episode, seed=3)
    torch.testing.assert_close(drawn.sums(values), episode_weights(episode, seed=3) @ values)
    assert drawn.counts.shape == (1 + RESAMPLES, 3) and drawn.episode.shape == (5_003,)


def diamond():
    per_seed = published()["per_seed"]["DIAMOND"]
    return np.array([[normalised(game, score) for score in scores] for game, scores in per_seed.items()])


def test_the_published_aggregates_of_diamond():
    scores = diamond()
    assert scores.shape == (26, 5)
    found = aggregate(scores)
    expected = {"mean": 1.459, "median": 0.373, "iqm": 0.641, "optimality_gap": 0.480}
    assert {name: round(found[name], 3) for name in expected} == expected
    row = next(row for row in published()["agents"] if row["agent"] == "DIAMOND")
    for name, value in expected.items():
        low, high = found[f"{name}_interval"]
        assert low < value < high and row[name] == value
        if name != "optimality_gap":
            assert [low, high] == pytest.approx(row[f"{name}_interval"], abs=0.03)
    assert aggregate(scores) == found and aggregate(scores, seed=1) != found


def test_aggregates_by_hand():
    scores = np.array([[0.0, 0.2, 0.4, 0.6], [2.0, 2.0, 2.0, 2.0], [0.5, 0.5, 0.5, 0.5]])
    found = aggregate(scores)
    assert found["mean"] == pytest.approx((0.3 + 2 + 0.5) / 3)
    assert found["median"] == 0.5
    assert found["iqm"] == pytest.approx((0.5 * 4 + 0.6 + 2) / 6)  # without the three least and greatest of twelve
    assert found["optimality_gap"] == pytest.approx((1.0 + 0.8 + 0.6 + 0.4 + 4 * 0.5) / 12)
    assert found["median_interval"] == [0.5, 0.5]  # the games stay: the middle one never varies
    one = aggregate(scores[:, :1])
    assert one["mean"] == pytest.approx(2.5 / 3) and one["mean_interval"] is None


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for trial in range(60):
        scores = rng.normal([[0.0], [1.0], [5.0], [2.0]], 1, (4, 20))
        low, high = aggregate(scores, seed=trial)["mean_interval"]
        held += low < 2 < high
    assert 0.85 <= held / 60 < 1  # the games' spread is no part of it, or every one would hold


def test_probability_of_improvement():
    a, b = np.array([[1.0, 2.0], [5.0, 5.0]]), np.array([[0.0, 1.5, 3.0], [5.0, 5.0, 5.0]])
    found = probability_of_improvement(a, b)
    assert found["probability_of_improvement"] == pytest.approx((3 / 6 + 0.5) / 2)
    back = probability_of_improvement(b, a)["probability_of_improvement"]
    assert found["probability_of_improvement"] + back == pytest.approx(1)
    low, high = found["probability_of_improvement_interval"]
    assert low < 0.5 < high
    assert probability_of_improvement(a + 10, b)["probability_of_improvement_interval"] == [1, 1]


def test_what_is_no_table_of_scores_is_refused():
    for scores in (np.zeros(3), np.zeros((0, 3)), np.array([[1.0, np.nan]])):
        with pytest.raises(UserError, match="scores must be finite numbers of shape"):
            aggregate(scores)
    with pytest.raises(UserError, match="of 2 games and of 3"):
        probability_of_improvement(np.zeros((2, 1)), np.zeros((3, 1)))

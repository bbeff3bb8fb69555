"""Resampled episodes."""

import numpy as np
import pytest
import torch

from worldmodels.evaluation.stats import (
    RESAMPLES,
    episode_weights,
    interval,
    number,
    plain,
    resample_episodes,
    weighted_mean,
)


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

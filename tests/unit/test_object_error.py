"""Errors of objects from places given by hand."""

import torch

from worldmodels.evaluation.object_error import object_figures
from worldmodels.evaluation.stats import episode_weights

NONE = (float("nan"), float("nan"))


def places(*columns):
    return {"ball": torch.tensor(columns, dtype=torch.float32).transpose(0, 1)}  # (W, H, 2)


def test_an_object_that_the_dream_lost_is_a_miss_and_infinitely_far():
    true = places([(0, 0), (0, 0), (0, 0), NONE])
    dream = places([(3, 4), (0, 1), NONE, (9, 9)])
    copy = places([NONE, NONE, (0, 2), NONE])
    found = {"true": true, "dream": dream, "copy_last": copy, "baseline": true}
    figures = object_figures(found, episode_weights(torch.arange(4)), horizons=[8])
    assert figures["ball_shown"] == [3]  # where the game shows none, the one of the dream does not count
    assert figures["ball_hit_rate"] == [0.3333] and figures["ball_hit_rate_8"] == 0.3333
    assert figures["ball_error_px"] == [3.0]  # of 5 and 1
    assert figures["ball_error_median_px"] == [5.0]  # of 1, 5 and infinity
    assert figures["ball_error_copy_last_px"] == [2.0] and figures["ball_error_median_copy_last_px"] == [None]
    assert figures["baseline"]["ball_hit_rate"] == [1.0] and figures["baseline"]["ball_error_px"] == [0.0]
    low, high = figures["ball_error_interval_px"][0]
    assert low == 1.0 and high == 5.0

"""Figures of several stores in one: means in which each store counts alike, whatever its size."""

from collections.abc import Sequence
from typing import Any

_MEANT = (  # how the names of figures end of which a mean says something
    *("psnr_db", "psnr_changed_db", "_static_db", "gain_db", "gain_changed_db"),
    *("ssim", "ssim_changed", "ssim_static", "ssim_changed_static", "ssim_gain", "ssim_gain_changed"),
    *("_hit_rate", "_hit_rate_copy_last", "_error_px", "_error_copy_last_px"),
    *("lpips", "lpips_baseline", "lpips_copy_last", "fvd", "fvd_baseline", "fvd_copy_last"),
    *("reward_macro_f1", "error_of_alarms", "ratio", "loss", "loss_policy", "loss_value", "loss_reward", "loss_end"),
)
_SAME = ("split", "horizons", "burn_in", "without_objects", "without_lpips", "without_fvd")  # in all stores
_COUNTED = ("life_loss",)  # of events, as of ends: no mean, however their name ends
_NESTED = ("baseline", "reward_calibration", "sample_spread")


def mean_figures(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over several stores of what was found in each, and the sums of rollouts and episodes.

    Each store counts alike; a figure that some lack (an object that a game does not have) is left out, and a number
    that some lack (no reward occurred) is the mean over the others. Intervals, medians and counts have no mean, nor has
    what dreams do under other actions: it is over as many steps as a store's games last.
    """
    sums = {name: sum(part[name] for part in parts) for name in ("windows", "episodes")}
    return _means(parts) | sums | {name: parts[0][name] for name in _SAME if name in parts[0]}


def _means(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shared = [name for name in parts[0] if name not in (*_SAME, *_COUNTED) and all(name in part for part in parts)]
    means = {name: _mean([part[name] for part in parts]) for name in shared if name.endswith(_MEANT)}
    return means | {name: _means([part[name] for part in parts]) for name in shared if name in _NESTED}


def _mean(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: _mean([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], list):
        return [_mean(column) for column in zip(*values, strict=True)]
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None

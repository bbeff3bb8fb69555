"""How far imagined objects are from their true places, in pixels.

An object counts in the frames in which the real game shows it, as the finder of objects.py sees it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from worldmodels.evaluation.stats import interval, plain, weighted_mean

HIT_PIXELS = {"paddle": 3.0, "ball": 4.0}
"""How near, in pixels, an imagined object must be to its true place."""


def object_figures(places: Mapping[str, Mapping[str, Tensor]], weights: Tensor, horizons: Sequence[int]) -> dict:
    """Hit rates and errors in pixels over the horizons.

    `{object}_hit_rate` is the share of the frames showing the object in which the dream has it within `HIT_PIXELS`.
    `{object}_error_px` is the mean distance where the dream shows it at all, and `{object}_error_median_px` the median
    over all of them, in which an object that the dream lost is infinitely far (None where more than half are lost).

    Args:
        places: what `find_objects` finds, (W, H, 2) by object, in the films "true", "dream", "copy_last" and, where
            there is a further model, "baseline".
        weights: (1 + R, W) of `episode_weights`.
        horizons: of the columns.
    """
    figures: dict[str, Any] = {}
    for name, true in places["true"].items():
        shown = ~true[..., 0].isnan()
        figures[f"{name}_shown"] = shown.sum(0).tolist()
        for film in (f for f in places if f != "true"):
            error = (places[film][name] - true).norm(dim=-1)
            hit = (error <= HIT_PIXELS[name]).double().masked_fill(~shown, torch.nan)  # where it is lost there is none
            found_at, distance = weighted_mean(weights, hit), weighted_mean(weights, error)
            lost = error.masked_fill(error.isnan() & shown, torch.inf)
            tail = "_copy_last" if film == "copy_last" else ""
            found = {
                f"{name}_hit_rate{tail}": plain(found_at[0]),
                f"{name}_hit_rate{tail}_interval": interval(found_at),
                f"{name}_error{tail}_px": plain(distance[0]),
                f"{name}_error{tail}_interval_px": interval(distance),
                f"{name}_error_median{tail}_px": plain(lost.nanquantile(0.5, 0, interpolation="lower")),
            }
            (figures.setdefault("baseline", {}) if film == "baseline" else figures).update(found)
        if 8 in horizons:
            figures[f"{name}_hit_rate_8"] = figures[f"{name}_hit_rate"][list(horizons).index(8)]
    return figures

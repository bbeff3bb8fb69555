"""At which step a dream leaves the real game.

Two judges. Of the objects: the first step at which one that the real game shows is further off than `HIT_PIXELS`, or
lost. Of the pixels: the first step at which PSNR on changed pixels is below a threshold. Once left, a dream is never
together with the game again.

Shapes: W windows, T steps, R resamples.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldmodels.evaluation.frames import changed_pixels, psnr, squared_error
from worldmodels.evaluation.object_error import HIT_PIXELS
from worldmodels.evaluation.objects import find_objects
from worldmodels.evaluation.stats import interval, plain, weighted_mean


def divergence_figures(
    films: Mapping[str, Tensor],
    real: Tensor,
    last: Tensor,
    alive: Tensor,
    game: str,
    threshold_db: float,
    weights: Tensor,
) -> dict[str, Any]:
    """When each film leaves the real one, by pixels and, for games with a finder of objects, by objects.

    Args:
        films: (W, T, C, H, W) uint8 by name.
        real: (W, T, C, H, W) uint8.
        last: (W, C, H, W) uint8, the frame from which all set out.
        alive: (W, T) bool, false where the real game was over; such steps are not judged.
        game: whose objects are looked for.
        threshold_db: of the pixels.
        weights: (1 + R, W) of `episode_weights`.

    Returns:
        By judge the threshold, and by film `step` of each window (None where it never left), the quartiles of these
        (None: not within T steps), and by step the share of the films still together with the game.
    """
    moved = changed_pixels(real, last)
    off = {"pixels": {name: psnr(*squared_error(film, real, moved)) < threshold_db for name, film in films.items()}}
    if found := find_objects(real.flatten(0, 1), game):
        off["objects"] = {name: _objects_off(film, found, game) for name, film in films.items()}
    thresholds = {"pixels": {"psnr_changed_db": threshold_db}, "objects": {f"{k}_px": v for k, v in HIT_PIXELS.items()}}
    return {
        judge: {"threshold": thresholds[judge]} | {name: _told(o & alive, weights) for name, o in by_film.items()}
        for judge, by_film in off.items()
    }


def _objects_off(film: Tensor, real: Mapping[str, Tensor], game: str) -> Tensor:
    """(W, T) bool: where an object that the real game shows is lost or too far off."""
    dreamed = find_objects(film.flatten(0, 1), game)
    off = [~real[k][:, 0].isnan() & ~((dreamed[k] - real[k]).norm(dim=-1) <= HIT_PIXELS[k]) for k in real]
    return torch.stack(off).any(0).unflatten(0, film.shape[:2])


def _told(off: Tensor, weights: Tensor) -> dict[str, Any]:
    together = off.cummax(1).values.logical_not()
    step = torch.where(together.all(1), torch.inf, together.sum(1) + 1.0)
    quartiles = step.quantile(torch.tensor([0.25, 0.5, 0.75]), interpolation="lower")
    shares = weighted_mean(weights, together)
    return {
        "step": plain(step),
        "quartiles": plain(quartiles),
        "together": plain(shares[0]),
        "together_interval": interval(shares),
    }

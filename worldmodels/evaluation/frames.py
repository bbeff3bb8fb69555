"""How near imagined frames are to the true ones: PSNR and SSIM on all pixels and on those that changed.

'Changed pixels' are those where the true frame t+h differs from the true frame t, the last one seen, by more than
8/255 in any channel: elsewhere copying is right, so that only they tell whether motion was learned. Copying the last
frame errs there twice (where a sprite was and where it is), erasing every sprite only once, hence the static
baselines: every blend of the last frame and the per-pixel median of the training frames in steps of 0.1.

SSIM is that of Wang et al. 2004 with a Gaussian window of 11 pixels (torchmetrics), its map averaged over all pixels or
over the changed ones. It costs about three milliseconds a frame, so only the blends of `SSIM_BLENDS` have it.

Shapes: B batch, W windows, H horizons, S static baselines, N films (model, further model, S baselines), R resamples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worldmodels.evaluation.stats import interval, plain

BLENDS = tuple(round(0.1 * k, 1) for k in range(11))
"""Share of the last frame in the static baselines: 0 is the median frame, 1 is copying the last."""
SSIM_BLENDS = (0.0, 0.5, 1.0)


def changed_pixels(true: Tensor, last: Tensor) -> Tensor:
    """(B, T, 1, H, W) bool: where `true` (B, T, C, H, W) uint8 differs from `last` (B, C, H, W) by more than 8/255."""
    return ((true.int() - last[:, None].int()).abs() > 8).any(2, keepdim=True)


def squared_error(a: Tensor, b: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of squared errors on [0, 1] and number of values summed, (B, T) float64 each."""
    error = ((a.float() - b.float()) / 255).square()
    if where is None:
        where = torch.ones_like(error[:, :, :1])
    return (error * where).sum((2, 3, 4), dtype=torch.float64), a.shape[2] * where.sum((2, 3, 4), dtype=torch.float64)


def psnr(error: Tensor, count: Tensor) -> Tensor:
    """In dB; at most 100, so that a perfect dream has a number, and NaN where nothing was counted."""
    return -10 * torch.log10((error / count).clamp(min=1e-10))


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """The map of SSIM of frames (B, T, C, H, W) in 0..255, its mean over channels: (B, T, 1, H, W) float32."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    a, b = (x.float().div(255) for x in (a, b))
    _, values = ssim(a.flatten(0, 1), b.flatten(0, 1), data_range=1.0, reduction="none", return_full_image=True)
    return values.mean(1, keepdim=True).unflatten(0, a.shape[:2])


def static_films(last: Tensor, median: Tensor, steps: int) -> list[Tensor]:
    """The films (B, steps, C, H, W) of every blend of the last frame (B, C, H, W) and the median frame (C, H, W)."""
    blends = (b * last.float() + (1 - b) * median for b in BLENDS)
    return [x[:, None].expand(-1, steps, -1, -1, -1) for x in blends]


def frame_scores(films: Sequence[Tensor], true: Tensor, last: Tensor) -> Tensor:
    """What PSNR and SSIM are made of: (N, 6, B, T) float64.

    The six are the squared error and its count on all pixels, the same on changed ones, and SSIM summed over all and
    over the changed pixels; NaN where SSIM is not computed.

    Args:
        films: (B, T, C, H, W) each: one model or more, and last those of `static_films`.
        true: (B, T, C, H, W) uint8, what happened.
        last: (B, C, H, W) uint8, the last frame seen.
    """
    moved, rows = changed_pixels(true, last), []
    static = len(films) - len(BLENDS)
    for k, film in enumerate(films):
        alike = [torch.full(true.shape[:2], torch.nan, dtype=torch.float64)] * 2
        if k < static or BLENDS[k - static] in SSIM_BLENDS:
            values = similarity(film, true).double()
            alike = [values.sum((2, 3, 4)), (values * moved).sum((2, 3, 4))]
        rows.append(torch.stack([*squared_error(film, true), *squared_error(film, true, moved), *alike]))
    return torch.stack(rows)


def frame_figures(scores: Tensor, weights: Tensor, channels: int, baseline: bool = False) -> dict[str, Any]:
    """PSNR and SSIM of the model and the baselines, and the gains, with 95 % intervals from resampled episodes.

    PSNR is that of the mean squared error over all windows.

    Args:
        scores: (N, 6, W, H) of `frame_scores`.
        weights: (1 + R, W) of `episode_weights`.
        channels: C.
        baseline: whether the second film is that of a further model.

    Returns:
        Lists over the horizons by name; what is of the further model under "baseline".
    """
    sums = torch.einsum("rw,nkwh->rnkh", weights, scores)
    share = sums[:, 0, 3] / sums[:, 0, 1]
    figures: dict[str, Any] = {"changed_share": plain(share[0])}
    second: dict[str, Any] = {}
    for name, unit, values in (
        ("psnr", "_db", psnr(sums[:, :, 0], sums[:, :, 1])),
        ("psnr_changed", "_db", psnr(sums[:, :, 2], sums[:, :, 3])),
        ("ssim", "", sums[:, :, 4] * channels / sums[:, :, 1]),
        ("ssim_changed", "", sums[:, :, 5] * channels / sums[:, :, 3]),
    ):
        ours, static = values[:, 0], values[:, -len(BLENDS) :]
        shown = [k for k, b in enumerate(BLENDS) if unit or b in SSIM_BLENDS]
        # on all pixels no blend is meant to be better than the copied frame; on changed ones the best has to be beaten
        best = static[:, shown].amax(1) if name.endswith("changed") else static[:, -1]
        figures |= {f"{name}{unit}": plain(ours[0]), f"{name}_interval{unit}": interval(ours)}
        figures[f"{name}_static{unit}"] = {str(BLENDS[k]): plain(static[0, k]) for k in shown}
        gain_name = name.replace("psnr", "psnr_gain").replace("ssim", "ssim_gain")
        figures |= {f"{gain_name}{unit}": plain((ours - best)[0]), f"{gain_name}_interval{unit}": interval(ours - best)}
        if baseline:
            second |= {f"{name}{unit}": plain(values[0, 1]), f"{name}_interval{unit}": interval(values[:, 1])}
            over = ours - values[:, 1]
            second |= {f"{gain_name}{unit}": plain(over[0]), f"{gain_name}_interval{unit}": interval(over)}
    return figures | ({"baseline": second} if baseline else {})

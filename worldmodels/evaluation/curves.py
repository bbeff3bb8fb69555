"""Plots of what `worldmodels quality` measures, with 95 % intervals as bands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldmodels.evaluation.object_error import HIT_PIXELS
from worldmodels.evaluation.pictures import Curve, plot
from worldmodels.evaluation.report import model_curves, psnr_plot

STEPS = "steps after the last real frame"


def quality_plots(out: Path, figures: Mapping[str, Any], tail: str = "") -> list[Path]:
    """Write psnr.svg, quality.svg and, where rewards were judged, reliability.svg.

    Args:
        out: exists.
        figures: of one store, as metrics.json has them.
        tail: stands before each ".svg".
    """
    x, static = figures["horizons"], figures["ssim_changed_static"]
    panels: dict[str, dict[str, Curve]] = {
        "SSIM, changed pixels": model_curves(figures, "ssim_changed", "ssim_changed_interval")
        | {"copy the last frame": (x, static["1.0"]), "median frame": (x, static["0.0"])}
    }
    for name in (n for n in HIT_PIXELS if f"{n}_error_px" in figures):
        copied = figures[f"{name}_error_copy_last_px"]
        panels[f"{name} off by, pixels"] = model_curves(figures, f"{name}_error_px", f"{name}_error_interval_px") | {
            "copy the last frame": (x, copied)
        }
    if (other := figures.get("other_actions", {})) and other["windows"]:
        panels["frames apart under other actions, levels"] = {
            {"dream": "model", "real": "real game"}[k]: (
                other["horizons"],
                other[f"{k}_apart"],
                other[f"{k}_apart_interval"],
            )
            for k in ("dream", "real")
            if f"{k}_apart" in other
        }
        judged = other.get("divergence", {})
        if judged:
            powers = [2**k for k in range(16) if 2**k <= other["steps"]]
            panels["share still together with the real game"] = {
                f"{'model' if film == 'dream' else 'copy the last frame'}, by {judge}": (
                    powers,
                    [by_film[film]["together"][s - 1] for s in powers],
                    [by_film[film]["together_interval"][s - 1] for s in powers],
                )
                for film in ("dream", "copy_last")
                for judge, by_film in judged.items()
            }
    paths = [psnr_plot(out / f"psnr{tail}.svg", figures), plot(out / f"quality{tail}.svg", panels, STEPS, "", log="x")]
    if "reward_calibration" in figures:
        paths.append(_reliability(out / f"reliability{tail}.svg", figures))
    return paths


def _reliability(path: Path, figures: Mapping[str, Any]) -> Path:
    panels: dict[str, dict[str, Curve]] = {}
    judged = {"reward": figures["reward_calibration"], "termination": figures["termination"]["calibration"]}
    if (lost := figures.get("life_loss")) and lost["events"]:
        judged["lost life"] = lost["calibration"]
    for title, told in judged.items():
        predicted = [b["predicted"] for b in told["curve"]]
        ends = [min(predicted), max(predicted)]
        panels[title] = {"model": (predicted, [b["came"] for b in told["curve"]]), "calibrated": (ends, ends)}
    return plot(path, panels, "predicted mean, by bins", "what came, mean of the bin")

"""Strips, videos and curves: what a dream looks like beside what really happened."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FPS = 15
"""Agent steps a second at frame skip 4: the speed at which the game is played."""
BACKGROUND, INK = 18, (150, 156, 166)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Absolute difference of uint8 frames, uint8."""
    return (a.int() - b.int()).abs().byte()


def _pixels(frame: Tensor, scale: int) -> np.ndarray:
    """(C, H, W) uint8 enlarged by whole pixels to (H * scale, W * scale, 3)."""
    image = frame.permute(1, 2, 0).numpy()
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    return image.repeat(scale, 0).repeat(scale, 1)


def _grid(rows: Sequence[Sequence[Tensor]], scale: int, gap: int = 4) -> np.ndarray:
    """Frames (C, H, W) in rows and columns on a dark ground: (height, width, 3) uint8, of even sides as video needs."""
    edge = ((0, gap), (0, gap), (0, 0))
    cells = [[np.pad(_pixels(f, scale), edge, constant_values=BACKGROUND) for f in row] for row in rows]
    image = np.concatenate([np.concatenate(row, axis=1) for row in cells], axis=0)
    height, width = image.shape[:2]
    return np.pad(image, ((gap, height % 2), (gap, width % 2), (0, 0)), constant_values=BACKGROUND)


def strip(path: str | Path, rows: Mapping[str, Tensor], steps: Sequence[int], scale: int = 2) -> Path:
    """A picture with one labelled row for each entry of `rows` and one column for each of `steps`.

    Args:
        path: where the PNG is written.
        rows: label to frames (T+1, C, H, W) uint8, frame 0 being the last real one.
        steps: which frames are shown; those past T are left out.
        scale: whole pixels a pixel.
    """
    from PIL import Image, ImageDraw, ImageFont

    steps = [s for s in steps if s < min(map(len, rows.values()))]
    grid = _grid([[frames[s] for s in steps] for frames in rows.values()], scale)
    left, top = 84, 22
    image = Image.fromarray(np.pad(grid, ((top, 0), (left, 0), (0, 0)), constant_values=BACKGROUND))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    height, width = (grid.shape[0] - 4) // len(rows), (grid.shape[1] - 4) // len(steps)
    for k, step in enumerate(steps):
        draw.text((left + width * (k + 0.5), top / 2), f"t+{step}" if step else "t", INK, font, "mm")
    for k, label in enumerate(rows):
        draw.text((left - 8, top + height * (k + 0.5)), label, INK, font, "rm")
    image.save(path)
    return Path(path)


def montage(rows: Sequence[Tensor], scale: int = 2) -> Tensor:
    """Rollouts under each other and side by side, as one film.

    Args:
        rows: (N, T, C, H, W) uint8 each: N films side by side in each row.
        scale: whole pixels a pixel.

    Returns:
        (T, 3, height, width) uint8 with even height and width.
    """
    films = [_grid([list(row[:, t]) for row in rows], scale) for t in range(rows[0].shape[1])]
    return torch.from_numpy(np.stack(films)).permute(0, 3, 1, 2)


def write_mp4(path: str | Path, frames: Tensor, fps: int = FPS) -> Path:
    """Film (T, C, H, W) uint8 as h264 in yuv420p, which every browser plays; H and W must be even."""
    import imageio.v3 as iio

    images = frames.permute(0, 2, 3, 1).numpy()
    iio.imwrite(path, images, plugin="pyav", codec="libx264", fps=fps, out_pixel_format="yuv420p")
    return Path(path)


def write_gif(path: str | Path, frames: Tensor, fps: int = FPS) -> Path:
    """Film (T, C, H, W) uint8 as an endless gif, slowed to the next whole hundredth of a second a frame."""
    import imageio.v3 as iio

    images, options = frames.permute(0, 2, 3, 1).numpy(), {"duration": 10 * -(-100 // fps), "loop": 0}
    # by way of memory: where a disk is full the writer's own file would complain once more when it is thrown away
    Path(path).write_bytes(iio.imwrite("<bytes>", images, extension=".gif", **options))
    return Path(path)


Curve = tuple[Sequence[float], Sequence[float]] | tuple[Sequence[float], Sequence[float], Sequence[Any]]
"""x, y and, where there are any, intervals (low, high) of y, which are drawn as a band; None is a gap."""


def plot(
    path: str | Path, panels: Mapping[str, Mapping[str, Curve]], x_label: str, y_label: str, log: str = ""
) -> Path:
    """Curves, one panel for each entry of `panels`, readable on light and dark pages.

    Args:
        path: ending in .svg or .png.
        panels: title to curves by label, which has one colour in all panels. The first curve is drawn boldest, the
            others are baselines. Of more than four labels there is one legend, beside the panels.
        x_label: below each panel.
        y_label: beside the first.
        log: "x", "y" or "xy" for logarithmic axes; x is then in powers of two with plain numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grey = "#808890"
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    colours = ("#2f7ff0", "#e8833a", "#2fa36b", "#b05ccc", "#808890", "#d84a6b", "#28a5b8")
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    crowded = len(labels) > 4
    for ax, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for k, (label, (x, y, *band)) in enumerate(curves.items()):
            style = {"linewidth": 2.4, "zorder": 5} if k == 0 else {"linewidth": 1.4}
            if len(x) <= 20:  # hollow rings of growing size, so that equal points do not hide each other
                style |= {"marker": "o", "markersize": 4 + 2 * k, "fillstyle": "none" if k else "full"}
            colour = colours[labels.index(label) % len(colours)]
            ax.plot(x, y, label=label, color=colour, **style)
            for intervals in band:
                low, high = np.array(intervals, float).T  # None becomes NaN
                if len(x) > 1:
                    ax.fill_between(x, low, high, color=colour, alpha=0.1 if crowded else 0.2, linewidth=0)
                else:
                    ax.vlines(x, low, high, color=colour, alpha=0.5)
        ticks = sorted({v for x, *_ in curves.values() for v in x})
        if "x" in log:
            ax.set_xscale("log", base=2)
        if "x" in log or (len(ticks) <= 4 and all(v == round(v) for v in ticks)):
            ax.set_xticks(ticks, [f"{v:g}" for v in ticks])
        if "y" in log:
            ax.set_yscale("log")
        ax.set_title(title, color=grey, fontsize=11)
        ax.set_xlabel(x_label, color=grey)
        ax.tick_params(colors=grey, which="both")
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(grey)
        ax.patch.set_alpha(0)
        ax.grid(alpha=0.2, color=grey)
    if crowded:  # within a panel a legend would hide curves
        shown = dict(item for ax in figure.axes for item in zip(*ax.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(shown.values(), shown, loc="outside right upper", frameon=False, labelcolor=grey, fontsize=9)
    else:
        for ax in figure.axes:
            ax.legend(frameon=False, labelcolor=grey, fontsize=9)
    figure.axes[0].set_ylabel(y_label, color=grey)
    figure.savefig(path, transparent=True, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
    return Path(path)

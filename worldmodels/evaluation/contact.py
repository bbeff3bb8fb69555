"""A contact sheet: frames from all over a store on one picture."""

from pathlib import Path

import numpy as np

from worldmodels.data.disk import atomic
from worldmodels.data.store import Store
from worldmodels.evaluation.pictures import BACKGROUND, INK
from worldmodels.types import UserError

_LEAST = 168  # pixels, width of a picture: room for its caption
_GAP, _LINE = 6, 15


def spread(lengths: np.ndarray, count: int) -> np.ndarray:
    """At most `count` different steps, evenly over the episodes of `lengths` (E,): (n, 2) int64, episode and step."""
    place = (np.arange(count) + 0.5) * len(lengths) / count
    episode = place.astype(np.int64)
    # within an episode evenly where it has many, and else at ever different places (multiples of the golden ratio)
    within = place - episode if count > len(lengths) else np.arange(count) * 0.618034 % 1
    return np.unique(np.stack([episode, (within * lengths[episode]).astype(np.int64)], 1), axis=0)


def contact_sheet(path: str | Path, store: Store, count: int = 48) -> Path:
    """Write a PNG of frames from all over the store, each with its episode, return and step.

    Args:
        path: where it is written.
        store: what the frames are taken from.
        count: at most how many frames.

    Raises:
        UserError: `count` is no number of pictures.
    """
    from PIL import Image, ImageDraw, ImageFont

    if count < 1:
        raise UserError(f"pictures={count} must be at least 1")
    chosen = spread(store.lengths, count)
    frames = store.read(chosen, 1).obs[:, 0].permute(0, 2, 3, 1).numpy()
    frames = np.broadcast_to(frames, (*frames.shape[:3], 3))
    scale = -(-_LEAST // frames.shape[2])
    height, width = frames.shape[1] * scale, frames.shape[2] * scale
    across = min(len(chosen), 8)
    down, cell, tall = -(-len(chosen) // across), width + _GAP, height + 2 * _LINE + _GAP
    top = 30
    sheet = Image.new("RGB", (across * cell + _GAP, top + down * tall + _GAP), (BACKGROUND,) * 3)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    title = f"{store.card['game']}: {int(store.lengths.sum()):,} frames in {len(store.lengths):,} episodes"
    draw.text((_GAP, top / 2), title, INK, ImageFont.load_default(15), "lm")
    for k, (frame, (episode, step)) in enumerate(zip(frames, chosen.tolist(), strict=True)):
        x, y = _GAP + k % across * cell, top + k // across * tall
        sheet.paste(
            Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.NEAREST), (x, y)
        )
        known = store.episode_info(episode)
        draw.text((x, y + height + _LINE / 2 + 1), f"episode {episode}, return {known['return']:g}", INK, font, "lm")
        draw.text((x, y + height + 1.5 * _LINE), f"step {step} of {known['length']}", INK, font, "lm")
    with atomic(Path(path)) as tmp:
        sheet.save(tmp, "PNG")
    return Path(path)

"""Frames of another size or colour than the log has, made when they are read, for those who ask for it."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from worldmodels.data.card import GREYS, Card
from worldmodels.types import Segment, UserError

COLOURS = {"rgb": (3, "rgb"), "gray": (1, "cv2_gray")}
"""Setting to (channels, name in the card)."""


@dataclass(frozen=True)
class Transform:
    """Area interpolation to `size` x `size`, and luma of coloured frames or grey frames thrice; None leaves as it is.

    A store in the wanted form is better where it can be had: resizing costs more than reading.

    Args:
        size: height and width in pixels.
        colour: rgb or gray.

    Raises:
        UserError: a setting is out of range.
    """

    size: int | None = None
    colour: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (type(self.size) is not int or not 0 < self.size <= 1024):
            raise UserError(f"data.transform.size={self.size} must be a whole number of pixels from 1 to 1024, or null")
        if self.colour not in (None, *COLOURS):
            raise UserError(
                f"data.transform.colour={self.colour} is unknown; choose one of {', '.join(COLOURS)}, or null"
            )

    def card(self, card: Card) -> Card:
        """The dataset card of transformed frames."""
        obs = dict(card["obs"])
        if self.size is not None and (obs["height"], obs["width"]) != (self.size, self.size):
            obs |= {"height": self.size, "width": self.size, "resize": "area", "resized_when_read": True}
        if self.colour == "rgb" or (self.colour == "gray" and obs["colour"] not in GREYS):
            obs |= dict(zip(("channels", "colour"), COLOURS[self.colour], strict=True))
        return {**card, "obs": obs}

    def frames(self, frames: np.ndarray) -> np.ndarray:
        """Frames (N, C, H, W) uint8, transformed."""
        import cv2

        # One small image at a time, which cv2 does in this thread; a large one would wake its own team of threads.
        if self.colour == "gray" and frames.shape[1] == 3:
            frames = np.stack([cv2.cvtColor(cv2.merge(list(f)), cv2.COLOR_RGB2GRAY)[None] for f in frames])
        if self.size is not None and frames.shape[2:] != (self.size, self.size):
            small = np.empty((*frames.shape[:2], self.size, self.size), np.uint8)
            for planes, out in zip(frames, small, strict=True):
                for plane, target in zip(planes, out, strict=True):
                    cv2.resize(plane, (self.size, self.size), dst=target, interpolation=cv2.INTER_AREA)
            frames = small
        if self.colour == "rgb" and frames.shape[1] == 1:
            frames = np.repeat(frames, 3, axis=1)
        return frames

    def __call__(self, segment: Segment) -> Segment:
        """A segment with its frames transformed."""
        obs = segment.obs.numpy()
        frames = self.frames(obs.reshape(-1, *obs.shape[2:]))
        return replace(segment, obs=torch.from_numpy(frames.reshape(*obs.shape[:2], *frames.shape[1:])))

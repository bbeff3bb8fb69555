"""Frames as a network of the diffusion world model takes and gives them: floats in [-1, 1], padding, noise.

Legend: B batch, L frames of context, T transitions, C colour channels, H and W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from worldmodels.types import Segment


def to_float(frames: Tensor) -> Tensor:
    """uint8 frames to float32 in [-1, 1]."""
    return frames.float().div(127.5).sub(1)


def images_of(segment: Segment, padding: str) -> Tensor:
    """The frames of a segment as float32 (B, T+1, C, H, W) in [-1, 1]; padding is "black" (-1) or "grey" (0)."""
    images = to_float(segment.obs)
    return images if padding == "black" else torch.where(logged_frames(segment), images, 0.0)


def logged_frames(segment: Segment) -> Tensor:
    """Which frames are no padding, (B, T+1, 1, 1, 1) bool."""
    return (F.pad(segment.mask, (0, 1)) | F.pad(segment.next_mask, (1, 0)))[..., None, None, None]


def to_uint8(images: Tensor, rounding: bool = True) -> Tensor:
    """Float images in [-1, 1] to uint8; without rounding the fraction is cut off (DIAMOND: half a level darker)."""
    levels = images.clamp(-1, 1).add(1).mul(127.5)
    return (levels.round() if rounding else levels).to(torch.uint8)


def blurred(context: Tensor, level: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Context (B, L, C, H, W) with Gaussian noise of standard deviation level (B,)."""
    noise = torch.randn(context.shape, generator=generator, device=context.device)
    return context + level[:, None, None, None, None] * noise

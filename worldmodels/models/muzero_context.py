"""What a MuZero is shown: the frames before each row of a window, in training shifted and of other brightness.

Legend: B batch, N rows, T transitions, F frames of context, C channels, H and W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from worldmodels.types import Segment, UserError


def contexts(model: Any, segment: Segment, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `MuZero.represent` takes, for the frame of each of R rows: (B * R, F, ...), row by row of the batch.

    The frame of row T is the one after the last action. Frames before the window count as before the episode.

    Args:
        model: the `MuZero` that is shown them.
        segment: windows (B, T) with frames uint8.
        rows: R numbers from 0 to T.

    Returns:
        Frames (B * R, F, C, H, W) uint8; actions between them (B * R, F-1) int64, places in the model's; which frames
        are of the episode, (B * R, F) bool; and the game (B * R,) int64, its row in the vocabulary, or 0.

    Raises:
        UserError: frames of another size, colour or type than the model's.
    """
    shape = (model.image_channels, model.image_size, model.image_size)
    if tuple(segment.obs.shape[2:]) != shape or segment.obs.dtype != torch.uint8:
        raise UserError(
            f"the model sees frames {shape} uint8 (channels, height, width) but got {tuple(segment.obs.shape[2:])} "
            f"{segment.obs.dtype}; give it the preprocessing of its own log"
        )
    length = segment.length
    there = F.pad(segment.mask, (0, 1)) | F.pad(segment.mask & segment.next_mask, (1, 0))
    at = torch.tensor(rows, device=segment.obs.device)[:, None] + torch.arange(
        1 - model.frames, 1, device=segment.obs.device
    )
    inside = at.clamp(0, length)
    real = there[:, inside] & (at >= 0)
    # a row counts only if all rows from it to the last are of one episode
    joined = F.pad(segment.mask & segment.next_mask, (0, 1))[:, inside[:, :-1]] & (at[:, :-1] >= 0)
    place = model.places(segment)[:, at[:, :-1].clamp(0, length - 1)]
    if model.blend is not None:  # what cannot be expected is not joined
        joined &= place >= 0
    real[..., :-1] &= joined.flip(-1).cumprod(-1).flip(-1).bool()
    game = torch.zeros_like(segment.action[:, 0]) if model.games is None else model.games.rows(segment)
    told = segment.obs[:, inside].flatten(0, 1), place.clamp(min=0).flatten(0, 1), real.flatten(0, 1)
    return *told, game.repeat_interleave(len(rows))


def changed(model: Any, frames: Tensor, generator: torch.Generator | None) -> Tensor:
    """Frames (N, F, C, H, W) uint8 as pixels: in training shifted and of other brightness, each in its own way.

    Args:
        model: the `MuZero`, with the greatest `shift` in pixels and the deviation `intensity` of the brightness.
        frames: of N contexts.
        generator: of the draws.

    Returns:
        (N, F, C, H, W) float, as `MuZero.pixels` gives them.
    """
    rows, device = len(frames), frames.device
    if model.shift and model.training:
        moves = torch.randint(-model.shift, model.shift + 1, (2, rows, 1), generator=generator, device=device)
        place = (torch.arange(model.image_size, device=device) + moves).clamp(0, model.image_size - 1)
        row = torch.arange(rows, device=device)[:, None, None]
        frames = frames[row, :, :, place[0, :, :, None], place[1, :, None, :]].permute(0, 3, 4, 1, 2)
    pixels = model.pixels(frames)
    if model.intensity and model.training:
        noise = torch.randn(rows, generator=generator, device=device).clamp(-2, 2)
        pixels = pixels * (1 + model.intensity * noise)[:, None, None, None, None]
    return pixels

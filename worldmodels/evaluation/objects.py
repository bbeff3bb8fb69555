"""Where the paddle and the ball are in 64x64 RGB frames of Pong and Breakout, found by colour.

A pixel of a frame that was shrunk by area interpolation is background plus, for each sprite, its coverage of that
pixel times (sprite colour - background colour). Three sprite colours make this a 3x3 linear system, so the coverage
of each sprite is solved exactly, sprites of like brightness (paddles, score digits) do not pass for the ball, and a
half-hidden ball has half the coverage. A sprite is where a small window holds the most coverage; its place is the
centroid of the coverage there, to a fraction of a pixel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sprite:
    """How one sprite looks and where it can be.

    Args:
        colour: index into the game's colours.
        rows: the rows searched, as (first, past the last).
        cols: the columns searched, likewise.
        window: odd height and width, in pixels, of the window that holds the sprite in two max-pooled raw frames.
        core: odd height and width of the smaller window that must be covered for the sprite to be there at all.
        least: coverage of the core, in pixels, below which the sprite counts as absent: a third of the real one's, so
            that a ghost is not found.
    """

    colour: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    window: tuple[int, int]
    core: tuple[int, int]
    least: float


@dataclass(frozen=True, slots=True)
class Game:
    """Background colour, sprite colours (three, RGB 0..255) and sprites of a game."""

    background: tuple[int, int, int]
    colours: tuple[tuple[int, int, int], ...]
    sprites: dict[str, Sprite]


# A whole ball of 2x4 raw pixels in 160x210 covers 0.98 pixels, the paddle of Pong 1.6 of each row, that of Breakout
# 4.3 of the middle 5 of its row. Walls are white or grey, so that a paddle half hidden behind one is still told apart.
GAMES = {
    "pong": Game(
        background=(144, 72, 17),
        colours=((236, 236, 236), (92, 186, 92), (213, 130, 74)),
        sprites={
            "paddle": Sprite(1, rows=(9, 61), cols=(55, 59), window=(9, 3), core=(1, 3), least=0.53),
            "ball": Sprite(0, rows=(11, 59), cols=(0, 64), window=(3, 5), core=(3, 5), least=0.33),
        },
    ),
    "breakout": Game(
        background=(0, 0, 0),
        colours=((200, 72, 72), (66, 158, 130), (142, 142, 142)),
        sprites={
            "paddle": Sprite(0, rows=(57, 59), cols=(3, 61), window=(1, 9), core=(1, 5), least=1.4),
            "ball": Sprite(0, rows=(29, 57), cols=(3, 61), window=(3, 3), core=(3, 3), least=0.33),
        },
    ),
}


SHAPE = (3, 64, 64)
"""Channels, height and width of the frames that the places and sizes of sprites are told for."""


def without_objects(frames: Tensor, game: str) -> str | None:
    """Why nothing is found in frames (..., C, H, W) of a game that has sprites to be found; None where they are."""
    channels, height, width = frames.shape[-3:]
    if game not in GAMES or (channels, height, width) == SHAPE:
        return None
    return (
        f"Ball and paddle were not measured: they are found in RGB frames of 64x64 pixels alone, and these are "
        f"{'grey' if channels == 1 else 'RGB'} ones of {height}x{width}"
    )


def find_objects(frames: Tensor, game: str) -> dict[str, Tensor]:
    """The places of the sprites of `game` in frames (N, 3, 64, 64) uint8.

    Returns:
        By sprite name ("paddle" is the agent's, "ball"), (N, 2) float32 (row, column) in pixels, pixel centres at
        whole numbers; NaN where the sprite is not found. Empty for games without detectors and for other frames.
    """
    if game not in GAMES or frames.shape[1:] != SHAPE:
        return {}
    spec = GAMES[game]
    background = torch.tensor(spec.background, dtype=torch.float32)
    unmix = torch.linalg.inv((torch.tensor(spec.colours, dtype=torch.float32) - background).T)
    coverage = torch.einsum("sc,nchw->nshw", unmix, frames.float().cpu() - background[:, None, None])
    return {name: _locate(coverage[:, s.colour], s) for name, s in spec.sprites.items()}


def _locate(coverage: Tensor, sprite: Sprite) -> Tensor:
    (top, bottom), (left, right) = sprite.rows, sprite.cols
    # coverage (N, h, w); faint noise of an imagined background must not add up to a ball
    coverage = F.relu(coverage[:, top:bottom, left:right].clamp(max=1) - 0.08)
    height, width = sprite.window
    mass = _box(coverage, sprite.window)
    index = mass.flatten(1).argmax(1)
    place = torch.stack([index // mass.shape[2], index % mass.shape[2]], 1).float()
    present = _box(coverage, sprite.core).flatten(1).amax(1) >= sprite.least
    y = torch.arange(mass.shape[1], dtype=torch.float32)[None, :, None]
    x = torch.arange(mass.shape[2], dtype=torch.float32)[None, None, :]
    for _ in range(2):  # twice: of several equally full windows the first is found, which holds the sprite at one side
        near = (y - place[:, :1, None]).abs() <= height / 2
        near = near & ((x - place[:, 1:, None]).abs() <= width / 2)
        inside = coverage * near
        total = inside.sum((1, 2)).clamp(min=1e-6)
        place = torch.stack([(inside * y).sum((1, 2)) / total, (inside * x).sum((1, 2)) / total], 1)
    place = place + torch.tensor([top, left], dtype=torch.float32)
    return place.masked_fill(~present[:, None], float("nan"))


def _box(coverage: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum of coverage (N, h, w) over a window of odd `size` around each pixel."""
    height, width = size
    return height * width * F.avg_pool2d(coverage, size, stride=1, padding=(height // 2, width // 2))

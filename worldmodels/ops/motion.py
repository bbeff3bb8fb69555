"""The next frame guessed from motion alone: what has just appeared moves on as it came (block matching, as in video
coding). A ball of two pixels that crosses the screen in ten steps is drawn in the right place without any learning.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MOST = 40  # moving pixels that are followed, those that changed most
FINE = 3  # displacements are found to a third of a pixel: half a pixel a step would be four after eight


def move_on(frames: Tensor, reach: tuple[int, int] = (5, 7), threshold: float = 0.1) -> Tensor:
    """The last frame with its moving pixels moved on by one step of their own motion.

    A pixel moves where it differs from both frames before. Its displacement d is the one for which its neighbourhood,
    and those of the moving pixels beside it, agree best with the k-th frame before at p - k d. The pixels around p + d
    then show what the last frame has at a distance of d (bicubic, since a ball that is blurred at every step fades).
    Where p leaves nothing of its kind behind, the ground is seen again, the median of the three frames before.

    Args:
        frames: (B, L, C, H, W) float in [-1, 1], L >= 4.
        reach: largest displacement in a step, pixels down and across.
        threshold: least change of a pixel that moves.

    Returns:
        (B, C, H, W) in [-1, 1].
    """
    last, (h, w) = frames[:, -1], frames.shape[-2:]
    a, b, c = frames[:, -4:-1].unbind(1)
    # the median of the three (torch.median is slow): a slow thing still covers part of its place in the frame before
    ground = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    change = (frames[:, -3:-1] - frames[:, -1:]).abs().amax(2).amin(1).flatten(1)  # (B, H*W)
    change, place = change.topk(min(MOST, h * w), dim=1)  # (B, K)
    moves = change > threshold
    y, x = place // w, place % w
    beside = ((y[:, :, None] - y[:, None]).abs() <= 2) & ((x[:, :, None] - x[:, None]).abs() <= 2)
    beside = beside * (change * moves)[:, None]  # (B, K, K), what has changed more counts more

    # Blurred, or a ball that covers pixels in part looks different at every step and matches nothing.
    grey = F.avg_pool2d(F.pad(frames[:, -4:].mean(2), (1, 1, 1, 1), mode="replicate"), 3, 1).flip(1)
    dy, dx = _grid(*reach, frames.device)
    # of equally good displacements the smallest
    coarse = _Windows(grey, y, x, 1, (2 * reach[0], 2 * reach[1]))
    cost = coarse.mismatch(dy, dx, 1) + 0.5 * coarse.mismatch(2 * dy, 2 * dx, 2)
    best = (beside @ (cost + 2e-3 * (dy.abs() + dx.abs()))).argmin(-1, keepdim=True)
    fy, fx = _grid(2, 2, frames.device)
    fy, fx = FINE * dy[best] + fy, FINE * dx[best] + fx  # (B, K, 25)
    furthest = (3 * (FINE * reach[0] + 2), 3 * (FINE * reach[1] + 2))
    scaled = F.interpolate(grey, scale_factor=FINE, mode="bilinear")
    fine = _Windows(scaled, FINE * y + 1, FINE * x + 1, FINE, furthest)
    cost = sum(fine.mismatch(k * fy, k * fx, k) for k in (1, 2, 3))
    best = (beside @ cost).argmin(-1, keepdim=True)
    vy, vx = fy.gather(2, best)[..., 0] / FINE, fx.gather(2, best)[..., 0] / FINE

    colour = _colour(last, y, x)
    # by the rest of a larger thing
    followed = (colour - _colour(last, y - vy.round().long(), x - vx.round().long())).abs().amax(1) < 0.1
    left = torch.where((moves & ~followed)[:, None], _colour(ground, y, x), colour)
    moved = F.pad(last.flatten(2).scatter(2, _index(place, last), left), (0, 1))
    # the up to four pixels that it comes to cover in part
    ty, tx = (y + vy)[..., None], (x + vx)[..., None]
    ty = torch.cat([ty.floor(), ty.floor(), ty.ceil(), ty.ceil()], -1).flatten(1)  # (B, 4K)
    tx = torch.cat([tx.floor(), tx.ceil(), tx.floor(), tx.ceil()], -1).flatten(1)
    source = torch.stack([tx - vx.repeat_interleave(4, 1), ty - vy.repeat_interleave(4, 1)], -1)
    source = ((2 * source + 1) / torch.tensor([w, h], device=y.device) - 1).to(last.dtype)  # as grid_sample counts
    colour = F.grid_sample(last, source[:, None], mode="bicubic", padding_mode="border", align_corners=False)[:, :, 0]
    inside = moves.repeat_interleave(4, 1) & (ty >= 0) & (ty < h) & (tx >= 0) & (tx < w)
    target = torch.where(inside, ty * w + tx, h * w).long()  # what leaves the screen goes to one more pixel
    # of two that meet in one place the brighter is seen, whatever the order that a device writes them in
    moved = moved.scatter_reduce(2, _index(target, last), colour.clamp(-1, 1), "amax", include_self=False)
    return moved[..., :-1].view_as(last)


def _grid(ry: int, rx: int, device: torch.device) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(-ry, ry + 1), torch.arange(-rx, rx + 1), indexing="ij")
    return y.flatten().to(device), x.flatten().to(device)


class _Windows:
    """The 3x3 neighbourhoods of K places in each of several images, to be found again in the others.

    Args:
        images: (B, L, H, W), newest first; their borders are repeated outwards.
        y: (B, K) rows of the places.
        x: (B, K) columns.
        stride: distance of neighbours, in pixels.
        furthest: largest displacement, pixels down and across.
    """

    def __init__(self, images: Tensor, y: Tensor, x: Tensor, stride: int, furthest: tuple[int, int]) -> None:
        ry, rx = furthest[0] + stride, furthest[1] + stride
        padded = F.pad(images, (rx, rx, ry, ry), mode="replicate")
        self.width, self.images = padded.shape[-1], padded.flatten(2)
        ny, nx = _grid(1, 1, images.device)
        # a place is one number, and so is a displacement: padding spares every look-up its bounds
        self.places = ((y + ry) * self.width + x + rx)[..., None] + stride * (ny * self.width + nx)  # (B, K, 9)
        self.here = self._at(0, self.places)

    def _at(self, image: int, place: Tensor) -> Tensor:
        return self.images[:, image].gather(1, place.flatten(1)).view(place.shape)

    def mismatch(self, dy: Tensor, dx: Tensor, ago: int) -> Tensor:
        """How badly image 0 agrees with image `ago` at displacements back, (D,) or (B, K, D): (B, K, D)."""
        back = (dy * self.width + dx)[..., None]
        return (self.here[:, :, None] - self._at(ago, self.places[:, :, None] - back)).abs().mean(-1)


def _colour(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Pixels of (B, C, H, W) at (B, K): (B, C, K)."""
    h, w = image.shape[-2:]
    return image.flatten(2).gather(2, _index(y.clamp(0, h - 1) * w + x.clamp(0, w - 1), image))


def _index(place: Tensor, image: Tensor) -> Tensor:
    return place[:, None].expand(-1, image.shape[1], -1)

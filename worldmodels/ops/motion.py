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
    ground = frames[:, -4:-1].median(1).values  # a slow thing still covers part of its place in the frame before
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
    cost = _mismatch(grey, y, x, dy, dx, 1) + 0.5 * _mismatch(grey, y, x, 2 * dy, 2 * dx, 2)
    best = (beside @ (cost + 2e-3 * (dy.abs() + dx.abs()))).argmin(-1, keepdim=True)
    fy, fx = _grid(2, 2, frames.device)
    fy, fx = FINE * dy[best] + fy, FINE * dx[best] + fx  # (B, K, 25)
    fine, fine_y, fine_x = F.interpolate(grey, scale_factor=FINE, mode="bilinear"), FINE * y + 1, FINE * x + 1
    cost = sum(_mismatch(fine, fine_y, fine_x, k * fy, k * fx, k, FINE) for k in (1, 2, 3))
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
    source = (2 * source + 1) / torch.tensor([w, h], device=y.device) - 1  # as grid_sample counts
    colour = F.grid_sample(last, source[:, None], mode="bicubic", padding_mode="border", align_corners=False)[:, :, 0]
    inside = moves.repeat_interleave(4, 1) & (ty >= 0) & (ty < h) & (tx >= 0) & (tx < w)
    target = torch.where(inside, ty * w + tx, h * w).long()  # what leaves the screen goes to one more pixel
    # of two that meet in one place the brighter is seen, whatever the order that a device writes them in
    moved = moved.scatter_reduce(2, _index(target, last), colour.clamp(-1, 1), "amax", include_self=False)
    return moved[..., :-1].view_as(last)


def _grid(ry: int, rx: int, device: torch.device) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(-ry, ry + 1), torch.arange(-rx, rx + 1), indexing="ij")
    return y.flatten().to(device), x.flatten().to(device)


def _mismatch(images: Tensor, y: Tensor, x: Tensor, dy: Tensor, dx: Tensor, ago: int, stride: int = 1) -> Tensor:
    """How badly 3x3 neighbourhoods of image 0 agree with those of image `ago` at a displacement back: (B, K, D).

    Images are (B, L, H, W), newest first; places `y`, `x` (B, K); displacements `dy`, `dx` (D,) or (B, K, D); `stride`
    is the distance of neighbours.
    """
    py, px = _grid(1, 1, images.device)
    y, x = y[..., None, None] + stride * py, x[..., None, None] + stride * px  # (B, K, 1, 9)
    there = _at(images[:, ago], y - dy[..., None], x - dx[..., None])
    return (_at(images[:, 0], y, x) - there).abs().mean(-1)


def _at(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values of (B, H, W) at (B, ...), the border repeated outwards."""
    h, w = image.shape[-2:]
    return image.flatten(1).gather(1, (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).flatten(1)).view(y.shape)


def _colour(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Pixels of (B, C, H, W) at (B, K): (B, C, K)."""
    h, w = image.shape[-2:]
    return image.flatten(2).gather(2, _index(y.clamp(0, h - 1) * w + x.clamp(0, w - 1), image))


def _index(place: Tensor, image: Tensor) -> Tensor:
    return place[:, None].expand(-1, image.shape[1], -1)

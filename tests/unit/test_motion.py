"""What moves goes on as it came; what stands still, and what lies behind, stays."""

import pytest
import torch

from worldmodels.ops.motion import move_on


def scene(positions, height=2.0, width=1.0, value=0.9, size=48):
    """(1, L, 3, size, size): a bright block at each position, by the area it covers, over a textured ground."""
    ground = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 0.1 - 0.8
    pixel = torch.arange(size)

    def covered(start, extent):
        return (torch.minimum(pixel + 1, torch.tensor(start + extent)) - pixel.clamp(min=start)).clamp(0, 1)

    masks = [covered(y, height)[:, None] * covered(x, width) for y, x in positions]
    return torch.stack([ground + mask * (value - ground) for mask in masks])[None]


def flight(step, count):
    """Positions from a place from which the flight stays on the screen."""
    return [(24 + (k - 2) * step[0], 24 + (k - 2) * step[1]) for k in range(count)]


@pytest.mark.parametrize("step", [(0, 5), (-3, 2), (4, -6), (5, 7), (-5, -7)])
def test_a_block_in_flight_is_drawn_where_it_will_be(step):
    frames = scene(flight(step, 5))
    torch.testing.assert_close(move_on(frames[:, :4]), frames[:, 4])


@pytest.mark.parametrize("step", [(0, 5 / 3), (1 / 3, -4 / 3), (-2 / 3, 2.5)])
def test_speeds_between_pixels_hardly_drift(step):
    frames = scene(flight(step, 9))
    seen = frames[:, :4]
    for _ in range(5):
        seen = torch.cat([seen[:, -3:], move_on(seen[:, -4:])[:, None]], 1)
    ground, pixel = scene([(0, 0)], height=0)[:, -1], torch.arange(48.0)
    where = []
    for f in (seen, frames):
        block = (f[:, -1] - ground).mean((0, 1)).sub(0.3).clamp(min=0)  # without its blur
        where.append(torch.stack([block.sum(1) @ pixel, block.sum(0) @ pixel]) / block.sum())
    assert (where[0] - where[1]).norm() <= 1


def test_a_scene_that_stands_still_stays():
    frames = scene([(5, 5)] * 4)
    assert torch.equal(move_on(frames), frames[:, -1])


def test_what_leaves_the_screen_is_gone():
    moved = move_on(scene([(10, 27), (10, 33), (10, 39), (10, 45)]))
    torch.testing.assert_close(moved, scene([(0, 0)], height=0)[:, 0])


def test_rows_of_a_batch_do_not_touch():
    a, b = scene([(10, 3), (12, 7), (14, 11), (16, 15)]), scene([(3, 3)] * 4, value=0.5)
    both = move_on(torch.cat([a, b]))
    torch.testing.assert_close(both, torch.cat([move_on(a), move_on(b)]))

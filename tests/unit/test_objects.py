"""Detectors against the console's memory, and against frames made by hand."""

import numpy as np
import pytest
import torch

from worldmodels.evaluation.objects import find_objects

BROWN, WHITE, GREEN, ORANGE = (144, 72, 17), (236, 236, 236), (92, 186, 92), (213, 130, 74)


def play(game: str, steps: int, press) -> tuple[torch.Tensor, np.ndarray]:
    """Frames (N, 3, 64, 64) as collected, and the memory (N, 2, 128) at both raw frames that each was pooled from."""
    ale_py = pytest.importorskip("ale_py")
    import cv2

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", 3)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path(game))
    ale.reset_game()
    rng, frames, memory = np.random.default_rng(0), [], []
    while len(frames) < steps:
        action = ale_py.Action(int(press(ale.getRAM(), rng)))
        screens, rams = [], []
        for _ in range(4):
            ale.act(action)
            screens.append(ale.getScreenRGB())
            rams.append(ale.getRAM().copy())
        frames.append(cv2.resize(np.maximum(*screens[2:]), (64, 64), interpolation=cv2.INTER_AREA))
        memory.append(rams[2:])
        if ale.game_over():
            ale.reset_game()
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), np.array(memory, float)


def follow(paddle: int, ball: int, offset: float, less: int, more: int):
    def press(ram, rng):
        if rng.random() < 0.25:
            return rng.choice([0, 1, less, more])
        return more if float(ram[ball]) + rng.normal(0, 8) > float(ram[paddle]) + offset else less

    return press


def share_within_a_pixel(
    found: torch.Tensor, row: np.ndarray | None, col: np.ndarray | None, where: np.ndarray
) -> float:
    error = np.zeros(len(found))
    for axis, true in ((0, row), (1, col)):
        if true is not None:
            error = np.maximum(error, np.abs(found[:, axis].numpy() - true))
    return float(np.mean(error[where] <= 1))  # NaN, not found, is not within


def test_pong_agrees_with_memory():
    frames, ram = play("pong", 1500, follow(51, 54, 6, less=3, more=4))
    found = find_objects(frames, "pong")
    x, y = ram[:, :, 49], ram[:, :, 54]
    in_play = (x > 0).all(1) & (y > 48).all(1) & (y < 206).all(1)  # beyond, it is behind a wall
    assert in_play.sum() > 800
    row, col = 0.3042 * y.mean(1) - 4.10, 0.4 * x.mean(1) - 19.70  # 64/210 and 64/160 pixels a unit
    assert share_within_a_pixel(found["ball"], row, col, in_play) > 0.98
    # what can be seen of the paddle, 16 raw pixels high, between the walls
    centre = 0.3042 * ram[:, :, 51] - 1.99
    top, bottom = np.maximum(centre.min(1) - 2.4, 10.0), np.minimum(centre.max(1) + 2.4, 58.7)
    assert (
        share_within_a_pixel(found["paddle"], (top + bottom) / 2, np.full(len(row), 56.4), np.ones(len(row), bool))
        > 0.98
    )
    gone = (x == 0).all(1) | (y == 0).all(1)
    assert gone.sum() > 50 and found["ball"][gone, 0].isnan().float().mean() > 0.98


def test_breakout_agrees_with_memory():
    frames, ram = play("breakout", 1200, follow(72, 99, 8, less=4, more=3))
    found = find_objects(frames, "breakout")
    x, y = ram[:, :, 99], ram[:, :, 101]
    below_bricks = (y > 90).all(1) & (y < 172).all(1)
    assert below_bricks.sum() > 200
    row, col = 0.3033 * y.mean(1) + 3.05, 0.4 * x.mean(1) - 19.68
    assert share_within_a_pixel(found["ball"], row, col, below_bricks) > 0.98
    inside = (ram[:, :, 72] > 56).all(1) & (ram[:, :, 72] < 185).all(1)  # beyond, a wall hides a part
    assert share_within_a_pixel(found["paddle"], None, 0.4 * ram[:, :, 72].mean(1) - 16.04, inside) > 0.98


def pong_frame(ball: float = 1.0, paddle: float = 1.0) -> torch.Tensor:
    """A frame with the ball on rows 20..21, column 30, and the paddle on rows 30..34, in a share of their light."""
    frame = torch.tensor(BROWN).float()[:, None, None].repeat(1, 64, 64)
    for (rows, cols), colour, share in (
        ((slice(20, 22), slice(30, 31)), WHITE, 0.5 * ball),  # the ball covers about half of two pixels
        ((slice(30, 35), slice(56, 58)), GREEN, 0.8 * paddle),
        ((slice(40, 45), slice(6, 8)), ORANGE, 1.0),
    ):
        frame[:, rows, cols] += share * (torch.tensor(colour).float()[:, None, None] - frame[:, rows, cols])
    return frame.round().byte()[None]


def test_places_are_centroids():
    found = find_objects(pong_frame(), "pong")
    torch.testing.assert_close(found["ball"], torch.tensor([[20.5, 30.0]]), atol=0.05, rtol=0)
    torch.testing.assert_close(found["paddle"], torch.tensor([[32.0, 56.5]]), atol=0.05, rtol=0)


@pytest.mark.parametrize(("brightness", "seen"), [(1.0, True), (0.6, True), (0.3, False), (0.0, False)])
def test_ghosts_are_not_found(brightness, seen):
    found = find_objects(pong_frame(brightness, brightness), "pong")
    assert [bool(found[k].isnan().any()) for k in ("ball", "paddle")] == [not seen, not seen]


def test_grain_is_not_a_ball():
    grain = torch.randn((200, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 3
    found = find_objects((pong_frame(ball=0).float() + grain).clamp(0, 255).byte(), "pong")
    assert found["ball"].isnan().all() and not found["paddle"].isnan().any()


def test_other_games_and_sizes_have_no_detectors():
    assert find_objects(pong_frame(), "seaquest") == {}
    assert find_objects(torch.zeros((1, 3, 5, 5), dtype=torch.uint8), "pong") == {}

import cv2
import numpy as np
import pytest
import torch

from tests.unit.stores import card, filled
from worldmodels.data.transforms import Transform
from worldmodels.types import UserError

RNG = np.random.default_rng(0)


def image(frames):
    """(N, C, H, W) as cv2 has it."""
    return frames.transpose(0, 2, 3, 1)


def test_frames_are_what_cv2_makes_of_whole_pictures():
    frames = RNG.integers(0, 256, (5, 3, 30, 22), np.uint8)
    resized = Transform(size=16).frames(frames)
    want = [cv2.resize(f, (16, 16), interpolation=cv2.INTER_AREA) for f in image(frames)]
    np.testing.assert_array_equal(image(resized), want)
    gray = Transform(colour="gray").frames(frames)
    want = np.stack([cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in image(frames)])
    np.testing.assert_array_equal(gray[:, 0], want)
    both = Transform(16, "gray").frames(frames)
    np.testing.assert_array_equal(both[:, 0], [cv2.resize(f, (16, 16), interpolation=cv2.INTER_AREA) for f in want])
    coloured = Transform(16, "rgb").frames(frames[:, :1])
    np.testing.assert_array_equal(coloured, np.repeat(Transform(16).frames(frames[:, :1]), 3, 1))


def test_what_is_so_already_stays_as_it_is():
    for channels, colour in ((3, "rgb"), (1, "gray")):
        frames = RNG.integers(0, 256, (2, channels, 8, 8), np.uint8)
        assert Transform(8, colour).frames(frames) is frames
    assert Transform(8, "rgb").card(card()) == card() and Transform().card(card(1)) == card(1)


def test_the_gray_of_cv2_is_that_of_the_emulator():
    """So that frames logged in grey and colour frames turned grey may be mixed."""
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    colours = set()
    for game in ("breakout", "ms_pacman"):
        ale = ale_py.ALEInterface()
        ale.loadROM(ale_py.roms.get_rom_path(game))
        for step in range(100):
            ale.act(ale.getMinimalActionSet()[step % 3])
            if step % 33 == 0:
                rgb = ale.getScreenRGB()
                np.testing.assert_array_equal(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), ale.getScreenGrayscale())
                colours |= set(map(tuple, rgb.reshape(-1, 3).tolist()))
    assert len(colours) > 10


def test_segments_and_cards(tmp_path):
    store, _ = filled(tmp_path / "s", count=3)
    segment = store.read([[0, -2], [1, 0], [2, 3]], 4)
    changed = Transform(4, "gray")(segment)
    assert changed.obs.shape == (3, 5, 1, 4, 4) and changed.obs.dtype == torch.uint8
    assert not changed.obs[0, :2].any(), "padding stays zero"
    for name in ("action", "reward", "mask", "next_mask", "terminated", "truncated", "side"):
        assert getattr(changed, name) is getattr(segment, name)
    obs = Transform(4, "gray").card(store.card)["obs"]
    assert obs == {**store.card["obs"], "height": 4, "width": 4, "resize": "area", "resized_when_read": True,
                   "channels": 1, "colour": "cv2_gray"}  # fmt: skip
    grey = card(1) | {"obs": card(1)["obs"] | {"colour": "ale_gray"}}
    assert Transform(colour="gray").card(grey) == grey, "what is grey keeps its own name"


@pytest.mark.parametrize("settings", [(0,), (64.0,), (10**6,), (True,), (None, "grey")])
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match="data.transform.(size|colour)=.* (must be|is unknown)"):
        Transform(*settings)

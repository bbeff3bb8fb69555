"""Samples that differ where the future is open: windows are chosen by hand-made events, distances known by hand."""

import numpy as np
import pytest
import torch

from tests.unit.test_quality import Still, column, make_store
from tests.unit.test_replay import atari_store
from worldmodels.evaluation.spread import sample_spread
from worldmodels.types import Episode, UserError


class Coin(Still):
    """After an event (a bright frame in the context) the column is here or there by chance, else it stays."""

    def start(self, context):
        bright = (context.obs[:, :, 0, 0, 0] == 255).any(1)
        return super().start(context) | {"open": bright}

    def step(self, state, action, generator=None):
        new, step = super().step(state, action, generator)
        here, there = (torch.from_numpy(column(x)).permute(2, 0, 1) for x in (1, 5))
        heads = torch.rand(len(action), generator=generator) < 0.5
        drawn = torch.where(heads[:, None, None, None], here, there)
        frame = torch.where(state["open"][:, None, None, None], drawn, state["frame"])
        return {"frame": frame, "open": state["open"]}, step._replace(frame=frame)


class Grain(Coin):
    """Grain of up to 40 levels after an event, and of up to 4 elsewhere."""

    def step(self, state, action, generator=None):
        new, step = Still.step(self, state, action, generator)
        grain = (
            torch.rand(step.frame.shape, generator=generator) * torch.where(state["open"], 41, 5)[:, None, None, None]
        )
        return new | {"open": state["open"]}, step._replace(frame=grain.byte())


@pytest.fixture
def store(tmp_path):
    """Two events an episode, at steps 60 and 140; the frame after an event is marked."""
    games = []
    for _ in range(10):
        obs, no = np.stack([column(3)] * 201), np.zeros(200, bool)
        obs[[61, 141], 0, 0] = 255
        reward, lost = np.zeros(200, np.float32), no.copy()
        reward[60], lost[140] = 1, True
        games.append(Episode(obs[:-1], np.zeros(200, np.uint8), reward, no, no, lost, obs[-1]))
    return make_store(tmp_path / "s", games)


def test_spread_is_at_events_and_has_its_right_size(store):
    figures = sample_spread(Coin(), store, windows=50, samples=64, after=5, steps=6, progress=False)
    assert figures["at_events"]["windows"] == 2 * len(store.splits["test"])
    assert figures["elsewhere"]["windows"] == 50 and figures["elsewhere"]["frames"] == [0.0] * 6
    assert figures["ratio"] is None  # there is no spread elsewhere to compare with
    # two samples differ in half of the cases, then in six of 64 pixels by 196 levels
    expected = 196 * (6 / 64 / 2) ** 0.5
    assert figures["at_events"]["frames"] == pytest.approx([expected] * 6, rel=0.1)
    low, high = figures["at_events"]["frames_interval"][0]
    assert low <= figures["at_events"]["frames"][0] <= high
    assert "cannot be played again" in figures["without_emulator"] or "no sticky" in figures["without_emulator"]


def test_the_ratio_has_an_interval_over_episodes(store):
    figures = sample_spread(Grain(), store, split="train", windows=50, samples=4, after=5, steps=6, progress=False)
    low, high = figures["ratio_interval"]
    assert low <= figures["ratio"] <= high and low < high
    assert figures["ratio"] == pytest.approx(((41**2 - 1) / (5**2 - 1)) ** 0.5, rel=0.03)  # of uniform whole numbers
    assert sample_spread(Coin(), store, samples=2, progress=False)["ratio_interval"] is None


def test_what_is_certain_has_no_spread_and_no_event_is_no_error(store, tmp_path):
    figures = sample_spread(Still(), store, samples=2, progress=False)
    assert figures["at_events"]["frames"] == figures["elsewhere"]["frames"] == [0.0] * 16
    rest, no = np.stack([column(3)] * 101), np.zeros(100, bool)
    calm = Episode(rest[:-1], np.zeros(100, np.uint8), np.zeros(100, np.float32), no, no, no, rest[-1])
    figures = sample_spread(Still(), make_store(tmp_path / "calm", [calm] * 3), progress=False)
    assert figures["at_events"] == {"windows": 0} and figures["elsewhere"]["windows"] == 8 and figures["ratio"] is None
    with pytest.raises(UserError, match="take 2 or more"):
        sample_spread(Still(), store, samples=1, progress=False)


@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_the_real_game_is_open_where_its_actions_are_sticky(tmp_path, sticky):
    store = atari_store(tmp_path / "s", steps=1000, sticky_prob=sticky)
    figures = sample_spread(Still(), store, windows=3, after=2, steps=8, progress=False)
    assert figures["elsewhere"]["windows"] == 3 and figures["elsewhere"]["frames"] == [0.0] * 8
    if sticky:
        assert figures["without_emulator"] is None
        assert figures["real_elsewhere"]["windows"] == 3 and figures["real_elsewhere"]["frames"][-1] > 0.5
        assert figures["real_elsewhere"]["paddle_px"][-1] > 0.2
    else:
        assert "no sticky actions" in figures["without_emulator"] and "real_elsewhere" not in figures

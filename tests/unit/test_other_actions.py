"""What other actions do: a model that is the game itself is right in everything, one that never moves in nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.test_objects import pong_frame
from tests.unit.test_quality import Still, Walker, make_store, walk
from tests.unit.test_replay import atari_store
from worldmodels.evaluation.divergence import divergence_figures
from worldmodels.evaluation.other_actions import other_actions
from worldmodels.evaluation.replay import replay_states
from worldmodels.evaluation.rollouts import window_starts
from worldmodels.evaluation.stats import episode_weights
from worldmodels.types import Step

BURN_IN, STEPS, WINDOWS = 8, 20, 5


class Game:
    """The real game as a world model: knows the emulator's state behind each of the frames it may set out from."""

    def __init__(self, store) -> None:
        places = window_starts(store, "test", BURN_IN + STEPS, WINDOWS) + [0, BURN_IN]
        self.env, states = replay_states(store, places, progress=False)
        frames = store.read(places, 1).obs[:, 0]
        self.behind = {frame.numpy().tobytes(): s for frame, s in zip(frames, states, strict=True)}
        assert len(self.behind) == len(places)
        self.states: list = []

    def start(self, context):
        first = len(self.states)
        self.states += [self.behind[frame.numpy().tobytes()] for frame in context.obs[:, -1]]
        return {"state": torch.arange(first, len(self.states))}

    def step(self, state, action, generator=None):
        frames = []
        for k, a in zip(state["state"].tolist(), action.tolist(), strict=True):
            self.env.restore(self.states[k])
            frames.append(torch.from_numpy(self.env.step(a).obs).permute(2, 0, 1))
            self.states[k] = self.env.clone()
        no = torch.zeros(len(frames))
        return state, Step(torch.stack(frames), no, no.bool(), no, no, no.bool())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return atari_store(tmp_path_factory.mktemp("stores") / "pong", steps=1000)


def judge(model, store, **kw):
    settings = {"windows": WINDOWS, "steps": STEPS, "burn_in": BURN_IN, "batch_size": 2, "progress": False} | kw
    return other_actions(model, store, **settings)


def test_the_game_itself_moves_as_far_as_it_does_and_never_leaves(store):
    figures, films = judge(Game(store), store)
    assert torch.equal(films["real"], films["imagined"]) and films["real"].shape == (5, 21, 3, 64, 64)
    assert figures["apart_ratio"] == [1.0] * 5 and figures["dream_apart"] == figures["real_apart"]
    assert figures["real_apart"][4] > figures["real_apart"][0] > 0
    assert max(figures["paddle_real_apart_px"]) > 5
    assert figures["frames"]["psnr_changed_db"] == [100.0] * 5 and figures["without_emulator"] is None
    for told in figures["divergence"].values():
        assert told["dream"]["step"] == [None] * 5 and told["dream"]["together"] == [1.0] * STEPS
        assert told["copy_last"]["quartiles"][1] < 10


def test_what_never_moves_has_no_actions(store):
    figures, films = judge(Still(), store)
    assert figures["dream_apart"] == [0.0] * 5 and figures["apart_ratio"] == [0.0] * 5
    assert figures["frames"]["psnr_gain_db"] == [0.0] * 5
    for told in figures["divergence"].values():
        assert told["dream"] == told["copy_last"]
    assert torch.equal(films["imagined"][:, :1].expand_as(films["imagined"]), films["imagined"])


def test_without_an_emulator_the_dreams_alone_are_judged(tmp_path):
    store = make_store(tmp_path / "walks", [walk(k) for k in range(10)])
    figures, films = judge(Walker(), store, horizons=[1, 16, 64])
    assert "cannot be played again" in figures["without_emulator"] and "real_apart" not in figures
    assert figures["horizons"] == [1, 16] and films.keys() == {"imagined"}
    # the first action differs: the column goes the other way, six pixels are off by 196 levels
    assert figures["dream_apart"][0] == pytest.approx(196 * (6 / 64) ** 0.5, abs=1e-3)
    assert judge(Walker(), store, steps=500)[0]["steps"] == 80 - BURN_IN - 1


def test_a_log_with_a_single_action_has_no_others(tmp_path):
    games = [replace(walk(k), action=np.zeros(80, np.uint8)) for k in range(3)]
    figures, films = judge(Still(), make_store(tmp_path / "one", games))
    assert figures["windows"] == 0 and "a single action" in figures["without_emulator"] and not films


def test_a_dream_leaves_at_the_step_when_an_object_is_lost_or_too_far():
    real = pong_frame()[None].repeat(4, 6, 1, 1, 1)
    films = real.clone()
    films[1, 3:, :, 20:22] = films[1, 3:, :, 24:26]  # the ball is gone from the fourth step on
    films[2, 5] = films[2, 5].roll(5, dims=1)  # all has moved in the last step
    films[3, 2] = films[3, 2].roll(2, dims=1)  # within what is allowed
    alive = torch.ones(4, 6, dtype=torch.bool)
    weights = episode_weights(np.arange(4))
    last = torch.zeros_like(real[:, 0])
    told = divergence_figures({"dream": films}, real, last, alive, "pong", 12.0, weights)["objects"]
    assert told["dream"]["step"] == [None, 4.0, 6.0, None]
    assert told["dream"]["together"] == [1.0, 1.0, 1.0, 0.75, 0.75, 0.5]
    assert told["dream"]["quartiles"] == [4.0, 6.0, None]
    assert told["threshold"] == {"paddle_px": 3.0, "ball_px": 4.0}
    alive[2, 5:] = False
    told = divergence_figures({"dream": films}, real, last, alive, "pong", 12.0, weights)["objects"]
    assert told["dream"]["step"] == [None, 4.0, None, None]


def test_pixels_that_never_changed_are_not_judged():
    real = torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8)
    films = torch.full_like(real, 200)
    real[0, 2, :, 0] = 100  # in the last step something moves; the film is off by 100 of 255 there: 8.1 dB
    args = real[:, 0] * 0, torch.ones(1, 3, dtype=torch.bool), "toy"
    weights = episode_weights(np.arange(1))
    for threshold, step in ((8.0, None), (8.3, 3.0)):
        told = divergence_figures({"dream": films}, real, *args, threshold, weights)
        assert told.keys() == {"pixels"} and told["pixels"]["dream"]["step"] == [step]

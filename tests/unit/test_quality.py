"""Figures on toy worlds whose right values are known by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio

from tests.unit.test_objects import pong_frame
from worldmodels.data.card import make_card
from worldmodels.data.store import Store
from worldmodels.evaluation.averages import mean_figures
from worldmodels.evaluation.curves import quality_plots
from worldmodels.evaluation.events import reward_quality
from worldmodels.evaluation.frames import changed_pixels, frame_figures, frame_scores, static_films
from worldmodels.evaluation.quality import rollout_quality, summary
from worldmodels.evaluation.rollouts import window_starts
from worldmodels.evaluation.stats import episode_weights
from worldmodels.types import Episode, Step, UserError

RIGHT, LEFT = 3, 4
DARK, BRIGHT = 40, 236


def column(x: int) -> np.ndarray:
    frame = np.full((8, 8, 3), DARK, np.uint8)
    frame[2:5, x] = BRIGHT
    return frame


def walk(number: int, length: int = 80) -> Episode:
    """A bright column that steps around an 8x8 ring; +1 for passing the edge to the right, -1 to the left."""
    rng = np.random.default_rng(number)
    action = rng.choice([RIGHT, LEFT], length, p=[0.7, 0.3])
    place = np.cumsum([rng.integers(8), *np.where(action == RIGHT, 1, -1)])
    reward = np.diff(place // 8).astype(np.float32)
    no, frames = np.zeros(length, bool), np.stack([column(x) for x in place % 8])
    return Episode(frames[:-1], action.astype(np.uint8), reward, no, no, no, frames[-1])


def make_store(path, episodes, game="catch", side=8):
    card = make_card("toy", game, {"height": side, "width": side, "channels": 3}, seed=0)
    with Store.create(path, card) as store:
        for e in episodes:
            store.append(e)
    return Store.open(path)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "walks", [walk(i) for i in range(30)])


class Still:
    """Imagines that nothing moves and that every reward is `reward`."""

    def __init__(self, reward: float = 0.0) -> None:
        self.reward = reward

    def start(self, context):
        return {"frame": context.obs[:, -1]}

    def give(self, frame, reward):
        no = torch.zeros(len(frame), dtype=torch.bool)
        return {"frame": frame}, Step(frame, reward, no, reward, no.float(), no)

    def step(self, state, action, generator=None):
        return self.give(state["frame"], torch.full((len(action),), self.reward))


class Walker(Still):
    """Knows the rules of `walk`."""

    def step(self, state, action, generator=None):
        old = state["frame"][:, 0, 2].argmax(-1)
        new = old + torch.where(action == RIGHT, 1, -1)
        frame = torch.stack([torch.from_numpy(column(int(x))).permute(2, 0, 1) for x in new % 8])
        return self.give(frame, (new // 8).float())


def quality(model, store, **kw):
    return rollout_quality(model, store, **{"windows": 40, "progress": False} | kw)


def test_changed_means_by_more_than_8_levels_in_any_channel():
    last = torch.full((1, 3, 1, 3), 100, dtype=torch.uint8)
    true = last[:, None].clone()
    true[0, 0, 1, 0, 1], true[0, 0, 2, 0, 2] = 108, 91
    assert changed_pixels(true, last).flatten().tolist() == [False, False, True]


def test_a_perfect_model(store):
    figures = quality(Walker(), store)
    assert figures["psnr_db"] == [100.0] * 5  # the cap
    assert figures["psnr_changed_db"] == [100.0] * 5
    assert min(figures["psnr_gain_db"]) > 70 and min(figures["psnr_gain_changed_db"]) > 70
    assert figures["ssim"] == figures["ssim_changed"] == [1.0] * 5
    assert figures["reward_macro_f1"] == 1.0 and figures["reward_macro_f1_interval"] == [1.0, 1.0]
    assert figures["reward_calibration"]["error"] == figures["reward_calibration"]["error_of_alarms"] == 0
    assert figures["termination"]["events"] == 0 and figures["termination"]["f1_interval"] is None
    assert (figures["windows"], figures["episodes"]) == (40, 3)


def test_the_values_are_those_computed_by_hand(store):
    figures = quality(Still(), store, horizons=[1])
    one = -20 * math.log10((BRIGHT - DARK) / 255)
    static = figures["psnr_changed_static_db"]
    assert figures["changed_share"] == [round(6 / 64, 4)]  # three pixels where the column was, three where it is
    assert static["1.0"][0] == pytest.approx(one, abs=1e-3)  # copying errs on all of them,
    assert static["0.0"][0] == pytest.approx(one + 10 * math.log10(2), abs=1e-3)  # an empty frame on half,
    assert static["0.5"][0] == pytest.approx(one - 10 * math.log10((0.25 + 1) / 2), abs=1e-3)
    assert figures["psnr_changed_db"] == static["1.0"] and figures["psnr_gain_db"] == [0.0]
    assert figures["psnr_gain_changed_db"][0] == pytest.approx(-10 * math.log10(2), abs=1e-3)
    everywhere = one + 10 * math.log10(64 / 6)
    assert figures["psnr_static_db"]["1.0"][0] == pytest.approx(everywhere, abs=1e-3)


def test_a_still_model_has_the_similarity_of_a_copy_and_changed_pixels_the_least(store):
    figures = quality(Still(), store, horizons=[1, 4], reward_rows=0)
    assert figures["ssim"] == figures["ssim_static"]["1.0"] and figures["ssim_gain"] == [0.0, 0.0]
    assert figures["ssim_changed"] == figures["ssim_changed_static"]["1.0"]
    assert max(figures["ssim_changed"]) < min(figures["ssim"]) < 1
    assert set(figures["ssim_changed_static"]) == {"0.0", "0.5", "1.0"} and len(figures["psnr_static_db"]) == 11


def test_a_further_model_is_judged_on_the_same_rollouts(store):
    figures = quality(Walker(), store, baseline=Still(1.0))
    alone = quality(Still(1.0), store)
    second = figures["baseline"]
    for name in ("psnr_db", "psnr_changed_db", "ssim_changed", "reward_macro_f1", "psnr_changed_interval_db"):
        assert second[name] == alone[name]
    assert second["psnr_gain_changed_db"][0] == pytest.approx(100 - alone["psnr_changed_db"][0], abs=1e-3)
    assert {k: v for k, v in figures.items() if k != "baseline"} == quality(Walker(), store)
    assert any("further checkpoint" in line for line in summary(figures))


def test_each_store_counts_alike_in_the_mean(store):
    first = quality(Walker(), store, baseline=Still(), reward_rows=50)
    second = quality(Still(), store, baseline=Walker(), reward_rows=50, windows=9) | {"reward_macro_f1": None}
    mean = mean_figures([first, second])
    assert mean["windows"] == 49 and mean["reward_macro_f1"] == first["reward_macro_f1"]
    for name in ("ssim", "ssim_gain_changed", "psnr_changed_db"):
        assert mean[name] == pytest.approx(np.mean([first[name], second[name]], 0), abs=1e-4)
        together = [part["baseline"][name] for part in (first, second)]
        assert mean["baseline"][name] == pytest.approx(np.mean(together, 0), abs=1e-4)
    assert mean["psnr_static_db"].keys() == first["psnr_static_db"].keys() and not any("interval" in k for k in mean)
    assert summary(mean)[0].startswith("49 rollouts") and f"{mean['ssim'][0]:.2f}" in "".join(summary(mean))


def test_the_interval_holds_the_value(store):
    figures = quality(Still(), store, horizons=[2, 4])
    for name in ("psnr{}_db", "psnr_changed{}_db", "psnr_gain_changed{}_db", "ssim{}", "ssim_changed{}"):
        for value, (low, high) in zip(figures[name.format("")], figures[name.format("_interval")], strict=True):
            assert low <= value <= high and high - low < 6
    one_episode = quality(Still(), store, horizons=[2], split="validation", windows=1)
    assert one_episode["psnr_gain_changed_interval_db"][0] == one_episode["psnr_gain_changed_db"] * 2


def test_what_never_changed_has_no_number_and_is_valid_json(tmp_path):
    rest = np.stack([column(3)] * 60)
    no = np.zeros(60, bool)
    still = Episode(rest, np.full(60, 0, np.uint8), np.zeros(60, np.float32), no, no, no)
    figures = quality(Still(), make_store(tmp_path / "s", [still] * 4), horizons=[1])
    assert figures["psnr_changed_db"] == figures["psnr_gain_changed_db"] == [None]
    assert figures["reward_macro_f1"] is None and figures["reward_f1_events"] == 0
    assert any("none" in line for line in summary(figures))


def test_rewards_that_are_always_expected(store):
    reward = np.concatenate([walk(int(e)).reward[8:] for e in store.splits["test"]])
    share = (reward == 1).mean()
    for zero_rows in (10_000, 25):  # all rows, or a sample of those without reward, weighed up again
        figures = reward_quality(Still(1.0), store, zero_rows=zero_rows, progress=False)
        up, down = figures["reward_by_class"]["+1"], figures["reward_by_class"]["-1"]
        assert up["recall"] == 1.0 and up["precision"] == pytest.approx(share)
        assert up["f1"] == pytest.approx(2 * share / (1 + share))
        assert (down["recall"], down["precision"], down["f1"]) == (0.0, 0.0, 0.0)
        assert figures["reward_macro_f1"] == pytest.approx(up["f1"] / 2)
        assert figures["reward_f1_events"] == int((reward != 0).sum()) == up["events"] + down["events"]


class Worried(Still):
    """Thinks even of a lost life at every step."""

    def step(self, state, action, generator=None):
        state, step = super().step(state, action, generator)
        return state, step._replace(life_loss_mean=torch.full_like(step.reward, 0.5))


def test_lost_lives_are_told_and_drawn_where_there_are_any(store, tmp_path):
    lives = [replace(walk(i), life_loss=np.arange(80) % 20 == 19) for i in range(30)]
    lives = make_store(tmp_path / "lives", lives)
    for played, events in ((store, 0), (lives, 12)):
        figures = quality(Worried(), played, horizons=[1])
        assert figures["life_loss"]["events"] == events and figures["lives"]["events"] == 2 * events
        told, plots = "\n".join(summary(figures)), quality_plots(tmp_path, figures)
        assert ("lost lives F1" in told) == ("ends of lives" in told) == bool(events)
        assert ("<!-- lost life -->" in plots[-1].read_text()) == bool(events)
    assert "life_loss" not in quality(Still(), lives, horizons=[1])


def test_windows_are_even_and_hold_no_padding(store):
    starts = window_starts(store, "test", 24, 50)
    assert len(starts) == 50 and set(starts[:, 0]) == set(store.splits["test"])
    assert store.read(starts, 24).next_mask.all()
    assert len(np.unique(starts, axis=0)) == 50
    with pytest.raises(UserError, match="no episode of more than 80 steps"):
        window_starts(store, "test", 80, 50)


def test_objects_are_hit_where_they_really_are(tmp_path):
    def moving(t: int) -> np.ndarray:
        """Ball and paddle of a Pong frame, rolled down by a pixel a step within the field."""
        frame = pong_frame()[0].permute(1, 2, 0).numpy().copy()
        frame[12:58] = np.roll(frame[12:58], t - 10, axis=0)
        return frame

    frames, no = np.stack([moving(t) for t in range(30)]), np.zeros(29, bool)
    game = Episode(frames[:-1], np.zeros(29, np.uint8), np.zeros(29, np.float32), no, no, no, frames[-1])
    figures = quality(Still(), make_store(tmp_path / "s", [game] * 3, "pong", 64), horizons=[1, 2, 4, 8], reward_rows=0)
    assert figures["paddle_hit_rate"] == figures["paddle_hit_rate_copy_last"] == [1.0, 1.0, 0.0, 0.0]  # within 3 pixels
    assert figures["ball_hit_rate"] == [1.0, 1.0, 1.0, 0.0]  # within 4
    assert figures["paddle_hit_rate_8"] == figures["ball_hit_rate_8"] == 0.0
    assert figures["ball_shown"] == [figures["windows"]] * 4
    for name in ("ball_error_px", "ball_error_copy_last_px", "paddle_error_px", "paddle_error_median_px"):
        assert figures[name] == pytest.approx([1, 2, 4, 8], abs=0.1)  # half of a moving sprite's row is a blur
    assert "reward_macro_f1" not in figures and "without_objects" not in figures


@pytest.mark.parametrize("game", ["pong", "catch"])
def test_frames_in_which_no_objects_are_found_are_told_of(tmp_path, game):
    figures = quality(Still(), make_store(tmp_path / "s", [walk(i) for i in range(10)], game), reward_rows=0)
    assert "ball_hit_rate" not in figures and ("without_objects" in figures) == (game == "pong")
    for told in (figures, mean_figures([figures, figures])):
        assert any("RGB ones of 8x8" in line for line in summary(told)) == (game == "pong")


def test_psnr_is_that_of_torchmetrics(store):
    starts = window_starts(store, "test", 5, 20)
    window = store.read(starts, 5)
    true, last = window.obs[:, 1:], window.obs[:, 0]
    dream = (true.int() + torch.randint(-40, 41, true.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    scores = frame_scores([dream.byte(), *static_films(last, last[0].float(), 5)], true, last)
    figures = frame_figures(scores, episode_weights(starts[:, 0]), 3)
    moved = changed_pixels(true, last).expand_as(true)
    for h in range(5):
        a, b = (x[:, h].float() / 255 for x in (dream, true))
        of = PeakSignalNoiseRatio(data_range=1.0)
        assert figures["psnr_db"][h] == pytest.approx(of(a, b).item(), abs=1e-3)
        assert figures["psnr_changed_db"][h] == pytest.approx(of(a[moved[:, h]], b[moved[:, h]]).item(), abs=1e-3)

"""Precision, recall and calibration of rewards and terminations, on values known by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.test_quality import Still, make_store, walk
from worldmodels.evaluation.events import calibration, end_quality, reward_quality
from worldmodels.evaluation.stats import resample_episodes


class Ends(Still):
    """Foresees an end with a probability that the column's place tells, and says nothing of rewards."""

    def __init__(self, probability) -> None:
        super().__init__()
        self.probability = torch.tensor(probability)

    def step(self, state, action, generator=None):
        state, step = super().step(state, action, generator)
        place = state["frame"][:, 0, 2].argmax(-1)
        return state, step._replace(terminated_mean=self.probability[place])


class Lives(Ends):
    """Foresees as `Ends` that a life is lost, by an output of its own or as an end."""

    def __init__(self, probability, apart) -> None:
        super().__init__(probability)
        self.apart, self.ends_with_lives = apart, not apart

    def step(self, state, action, generator=None):
        state, step = super().step(state, action, generator)
        if not self.apart:
            return state, step
        return state, step._replace(terminated_mean=0 * step.reward, life_loss_mean=step.terminated_mean)


class Rewards(Still):
    """Gives a reward of a certain size a probability that the column's place tells."""

    def __init__(self, size, probability) -> None:
        super().__init__()
        self.size, self.probability = size, torch.tensor(probability)

    def step(self, state, action, generator=None):
        state, step = super().step(state, action, generator)
        p = self.probability[state["frame"][:, 0, 2].argmax(-1)]
        return state, step._replace(reward_mean=p * self.size, reward_signs=torch.stack([torch.zeros_like(p), p], -1))


@pytest.fixture
def ending(tmp_path):
    """30 walks that end in a game over, whatever the column's place."""
    last = np.arange(80) == 79
    return make_store(tmp_path / "ending", [replace(walk(i), terminated=last) for i in range(30)])


def last_places(store):
    """Place of the column before the last action, of the episodes of the test split."""
    return [int(store.episode(int(e)).obs[-1, 2, :, 0].argmax()) for e in store.splits["test"]]


@pytest.mark.parametrize("zero_rows", [10_000, 40])
def test_terminations_are_counted_by_hand(ending, zero_rows):
    ends = last_places(ending)
    figures = reward_quality(Ends([float(k == ends[0]) for k in range(8)]), ending, zero_rows=zero_rows, progress=False)
    told = figures["termination"]
    hits = ends.count(ends[0])
    places = np.concatenate([ending.episode(int(e)).obs[8:, 2, :, 0].argmax(1) for e in ending.splits["test"]])
    assert told["events"] == len(ends) == 3 and told["recall"] == pytest.approx(hits / 3)
    if zero_rows == 10_000:
        assert told["precision"] == pytest.approx(hits / (places == ends[0]).sum())
        assert told["calibration"]["alarms"] == (places == ends[0]).sum()
    low, high = told["f1_interval"]
    assert low <= told["f1"] <= high


def test_ends_count_as_much_as_all_other_rows(ending):
    """Found by odds that are far from even: all ends of both held-out splits, at a share of the other rows."""
    held_out = [int(e) for name in ("validation", "test") for e in ending.splits[name]]
    ends = [int(ending.episode(e).obs[-1, 2, :, 0].argmax()) for e in held_out]
    others = np.concatenate([ending.episode(e).obs[8:-1, 2, :, 0].argmax(1) for e in held_out])
    sure = [0.1 if k in ends[:2] else 0.001 for k in range(8)]
    told = end_quality(Ends(sure), ending, rows=10_000, progress=False)
    assert (told["events"], told["others"], told["share"]) == (6, len(others), 1 / 80)
    hits, false = np.isin(ends, ends[:2]).mean(), np.isin(others, ends[:2]).mean()
    assert told["recall"] == pytest.approx(hits) and told["precision"] == pytest.approx(hits / (hits + false))
    assert told["f1"] == pytest.approx(2 * hits / (hits + false + 1))
    assert told["auc"] == pytest.approx(0.5 + (hits - false) / 2, abs=1e-4)
    low, high = told["f1_interval"]
    assert low <= told["f1"] <= high
    low, high = told["auc_interval"]
    assert low <= told["auc"] <= high and low < high
    few = end_quality(Ends(sure), ending, split="train", rows=50, progress=False)
    assert (few["events"], few["others"], few["splits"]) == (24, 50, ["train"])
    none = reward_quality(Ends(sure), ending, progress=False)["termination"]
    assert none["f1"] == 0  # where even odds are asked for


def test_of_validation_no_test_episode_is_opened(ending):
    opened, read = set(), ending.read
    ending.read = lambda starts, length: opened.update(starts[:, 0].tolist()) or read(starts, length)
    told = end_quality(Ends([0.5] * 8), ending, split="validation", progress=False)
    assert (told["splits"], told["events"]) == (["validation"], 3)
    assert opened == set(ending.splits["validation"].tolist())


@pytest.mark.parametrize("apart", [True, False])
def test_lost_lives_are_ends_or_apart_as_the_model_learned_them(tmp_path, apart):
    """Lives are lost where the column comes from place 3, and a game is over at its last step."""
    walks = [walk(i) for i in range(30)]
    places = [np.array([f[2, :, 0].argmax() for f in e.obs]) for e in walks]
    last = np.arange(80) == 79
    games = [replace(e, life_loss=p == 3, terminated=last) for e, p in zip(walks, places, strict=True)]
    store = make_store(tmp_path / "lives", games)
    lost = [np.array([f[2, :, 0].argmax() for f in store.episode(int(e)).obs[8:]]) == 3 for e in store.splits["test"]]
    lives, over = sum(x.sum() for x in lost), sum(not x[-1] for x in lost)  # games over without a life lost
    model = Lives([float(k == 3) for k in range(8)], apart)
    figures = reward_quality(model, store, zero_rows=10_000, progress=False)
    even = end_quality(model, store, kind="life_loss" if apart else "terminated", progress=False)
    if apart:
        told = figures["life_loss"]
        assert (told["of"], told["events"], told["f1"], told["f1_interval"]) == ("lives", lives, 1.0, [1.0, 1.0])
        assert told["calibration"]["error"] == 0.0 and figures["termination"]["of"] == "games"
        assert figures["termination"]["events"] == 3 and figures["termination"]["recall"] == 0.0
        assert (even["of"], even["precision"], even["recall"], even["auc"]) == ("lives", 1.0, 1.0, 1.0)
    else:
        told = figures["termination"]
        assert (told["of"], told["events"]) == ("games and lives", lives + over) and "life_loss" not in figures
        assert told["precision"] == 1.0 and told["recall"] == pytest.approx(lives / (lives + over))
        assert even["of"] == "games and lives" and even["precision"] == 1.0


def test_a_model_that_knows_nothing_of_ends_is_at_chance(ending):
    told = end_quality(Ends([0.5] * 8), ending, progress=False)
    assert (told["recall"], told["precision"], told["auc"]) == (1.0, pytest.approx(0.5), 0.5)
    assert end_quality(Still(), ending, progress=False)["f1"] == 0.0


def test_without_ends_there_is_nothing_to_find(tmp_path):
    told = end_quality(Still(), make_store(tmp_path / "walks", [walk(i) for i in range(5)]), progress=False)
    assert (told["events"], told["f1"], told["auc"]) == (0, None, None)


def test_an_end_without_reward_is_judged_once(ending):
    figures = reward_quality(Still(), ending, zero_rows=10_000, progress=False)
    assert figures["reward_rows"] == sum(int(ending.lengths[e]) - 8 for e in ending.splits["test"])
    assert figures["termination"]["recall"] == figures["termination"]["f1"] == 0.0


@pytest.mark.parametrize("signs", [False, True])
def test_rewards_are_compared_as_logged_or_by_sign_as_the_model_knows_them(tmp_path, signs):
    """Not by the size of what is predicted: a model that always expects 1 is right about signs alone."""
    tens = [replace(walk(i), reward=np.full(80, 10, np.float32)) for i in range(5)]
    model = Still(1.0)
    model.signs = signs
    told = reward_quality(model, make_store(tmp_path / "tens", tens), progress=False)["reward_calibration"]
    assert (told["of"], told["error"]) == (("signs", 0.0) if signs else ("rewards", 9.0))


@pytest.mark.parametrize("size", [7, 10])
def test_a_reward_is_foreseen_by_its_probability_whatever_its_size(tmp_path, size):
    """At 30 % the mean of a large reward is far above 0.5; such a row is no alarm, and one at 70 % is."""
    walks = [walk(i) for i in range(30)]
    rewards = [np.where([f[2, :, 0].argmax() == 2 for f in e.obs], size, 0).astype(np.float32) for e in walks]
    store = make_store(tmp_path / "large", [replace(e, reward=r) for e, r in zip(walks, rewards, strict=True)])
    figures = reward_quality(Rewards(size, [0.0, 0.3, 0.7, 0.3, 0.0, 0.0, 0.0, 0.0]), store, progress=False)
    assert (figures["reward_f1_by"], figures["reward_by_class"]["+1"]["precision"]) == ("probabilities", 1.0)
    assert figures["reward_macro_f1"] == 1.0
    never = reward_quality(Rewards(size, [0.3] * 8), store, progress=False)["reward_by_class"]["+1"]
    assert (never["recall"], never["precision"], never["precision_interval"]) == (0.0, 0.0, None)
    assert reward_quality(Still(), store, progress=False)["reward_f1_by"] == "means"


def test_intervals_are_those_of_figures_of_resampled_episodes(tmp_path):
    """Of every second game nothing is foreseen: the share of such games in a resample decides its recall."""
    walks = [replace(walk(i), reward=np.full(80, i % 2, np.float32)) for i in range(40)]
    store = make_store(tmp_path / "halves", walks)
    figures = reward_quality(Still(1.0), store, split="train", progress=False)
    up, sure = figures["reward_by_class"]["+1"], figures["reward_calibration"]
    n = len(store.splits["train"])
    share = np.mean([store.episode(int(e)).reward[0] for e in store.splits["train"]])
    drawn = np.random.default_rng(0).binomial(n, share, 100_000) / n
    assert up["precision"] == pytest.approx(share) and up["recall_interval"] == [1.0, 1.0]
    assert up["precision_interval"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.04)
    assert sure["error"] == pytest.approx(1 - share, abs=1e-4)
    assert sure["error_interval"] == pytest.approx([1 - x for x in up["precision_interval"][::-1]], abs=1e-3)
    assert sure["error_of_alarms_interval"] == sure["error_interval"]


def test_calibration_by_hand():
    predicted = torch.tensor([0.0, 0.0, 0.9, 0.9, -0.6]).double()
    came = torch.tensor([0.0, 0.0, 1.0, 0.0, -1.0]).double()
    weight = torch.tensor([3.0, 3.0, 1.0, 1.0, 2.0]).double()
    told = calibration(predicted, came, weight, resample_episodes(torch.tensor([0, 1, 1, 2, 2])))
    # bins: 0 is right, 0.9 comes to 0.5, -0.6 to -1
    assert told["error"] == pytest.approx((2 * 0.4 + 2 * 0.4) / 10)
    assert told["error_of_alarms"] == pytest.approx((2 * 0.4 + 2 * 0.4) / 4) and told["alarms"] == 4
    assert told["curve"][0] == {"predicted": -0.6, "came": -1.0, "rows": 2.0}
    assert sum(b["rows"] for b in told["curve"]) == 10
    quiet = calibration(predicted * 0, came, weight, resample_episodes(torch.arange(5)))
    assert (quiet["alarms"], quiet["error_of_alarms"], quiet["error_of_alarms_interval"]) == (0, None, None)


def test_a_prediction_that_comes_as_often_as_it_says_is_calibrated():
    random = np.random.default_rng(0)
    predicted = random.random(50_000)
    came = random.random(50_000) < predicted
    rest = torch.from_numpy(came).double(), torch.ones(50_000).double(), resample_episodes(torch.arange(50_000) // 1000)
    told = calibration(torch.from_numpy(predicted), *rest)
    assert told["error"] < 0.01 and len(told["curve"]) == 10
    sure = calibration(torch.from_numpy(predicted).round(), *rest)
    assert sure["error"] == pytest.approx(0.25, abs=0.01)

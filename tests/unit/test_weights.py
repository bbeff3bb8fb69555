import numpy as np
import pytest

from worldmodels.data.weights import Choice, EpisodeWeights
from worldmodels.types import UserError

RNG = np.random.default_rng
DRAWS = 200_000


def weigh(windows, games=None, returns=None, **settings):
    games = np.zeros(len(windows), int) if games is None else np.array(games)
    returns = None if returns is None else np.array(returns, float)
    return EpisodeWeights(np.array(windows), games, returns, settings)


def check(counts, groups, share):
    """Chi-square of how often each group was drawn against the shares."""
    seen, want = np.bincount(groups, minlength=len(counts)), np.asarray(share) * len(groups)
    assert not seen[want == 0].any()
    terms = (seen - want)[want > 0] ** 2 / want[want > 0]
    assert terms.sum() < len(terms) + 5 * np.sqrt(2 * len(terms)), terms


@pytest.mark.parametrize("weights", [None, [1, 1, 9, 1, 1], [1, 2, 9, 0, 3]])
def test_choice_draws_groups_by_mass_and_things_evenly(weights):
    counts = np.array([5, 1, 0, 40, 4])
    group, thing = Choice(counts, None if weights is None else np.array(weights, float))(RNG(0), DRAWS)
    mass = counts * (1 if weights is None else np.array(weights))
    check(counts, group, mass / mass.sum())
    for g in np.unique(group):
        inside = thing[group == g]
        check(np.zeros(counts[g]), inside, np.full(counts[g], 1 / counts[g]))
        assert inside.min() == 0 and inside.max() == counts[g] - 1


def test_things_are_numbered_through():
    choice = Choice(np.array([2, 0, 3]))
    group, thing = choice.find(np.arange(choice.size))
    assert group.tolist() == [0, 0, 2, 2, 2] and thing.tolist() == [0, 1, 0, 1, 2]
    assert choice.number(group, thing).tolist() == list(range(5))


@pytest.mark.parametrize("unit", [0.1, 1.0, 1.0000000000000002, 1.9999999999999998])
def test_the_very_end_of_the_line_belongs_to_the_last_that_counts(unit):
    class Highest:
        def random(self, size):
            return np.full(size, np.nextafter(1, 0))

        def integers(self, high):
            return high - 1

    group, _ = Choice(np.array([3, 7, 2]), np.array([unit, 3 * unit, 0.0]))(Highest(), 2)
    assert group.tolist() == [1, 1]


def test_games_have_weights_of_their_own():
    windows, games = np.array([500, 400, 60, 40]), [0, 0, 1, 1]
    settings = {"game": 0.0, "games": np.array([3.0, 1.0, 7.0])}  # of the third there is nothing here
    weights = EpisodeWeights(windows, np.array(games), None, settings)
    group, _ = Choice(windows, weights.of(windows))(RNG(0), DRAWS)
    check(windows, group, np.array([5 / 9, 4 / 9, 0.6, 0.4]) * [0.75, 0.75, 0.25, 0.25])


@pytest.mark.parametrize("exponent, share", [(1.0, [0.9, 0.1]), (0.5, [0.75, 0.25]), (0.0, [0.5, 0.5])])
def test_games_share_by_the_power_of_their_size(exponent, share):
    windows, games = np.array([500, 400, 60, 40]), [0, 0, 1, 1]
    weights = weigh(windows, games, game=exponent)
    mass = windows * weights.of(windows)
    by_game = np.bincount(games, mass)
    np.testing.assert_allclose(by_game / by_game.sum(), share)
    np.testing.assert_allclose(mass[:2] / mass[:2].sum(), [5 / 9, 4 / 9])
    # events are shared among the games in the same way, however many of them a game has
    events = np.array([1, 1, 50, 50])
    by_game = np.bincount(games, events * weights.of(events))
    np.testing.assert_allclose(by_game / by_game.sum(), share)


def test_a_game_without_events_leaves_them_to_the_others():
    weights = weigh([10, 10], [0, 1], game=0.0).of(np.array([0, 3]))
    assert weights[0] == 0 and weights[1] > 0


def test_one_game_or_power_one_is_uniform():
    counts = np.array([3, 70, 11])
    for weights in (weigh(counts, game=0.3), weigh(counts, [0, 1, 1])):
        np.testing.assert_allclose(weights.of(counts), weights.of(counts)[0], rtol=1e-15)
    # so exactly that the batches are those of a store without weights
    draws = [Choice(counts, w)(RNG(1), 50) for w in (None, weights.of(counts))]
    np.testing.assert_array_equal(*draws)


def test_recency_halves_by_episodes_or_by_share():
    windows = np.full(6, 10)
    weights = weigh(windows, recency=2).of(windows)
    np.testing.assert_allclose(weights[[5, 3, 1]] / weights[5], [1, 0.5, 0.25])
    # a third of a game's three episodes is one; each game has its own newest
    weights = weigh(windows, [0, 1, 0, 1, 0, 1], recency=1 / 3).of(windows)
    np.testing.assert_allclose(weights / weights[5], [0.25, 0.25, 0.5, 0.5, 1, 1])


def test_returns_count_by_rank_in_their_game():
    windows, t = np.full(7, 4), 0.5
    weights = weigh(windows, [0, 0, 0, 0, 1, 1, 1], [-5, 1000, 3, 3, 9, 9, 9], **{"return": t}).of(windows)
    ranks = np.array([0, 1, 0.5, 0.5])
    np.testing.assert_allclose(weights[:4] / weights[1], np.exp((ranks - 1) / t))
    np.testing.assert_allclose(weights[4:], weights[4])
    np.testing.assert_allclose(weigh([4], None, [1.0], **{"return": t}).of(np.array([4])), 1)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"recent": 1}, "data.weights has no setting 'recent'; it has game, games, recency, return"),
        ({"recency": 0}, "data.weights.recency=0 is out of range; it must be a number above 0, or null"),
        ({"return": -1.0}, "data.weights.return=-1.0"),
        ({"return": float("nan")}, "data.weights.return=nan"),
        ({"recency": "new"}, "data.weights.recency=new"),
        ({"game": None}, "data.weights.game=None is out of range; it must be a number of 0 or more"),
        ({"game": -1}, "data.weights.game=-1"),
    ],
)
def test_settings_out_of_range(settings, match):
    with pytest.raises(UserError, match=match):
        weigh([1, 2], **settings)

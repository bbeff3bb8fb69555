import tracemalloc
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

from tests.unit.stores import card, episode, filled
from worldmodels.data.sampling import WindowSampler, even_windows, share_before
from worldmodels.data.store import Store
from worldmodels.types import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("sampling") / "s", count=12)[0]


def sampler(store, episodes=(0, 3, 5, 7), batch=16, length=8, **kw):
    return WindowSampler(store, episodes, batch, length, **kw)


def test_a_batch_depends_on_nothing_but_its_number(store):
    forwards, backwards = sampler(store, seed=5, event_share=0.5), sampler(store, seed=5, event_share=0.5)
    first = [forwards(k) for k in range(20)]
    for k in reversed(range(20)):
        np.testing.assert_array_equal(backwards(k), first[k])
    assert first[0].shape == (16, 2) and first[0].dtype == np.int64


def test_batches_ranks_worlds_and_seeds_differ(store):
    args = [dict(), dict(rank=1, world=2), dict(rank=0, world=2), dict(seed=1), dict(seed=2**40)]
    streams = [np.concatenate([sampler(store, batch=64, **a)(k) for k in range(3)]) for a in args]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert (a != b).any(axis=1).mean() > 0.8
    # consecutive batches must not be one stream read at neighbouring places
    one = sampler(store, batch=64)
    for shift in range(1, 17):
        assert (one(0)[shift:] == one(1)[:-shift]).all(axis=1).mean() < 0.2


@pytest.mark.parametrize("padding", [0, 3])
def test_windows_are_uniform_and_inside(store, padding):
    length, episodes = 8, [0, 3, 5, 7]
    draw = sampler(store, episodes, 500, length, left_padding=padding)
    counts = {}
    for k in range(60):
        for i, s in draw(k).tolist():
            counts[i, s] = counts.get((i, s), 0) + 1
    lengths = store.lengths
    want = {(i, s) for i in episodes for s in range(-padding, max(lengths[i] - length, -padding) + 1)}
    assert set(counts) == want, "every window comes up, and no other"
    expected = 60 * 500 / len(want)
    chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
    dof = len(want) - 1
    assert abs(chi2 - dof) < 5 * np.sqrt(2 * dof)


def test_share_of_events(tmp_path):
    with Store.create(tmp_path / "s", card()) as store:
        for i in range(3):
            e = episode(i, 200)
            e.reward[:] = 0
            e.reward[[20, 90]] = 1, -1
            e.terminated[-1], e.truncated[-1] = i == 1, i != 1
            store.append(e)
    length, draw = 10, WindowSampler(store, [0, 1], 40, 10, left_padding=2, event_share=0.25)
    events = {0: [20, 90], 1: [20, 90, 199]}
    place, hits = [], 0
    for k in range(200):
        starts = draw(k)
        for i, s in starts[:10].tolist():
            inside = [r - s for r in events[i] if 0 <= r - s < length]
            assert inside, (i, s)
            place += inside if s + length < 200 else []
        hits += sum(any(0 <= r - s < length for r in events[i]) for i, s in starts[10:].tolist())
        assert set(starts[:, 0]) <= {0, 1} and (starts[:, 1] <= 190).all()
    share = np.bincount(place, minlength=length) / len(place)
    assert abs(share - 1 / length).max() < 0.03, "an event is at any place of its window"
    assert hits / (200 * 30) < 0.2, "the rest of the batch is not drawn around events"
    assert (WindowSampler(store, [2], 7, 10, event_share=1.0)(0)[:, 0] == 2).all()


def test_events_in_the_last_rows_alone(tmp_path):
    """Where the rows before are for a model's memory."""
    with Store.create(tmp_path / "s", card()) as store:
        e = episode(0, 200)
        e.reward[:], e.terminated[:] = 0, False
        e.reward[[20, 90]] = 1
        store.append(e)
    draw = WindowSampler(store, [0], 40, 10, left_padding=9, event_share=1.0, event_rows=3)
    starts = np.concatenate([draw(k)[:, 1] for k in range(20)])
    place = np.concatenate([row - starts[(starts <= row) & (row < starts + 10)] for row in (20, 90)])
    assert set(place.tolist()) == {7, 8, 9} and len(place) == 800
    assert WindowSampler(store, [0], 40, 10, event_rows=11).event_rows == 10
    with pytest.raises(UserError, match="event_rows=0 does not fit"):
        WindowSampler(store, [0], 40, 10, event_rows=0)


def test_without_events_all_is_uniform(tmp_path):
    with Store.create(tmp_path / "s", card()) as store:
        e = episode(0, 50)
        e.reward[:], e.terminated[:] = 0, False
        store.append(e)
    assert WindowSampler(store, [0], 8, 5, event_share=1.0)(0).shape == (8, 2)


def test_short_episodes_are_drawn_padded(store):
    short = int(store.lengths.argmin())
    assert sampler(store, [short], length=100)(0).tolist() == [[short, 0]] * 16
    assert store.read(sampler(store, [short], length=100)(0), 100).mask.sum(1).unique().tolist() == [
        store.lengths.min()
    ]


def every_window(store, episodes, length, padding=0):
    return {(i, s) for i in episodes for s in range(-padding, max(store.lengths[i] - length, -padding) + 1)}


@pytest.mark.parametrize("world, padding", [(1, 0), (2, 3), (3, 0)])
def test_without_replacement_every_window_comes_once_a_pass(store, world, padding):
    episodes, batch = [0, 3, 5, 7], 5
    want = every_window(store, episodes, 8, padding)
    ranks = [
        sampler(store, episodes, batch, left_padding=padding, replacement=False, rank=r, world=world, seed=4)
        for r in range(world)
    ]
    passes = 3
    batches = -(-passes * len(want) // (batch * world))
    stream = list(chain(*(map(tuple, draw(k).tolist()) for k in range(batches) for draw in ranks)))
    orders = [stream[n * len(want) : (n + 1) * len(want)] for n in range(passes)]
    for order in orders:
        assert len(order) == len(want) and set(order) == want, "all of them, over all ranks, none twice"
    assert orders[0] != orders[1] != orders[2]
    same = np.mean([a == b for a, b in zip(orders[0], orders[1], strict=True)])
    assert same < 10 / len(want)
    # resuming: a batch depends on nothing but its number
    again = sampler(store, episodes, batch, left_padding=padding, replacement=False, world=world, seed=4)
    for k in reversed(range(batches)):
        np.testing.assert_array_equal(again(k), ranks[0](k))
    other = sampler(store, episodes, batch, left_padding=padding, replacement=False, world=world, seed=5)
    assert (other(0) != ranks[0](0)).any()


def test_a_batch_of_more_windows_than_there_are(store):
    short = int(store.lengths.argmin())
    draw = sampler(store, [short], 50, 1, replacement=False)
    counts = np.bincount(draw(0)[:, 1], minlength=store.lengths[short])
    assert counts.sum() == 50 and counts.max() - counts.min() <= 1


def test_without_replacement_beside_events(store):
    draw = sampler(store, batch=10, replacement=False, event_share=0.4)
    want = every_window(store, (0, 3, 5, 7), 8)
    walk = [tuple(w) for k in range(-(-len(want) // 6)) for w in draw(k)[4:].tolist()]
    assert set(walk[: len(want)]) == want


def test_a_share_that_is_not_whole_comes_out_right_over_batches(tmp_path, store):
    """And where it is whole it is so in every batch, rounding of 0.29 * 100 or 0.7 * 10 and all."""
    for share, size, each in ((0.29, 100, 29), (0.7, 10, 7), (0.0, 8, 0), (1.0, 8, 8)):
        assert [share_before(share, size, k) for k in range(50)] == [each * k for k in range(50)]
    before = [share_before(0.03, 5, k) for k in range(101)]
    assert before[-1] == 15 and set(np.diff(before)) == {0, 1}
    with Store.create(tmp_path / "s", card()) as one:
        e = episode(0, 4000)
        e.reward[:], e.terminated[:] = 0, False
        e.reward[2000] = 1
        one.append(e)
    draw = WindowSampler(one, [0], 5, 10, event_share=0.03)
    starts = np.stack([draw(k) for k in range(100)])[:, :, 1]
    assert starts.shape == (100, 5)
    hit = (starts <= 2000) & (starts + 10 > 2000)
    assert all(hit[k, 0] for k in np.flatnonzero(np.diff(before)))
    assert 15 <= hit.sum() <= 20, "as many as are drawn around it, and next to none by chance"
    want, walked = every_window(store, (0, 3, 5, 7), 8), []
    ranks = [sampler(store, batch=10, replacement=False, event_share=0.25, rank=r, world=2) for r in range(2)]
    for k in range(len(want)):
        events = share_before(0.25, 10, k + 1) - share_before(0.25, 10, k)
        walked += [tuple(w) for draw in ranks for w in draw(k)[events:].tolist()]
    assert set(walked[: len(want)]) == set(walked[len(want) : 2 * len(want)]) == want


def test_recent_and_successful_episodes(store):
    """The weights have tests of their own; here, that they reach the draws."""
    returns = np.array([store.episode_info(i)["return"] for i in range(12)])
    rank = np.array([((returns < r).sum() + (returns <= r).sum() - 1) / 2 / 11 for r in returns])
    for weights, weight in (
        ({"recency": 0.5}, 0.5 ** (np.arange(12)[::-1] / 6)),
        ({"return": 0.25}, np.exp(rank / 0.25)),
        ({"recency": 3, "return": 1.0}, 0.5 ** (np.arange(12)[::-1] / 3) * np.exp(rank)),
    ):
        drawn = sampler(store, range(12), 20_000, 1, weights=weights)(0)
        mass = store.lengths * weight
        want = mass / mass.sum() * len(drawn)
        chi2 = ((np.bincount(drawn[:, 0], minlength=12) - want) ** 2 / want).sum()
        assert abs(chi2 - 11) < 5 * np.sqrt(2 * 11)
        assert set(map(tuple, drawn.tolist())) <= every_window(store, range(12), 1)


def test_the_order_of_episodes_does_not_matter(store):
    for kw in (dict(), dict(weights={"recency": 2}), dict(event_share=0.5)):
        np.testing.assert_array_equal(sampler(store, [7, 0, 5, 3], **kw)(1), sampler(store, [0, 3, 5, 7], **kw)(1))


def test_games_hold_their_share_of_windows_and_of_events(store):
    games = np.array([0, 0, 0, 1])
    draw = sampler(store, [0, 3, 5, 7], 1000, event_share=0.5, weights={"game": 0.0}, games=games)
    episodes = np.concatenate([draw(k) for k in range(10)]).reshape(10, 1000, 2)[:, :, 0]
    for part in (episodes[:, :500], episodes[:, 500:]):
        assert abs((part == 7).mean() - 0.5) < 4 * np.sqrt(0.25 / 5000)


def test_priorities(store):
    draw = sampler(store, batch=64, left_padding=2, priority={"alpha": 1.0, "beta": 0.5}, lag=2)
    want = every_window(store, (0, 3, 5, 7), 8, 2)
    starts = draw(0)
    assert set(map(tuple, starts.tolist())) <= want
    everything = np.array(sorted(want))
    windows = draw.windows(everything)
    assert sorted(windows) == list(range(len(want))), "every window has its number"
    draw.priorities.update(0, windows, np.where(windows < 64, 1e6, 1e-6))
    assert (draw.windows(draw(1)) >= 64).any() and (draw.windows(draw(2)) < 64).all()


def test_events_beside_priorities(store):
    """A share of the batch is drawn around events, and the rest of it by priority."""
    draw = sampler(store, batch=64, event_share=0.5, priority={"alpha": 1.0, "beta": 0.0, "block": 1})
    hard = np.array(sorted(every_window(store, (0, 3, 5, 7), 8, 0)))[5]
    windows = np.arange(draw._windows.size)
    draw.priorities.update(0, windows, np.where(windows == draw.windows(hard[None])[0], 1e6, 1e-6))
    draw(0)
    starts = draw(1)
    around = store.read(starts[:32], 8)
    assert ((around.reward != 0) | around.terminated).any(1).all() and len(np.unique(starts[:32], axis=0)) > 5
    assert (starts[32:] == hard).all()


def test_memory_is_by_episode_not_by_window():
    held = {}
    for length in (300, 30_000):
        many = SimpleNamespace(path="many", lengths=np.full(1000, length))
        for kw in (dict(), dict(replacement=False), dict(weights={"recency": 0.1})):
            tracemalloc.start()
            draw = WindowSampler(many, np.arange(1000), 32, 20, **kw)
            draw(0)
            held[length, str(kw)] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert held[length, str(kw)] < 500_000
            assert held[length, str(kw)] < 1.2 * held[300, str(kw)]


def test_padding_before_an_episode_is_masked(store):
    starts = sampler(store, batch=300, left_padding=5)(0)
    segment = store.read(starts, 8)
    for row, (i, start) in enumerate(starts.tolist()):
        steps = np.arange(start, start + 8)
        real = (steps >= 0) & (steps < store.lengths[i])
        assert segment.mask[row].tolist() == real.tolist()
        assert not segment.obs[row, : max(0, -start)].any() and segment.obs[row, max(0, -start)].any()
        assert not segment.next_mask[row][: max(0, -start)].any(), "a row that is not real is followed by nothing"
        assert segment.next_mask[row][real][:-1].all()
    assert len(set(starts[:, 1]) & set(range(-5, 0))) == 5


def test_even_windows(store):
    windows = even_windows(store, [1, 4, 6], 10, 8)
    np.testing.assert_array_equal(windows, even_windows(store, [1, 4, 6], 10, 8))
    assert windows.shape == (10, 2) and set(windows[:, 0]) <= {1, 4, 6}
    every = even_windows(store, [1, 4, 6], 10**6, 8).tolist()
    assert every == [[i, s] for i in (1, 4, 6) for s in range(max(store.lengths[i] - 8, 0) + 1)]
    gaps = np.diff([every.index(w) for w in windows.tolist()])
    assert gaps.max() - gaps.min() <= 1
    assert even_windows(store, [], 10, 8).shape == (0, 2)


@pytest.mark.parametrize(
    "kw, match",
    [
        (dict(left_padding=8), "left_padding=8"),
        (dict(event_share=1.5), "event_share=1.5"),
        (dict(length=0), "length=0"),
        (dict(episodes=[]), "no episodes to draw from"),
        (dict(replacement=False, weights={"recency": 3}), "data.replacement=false each decide alone"),
        (dict(replacement=False, priority={"alpha": 0.5, "beta": 0.5}), "each decide alone"),
        (dict(event_share=0.5, priority={"alpha": 0.5, "beta": 0.5}), "with priorities no data.event_share"),
        (dict(weights={"game": 0.5}, priority={"alpha": 0.5, "beta": 0.5}), "there are no data.weights"),
        (dict(weights={"return": 0}), "data.weights.return=0 is out of range"),
    ],
)
def test_settings_out_of_range(store, kw, match):
    with pytest.raises(UserError, match=match):
        sampler(store, **kw)

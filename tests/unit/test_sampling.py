import numpy as np
import pytest

from tests.unit.stores import card, episode, filled
from worldmodels.data.sampling import WindowSampler, even_windows
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
    ],
)
def test_settings_out_of_range(store, kw, match):
    with pytest.raises(UserError, match=match):
        sampler(store, **kw)

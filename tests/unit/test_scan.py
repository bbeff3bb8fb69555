import tracemalloc

import numpy as np
import pytest

from tests.unit.stores import card, episode, filled
from worldmodels.data.mixing import Mixture
from worldmodels.data.scan import episode_returns, event_steps
from worldmodels.data.store import Store
from worldmodels.data.transforms import Transform


@pytest.fixture
def stores(tmp_path):
    """Two stores of 12 and 4 episodes, partly sealed; and their episodes."""
    _, first = filled(tmp_path / "a")
    _, second = filled(tmp_path / "b", count=4, seal_at=(2,))
    return [tmp_path / "a", tmp_path / "b"], first + second


def check(store, episodes, chosen):
    counts, steps = event_steps(store, np.array(chosen))
    want = [np.flatnonzero((episodes[i].reward != 0) | episodes[i].terminated) for i in chosen]
    assert counts.tolist() == [len(w) for w in want]
    assert steps.tolist() == np.concatenate(want).tolist() and steps.dtype == np.int32
    np.testing.assert_allclose(episode_returns(store), [e.reward.sum(dtype=float) for e in episodes])


@pytest.mark.parametrize("chosen", [range(12), [0, 4, 5, 6, 9, 11], [3], [11]])
def test_one_store(stores, chosen):
    paths, episodes = stores
    check(Store.open(paths[0]), episodes[:12], chosen)


@pytest.mark.parametrize("chosen", [range(16), [2, 11, 12, 15]])
def test_several_stores(stores, chosen):
    paths, episodes = stores
    check(Mixture(paths, Transform()), episodes, chosen)


@pytest.mark.parametrize("seal", [False, True])
def test_what_was_added_since_is_left_out(stores, seal):
    paths, episodes = stores
    mix, alone = Mixture(paths, Transform()), Store.open(paths[0])
    with Store.open(paths[0], write=True) as writer:
        writer.append(episode(77, 30))
        if seal:
            writer.seal()
        check(mix, episodes, range(16))
        check(alone, episodes[:12], range(12))
        mix.stores[0].refresh()
        check(mix, episodes, range(16))


def test_rows_are_not_held(tmp_path):
    """The columns have 2 MB."""
    with Store.create(tmp_path / "s", card(side=1)) as store:
        for i in range(10):
            e = episode(i, 40_000, side=1, final=False)
            e.reward[::2] = 0
            e.reward[1::2] = (np.arange(20_000) % 100 == 0).astype(np.float32)
            store.append(e)
            store.seal()
    store = Store.open(tmp_path / "s")
    tracemalloc.start()
    _, steps = event_steps(store, np.arange(10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2000 <= len(steps) <= 2010
    assert peak < 600_000

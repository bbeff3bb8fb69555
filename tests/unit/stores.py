"""Small stores for the tests of the data room."""

from pathlib import Path

import numpy as np

from worldmodels.data.card import make_card
from worldmodels.data.store import Store
from worldmodels.types import Episode

SEGMENTS = Path("segments/toy")
FIELDS = ("obs", "action", "reward", "terminated", "truncated", "life_loss", "final_obs")


def card(channels=3, side=8, **fields):
    return make_card("toy", "catch", {"height": side, "width": side, "channels": channels}, **{"seed": 0} | fields)


def episode(number, length=None, channels=3, side=8, final=None):
    """Episode `number`, always the same; noise, so that no two rows can be confused and zstd cannot shrink it."""
    rng = np.random.default_rng(number)
    length = int(rng.integers(1, 60)) if length is None else length
    frame = (side, side) + ((3,) if channels == 3 else ())
    end = np.zeros((2, length), bool)
    end[number % 2, -1] = True
    return Episode(
        rng.integers(0, 256, (length, *frame), np.uint8),
        rng.integers(0, 18, length).astype(np.uint8),
        rng.integers(-1, 2, length).astype(np.float32),
        *end,
        rng.random(length) < 0.1,
        rng.integers(0, 256, frame, np.uint8) if (number % 3 > 0 if final is None else final) else None,
        {"number": number},
    )


def filled(path, count=12, seal_at=(5, 9), **kw):
    """A store of `count` episodes, sealed after those in `seal_at`, the rest staged; and its episodes."""
    episodes = [episode(i, **kw) for i in range(count)]
    store = Store.create(path, card(**{k: v for k, v in kw.items() if k in ("channels", "side")}))
    for i, e in enumerate(episodes):
        store.append(e)
        if i in seal_at:
            store.seal()
    store.close()
    return Store.open(path), episodes


def assert_same(a, b):
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            np.testing.assert_array_equal(x, y, err_msg=name)
            assert x.dtype == y.dtype, name
    assert a.info == b.info


def assert_holds(store, episodes):
    assert store.lengths.tolist() == [len(e) for e in episodes]
    for i, e in enumerate(episodes):
        assert_same(store.episode(i), e)


def by_tensorstore(array):
    """All of a Zarr array, as TensorStore reads it."""
    import tensorstore

    kind = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array}/"}}
    return tensorstore.open(kind, read=True).result().read().result()


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)

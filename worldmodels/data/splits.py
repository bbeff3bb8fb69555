"""Which episodes of a store are for training, for validation and for the test: drawn once, and kept."""

from pathlib import Path

import numpy as np

from worldmodels.data.disk import read_json, write_json


def kept_splits(path: Path, count: int, seed: int) -> dict[str, np.ndarray]:
    """Episode numbers of `train`, `validation` and `test`, int64, sorted.

    Args:
        path: of the file that they are kept in; drawn, and written if that can be, where there is none.
        count: number of episodes that are seen; those that were not there when it was drawn belong to `train`.
        seed: of the draw.
    """
    if count and not path.exists():
        drawn = _draw(count, seed)
        try:
            path.parent.mkdir(exist_ok=True)
            write_json(path, {k: v.tolist() for k, v in drawn.items()}, replace=False, checksum=True)
        except FileExistsError:  # another process was faster
            pass
        except OSError:  # a read-only store: the same draw comes out every time
            return drawn
    kept = read_json(path) if count else {}
    # below count: it may have been drawn when there were more episodes than this reader has seen
    held_out = {k: np.array([i for i in kept.get(k, []) if i < count], np.int64) for k in ("validation", "test")}
    train = np.setdiff1d(np.arange(count), np.concatenate([*held_out.values()]))
    return {"train": train, **held_out}


def _draw(count: int, seed: int) -> dict[str, np.ndarray]:
    order = np.random.Generator(np.random.Philox(key=seed % 2**64)).permutation(count)
    share = max(1, round(0.1 * count))
    validation, test = (share if count > 1 else 0), (share if count > 2 else 0)
    held_out, train = np.split(order, [validation + test])
    parts = {"train": train, "validation": held_out[:validation], "test": held_out[validation:]}
    return {k: np.sort(v).astype(np.int64) for k, v in parts.items()}

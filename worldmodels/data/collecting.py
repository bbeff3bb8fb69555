"""Fill a store from a source of episodes, from where it was left, and say what it then holds."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data.card import Card
from worldmodels.data.disk import disk_errors, read_json, write_json
from worldmodels.data.store import Store
from worldmodels.types import Episode, UserError

Play = Callable[[int, int], Iterator[Episode]]
"""From the least number of steps and the number of the first episode to the episodes."""


def collect(
    path: Path, card: Card, play: Play, steps: int, progress: Callable[[int, int], None] = lambda steps, episodes: None
) -> dict[str, Any]:
    """Add episodes to the store at `path` until it holds at least `steps` steps; every episode is kept as it ends.

    Args:
        path: folder of the store, made where there is none.
        card: dataset card of the collection; a store that is there must have been collected under the same.
        play: the source.
        steps: least number of steps.
        progress: called with the steps and the episodes in the store, at the start and after every episode.

    Returns:
        The figures of `summary` and the `seconds` of this run, as they are also in `path`/metrics.json; those that are
        there where nothing was left to do.

    Raises:
        UserError: the store belongs to another collection, or the disk refuses (finished episodes stay).
    """
    began = time.monotonic()
    if any(path.glob("sources/*.json")):
        with Store.open(path, write=True) as store:
            _same_collection(path, store.card, card)
    metrics = path / "metrics.json"
    with Store.create(path, card) as store:
        have = int(store.lengths.sum())
        if have >= steps and metrics.exists():
            return read_json(metrics)
        progress(have, len(store.lengths))
        if have < steps:
            for episode in play(steps - have, len(store.lengths)):
                store.append(episode)
                have += len(episode)
                progress(have, len(store.lengths))
        store.seal()
        figures = summary(store) | {"seconds": round(time.monotonic() - began, 1)}
    with disk_errors(path):
        write_json(metrics, figures, checksum=True)
    return figures


def summary(store: Store) -> dict[str, Any]:
    """Steps, episodes, rewards by value, mean length and return, and what each behaviour earned per 1,000 steps."""
    infos = [store.episode_info(i) for i in range(len(store.lengths))]
    steps: Counter[str] = Counter()
    returns: Counter[str] = Counter()
    for info in infos:
        for name, part in (info["info"].get("behaviours") or {}).items():
            steps[name] += part["steps"]
            returns[name] += part["return"]
    values, counts = np.unique(store.column("reward"), return_counts=True)
    return {
        "game": store.card["game"],
        "steps": int(store.lengths.sum()),
        "episodes": len(infos),
        "mean_length": float(store.lengths.mean()),
        "mean_return": float(np.mean([info["return"] for info in infos])),
        "rewards": {f"{value:g}": int(n) for value, n in zip(values, counts, strict=True)},
        "behaviours": {
            name: {"steps": n, "return_per_1000_steps": 1000 * returns[name] / n} for name, n in steps.items() if n
        },
    }


def _same_collection(path: Path, have: Card, card: Card) -> None:
    # Stricter than check_compatible: the seed and the players decide the episodes that are still to come.
    for name in card:
        if name != "versions" and have[name] != card[name]:
            raise UserError(
                f"the store {path.absolute()} was collected with {name}={have[name]} and cannot go on with "
                f"{card[name]}: give another store=, or the settings that it was begun with"
            )

"""Games that begin alike, of one seed and number, held against each other one by one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import means, told

Games = Mapping[int, np.ndarray]
"""Returns by seed of training, in the order of the games' numbers."""


def games_of(run: Path, played: str = "played") -> dict[int, np.ndarray]:
    """Returns of all seeds of a run that have played, in the folder `played` of each."""
    found = {}
    for path in sorted(run.glob(f"*/{played}/metrics.json")):
        lines = map(json.loads, path.with_name("results.jsonl").read_text(encoding="utf-8").splitlines())
        returns = {line["episode"]: line["return"] for line in lines}  # they are written as they end
        found[int(path.parent.parent.name)] = np.array([returns[episode] for episode in sorted(returns)])
    return found


def differences(games: Games, others: Games) -> list[np.ndarray]:
    """By how much each game is better than the other one that began like it, by the seeds that both have."""
    return [games[seed] - others[seed] for seed in sorted(games.keys() & others.keys())]


def minus(games: Games, others: Games, rng: np.random.Generator) -> dict[str, Any] | None:
    """Mean of the differences and its 95 % interval, seeds and games drawn again as pairs; None without any."""
    pairs = differences(games, others)
    return told(means(pairs, rng)) | {"seeds": len(pairs)} if pairs else None


def share_equal(games: Games, others: Sequence[Games]) -> float:
    """The share of games whose return is the same to the last bit in each of the other places."""
    equal = [pair == 0 for other in others for pair in differences(games, other)]
    return round(float(np.mean(np.concatenate(equal))), 4)

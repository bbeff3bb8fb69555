"""Rewards and terminations that a model foresees one step ahead: found, falsely alarmed, and with what certainty.

Shapes: N rows judged, R resamples.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodels.data.catalog import split_flags
from worldmodels.data.mixing import Mixture
from worldmodels.data.store import Store
from worldmodels.evaluation.rollouts import batches, split_episodes, track
from worldmodels.evaluation.stats import Resamples, interval, number, resample_episodes
from worldmodels.types import WorldModel

BINS = 10
"""Bins of equal width of the reliability curves."""
ALARM = 0.05
"""From this size on a prediction says that something may happen. Nearly all rows are below, and right with ease."""


def reward_quality(
    model: WorldModel,
    store: Store | Mixture,
    split: str = "test",
    zero_rows: int = 2000,
    burn_in: int = 8,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Precision, recall, F1 and calibration of reward and termination, one step ahead on imagined frames.

    For a row t of the split the model sees `burn_in` logged transitions, takes the logged action and imagines the next
    frame; its reward counts as +1 where `reward_mean` > 0.5, as -1 where it is < -0.5, and the game as ended where
    `terminated_mean` > 0.5. Every row with a reward or an end is judged, and at most `zero_rows` evenly spaced rows
    without; a row among these weighs the inverse of their sampling rate, so that the figures hold for the natural
    mixture of rows. `reward_macro_f1` is the mean F1 of the classes -1 and +1 that occur; the class zero is left out.
    Rows without a whole context are left out. Intervals are from resampled episodes.

    Calibration (`calibration`) compares each prediction with what it is a prediction of: `reward_mean` with the reward
    as logged, or with its sign where the model says by `signs` that it knows no more; `terminated_mean` with whether
    the game ended. `reward_calibration["of"]` says which it was.
    """
    rows, reward, ended = _rows(store, split, burn_in)
    event = (reward != 0) | ended
    events, zeros = np.flatnonzero(event), np.flatnonzero(~event)
    sampled = zeros[np.linspace(0, len(zeros) - 1, min(zero_rows, len(zeros))).round().astype(int)]
    chosen = np.concatenate([events, sampled])
    zero_weight = len(zeros) / max(len(sampled), 1)
    weight = torch.cat([torch.ones(len(events)), torch.full((len(sampled),), zero_weight)]).double()
    rows, reward, ended = rows[chosen], torch.from_numpy(reward[chosen]), torch.from_numpy(ended[chosen])
    parts = track(batches(rows, batch_size), f"rewards on {split}", progress)
    expected, end = _foreseen(model, store, parts, burn_in, generator)
    resamples = resample_episodes(rows[:, 0])
    truth = reward.sign()
    by_class = {f"{sign:+d}": _detection(sign * expected > 0.5, truth == sign, weight, resamples) for sign in (-1, 1)}
    occurring = [k for k, c in by_class.items() if c["events"]]
    figures: dict[str, Any] = {"reward_macro_f1": None, "reward_macro_f1_interval": None}
    if occurring:
        f1 = torch.stack([by_class[k]["f1_resampled"] for k in occurring]).mean(0)
        figures = {"reward_macro_f1": float(f1[0]), "reward_macro_f1_interval": interval(f1)}
    signs = bool(getattr(model, "signs", False))
    return {
        **figures,
        "reward_f1_events": int((reward != 0).sum()),
        "reward_by_class": {k: _told(c) for k, c in by_class.items()},
        "reward_calibration": {"of": "signs" if signs else "rewards"}
        | calibration(expected, (truth if signs else reward).double(), weight),
        "reward_rows": len(rows),
        "reward_zero_row_weight": zero_weight,
        "termination": _told(_detection(end > 0.5, ended, weight, resamples))
        | {"calibration": calibration(end, ended.double(), weight)},
    }


def end_quality(
    model: WorldModel,
    store: Store | Mixture,
    split: str = "test",
    rows: int = 500,
    burn_in: int = 8,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Precision, recall and F1 of termination where ends count as much as all other rows together.

    Ends are one row in hundreds or thousands: a model that is right about how rare they are seldom gives one more than
    even odds, and `reward_quality`'s rule of 0.5 then says that nothing was found. Here a row is an alarm where the
    model thinks an end likelier than it is for any row of the train split, `share`. That is the better bet where ends
    and other rows are drawn alike, and so they are weighed: every end, and at most `rows` evenly spaced rows of the
    same episodes, which together count as much as the ends. `auc` needs no threshold: how often an end is thought
    likelier than another row, ties by half. By chance precision and `auc` are 0.5.

    Ends of both held-out splits are judged unless the split is train: they are few, and no checkpoint is chosen by
    them. Rows are imagined as in `reward_quality`, and rows without a whole context are left out.
    """
    splits = [split] if split == "train" else ["validation", "test"]
    places, _, ended = (np.concatenate(x) for x in zip(*(_rows(store, s, burn_in) for s in splits), strict=True))
    ends, others = np.flatnonzero(ended), np.flatnonzero(~ended)
    others = others[np.linspace(0, len(others) - 1, min(rows, len(others))).round().astype(int)]
    train = _rows(store, "train", 0)[2]
    share = float((train if len(train) else ended).mean()) if len(ended) else 0.0
    figures: dict[str, Any] = {"splits": splits, "events": len(ends), "others": len(others), "share": share}
    if not len(ends) or not len(others):
        return figures | {"precision": None, "recall": None, "f1": None, "f1_interval": None, "auc": None}
    chosen = np.concatenate([ends, others])
    parts = track(batches(places[chosen], batch_size), "ends of games", progress)
    _, p = _foreseen(model, store, parts, burn_in, generator)
    truth = torch.arange(len(chosen)) < len(ends)
    weight = torch.ones(len(chosen)).double()
    weight[len(ends) :] = len(ends) / len(others)
    told = _told(_detection(p > share, truth, weight, resample_episodes(places[chosen, 0])))
    ahead = torch.sign(p[truth][:, None] - p[~truth]).mean()
    return figures | told | {"auc": number((1 + ahead) / 2)}


def _foreseen(
    model: WorldModel,
    store: Store | Mixture,
    parts: Iterable[np.ndarray],
    burn_in: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Mean reward and probability of an end, (2, N) float64, of the rows (N, 2) in `parts`, each imagined once."""
    device = "cpu" if generator is None else generator.device
    seen = []
    for part in parts:
        window = store.read(part - [0, burn_in], burn_in + 1).to(device)
        _, step = model.step(model.start(window.steps(0, burn_in)), window.action[:, burn_in], generator)
        seen.append(torch.stack([step.reward_mean, step.terminated_mean]).cpu().double())
    return torch.cat(seen, 1)


def _rows(store: Store | Mixture, split: str, burn_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, 2) episode and step, (N,) reward and (N,) whether the game ended, of all rows after a whole context."""
    rows, rewards, flags = [np.empty((0, 2), np.int64)], store.column("reward"), store.column("flags")
    for e in split_episodes(store, split):
        t = np.arange(burn_in, store.lengths[e])
        rows.append(np.stack([np.full_like(t, e), t], axis=1))
    rows = np.concatenate(rows)
    place = store.offsets[rows[:, 0]] + rows[:, 1]
    return rows, rewards[place], split_flags(flags[place])[0]


def _detection(guess: Tensor, truth: Tensor, weight: Tensor, resamples: Resamples) -> dict[str, Any]:
    """Precision, recall and F1 of `guess` (N,) bool, and the F1 of every resample, (1 + R,)."""
    hits, alarms, events = (resamples.sums(weight * x) for x in (guess & truth, guess, truth))
    count = int(truth.sum())
    return {
        "events": count,
        "precision": float(hits[0] / alarms[0]) if alarms[0] else 0.0,
        "recall": float(hits[0] / events[0]) if count else 0.0,
        "f1": float(2 * hits[0] / (alarms[0] + events[0])) if count else 0.0,
        "f1_resampled": 2 * hits / (alarms + events),
    }


def _told(detection: Mapping[str, Any]) -> dict[str, Any]:
    """The detection with an interval in place of the resamples; none where there was no event."""
    told = {k: v for k, v in detection.items() if k != "f1_resampled"}
    return told | {"f1_interval": interval(detection["f1_resampled"]) if told["events"] else None}


def calibration(predicted: Tensor, came: Tensor, weight: Tensor) -> dict[str, Any]:
    """Whether what is predicted comes as often as it says: expected calibration error and the reliability curve.

    The error is the mean over rows of the distance between mean prediction and mean outcome of a row's bin (Guo et al.
    2017, eq. 3, for means in place of probabilities). As most rows have no event and are predicted to have none, the
    same error over the rows predicted at `ALARM` or more in size stands beside it.

    Args:
        predicted: (N,) float64.
        came: (N,) float64.
        weight: (N,) float64, of each row.
    """
    low, high = min(float(predicted.min()), 0.0), max(float(predicted.max()), 1e-6)
    bin_of = ((predicted - low) / (high - low) * BINS).long().clamp(max=BINS - 1)

    def binned(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums = [
            torch.zeros(BINS).double().index_add_(0, bin_of[rows], (weight * x)[rows]) for x in (1, predicted, came)
        ]
        return sums[0], sums[1] / sums[0], sums[2] / sums[0]

    def error(rows: Tensor) -> float | None:
        count, mean, outcome = binned(rows)
        return number((count * (mean - outcome).abs().nan_to_num(0)).sum() / count.sum())

    count, mean, outcome = binned(torch.ones_like(predicted, dtype=torch.bool))
    curve = [
        {"predicted": number(m), "came": number(o), "rows": number(n)}
        for n, m, o in zip(count, mean, outcome, strict=True)
        if n
    ]
    loud = predicted.abs() >= ALARM
    return {
        "error": error(predicted.isfinite()),
        "error_of_alarms": error(loud),
        "alarms": number(weight[loud].sum()),
        "curve": curve,
    }

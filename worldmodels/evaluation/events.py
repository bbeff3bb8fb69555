"""Rewards, terminations and lost lives that a model foresees one step ahead: found, falsely alarmed, and how surely.

Shapes: N rows judged, R resamples.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
FORESEEN = ("reward_mean", "reward_signs", "terminated_mean", "life_loss_mean")
"""Fields of a `Step` that are judged, as far as the model has them."""


class _Rows(NamedTuple):
    """Of rows of a log: episode and step (N, 2) int64, reward (N,), whether the game ended and a life was lost (N,)."""

    place: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    life_loss: np.ndarray


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
    """Precision, recall, F1 and calibration of reward, termination and lost lives, one step ahead on imagined frames.

    For a row t of the split the model sees `burn_in` logged transitions, takes the logged action and imagines the next
    frame. A reward of the class -1 or +1, by sign, is foreseen where the model gives it a probability above 0.5
    (`reward_signs`), whatever its size; of a model that tells the mean alone, where the mean is beyond -0.5 or 0.5.
    `reward_f1_by` says which. An end is foreseen where `terminated_mean` > 0.5. Every row with a reward, an end or a
    lost life is judged, and at most `zero_rows` evenly spaced rows without; a row among these weighs the inverse of
    their sampling rate, so that the figures hold for the natural mixture of rows. `reward_macro_f1` is the mean F1 of
    the classes -1 and +1 that occur; the class zero is left out. Rows without a whole context are left out. Intervals
    are from resampled episodes.

    What counts as an end is what the model calls so: a game over, and a lost life as well where it says by
    `ends_with_lives` that it learned both as one. `termination["of"]` says which. A model that tells lost lives apart
    has the same figures of them under "life_loss".

    Calibration (`calibration`) compares each prediction with what it is a prediction of: `reward_mean` with the reward
    as logged, or with its sign where the model says by `signs` that it knows no more; `terminated_mean` with whether
    an end came. `reward_calibration["of"]` says which it was.
    """
    log = _rows(store, split, burn_in)
    event = (log.reward != 0) | log.terminated | log.life_loss
    events, zeros = np.flatnonzero(event), np.flatnonzero(~event)
    sampled = zeros[np.linspace(0, len(zeros) - 1, min(zero_rows, len(zeros))).round().astype(int)]
    chosen = np.concatenate([events, sampled])
    zero_weight = len(zeros) / max(len(sampled), 1)
    weight = torch.cat([torch.ones(len(events)), torch.full((len(sampled),), zero_weight)]).double()
    log = _Rows(*(column[chosen] for column in log))
    parts = track(batches(log.place, batch_size), f"rewards on {split}", progress)
    seen = _foreseen(model, store, parts, burn_in, generator)
    resamples = resample_episodes(log.place[:, 0])
    reward = torch.from_numpy(log.reward)
    truth = reward.sign()
    by_class = {f"{sign:+d}": _detection(_expected(seen, sign), truth == sign, weight, resamples) for sign in (-1, 1)}
    occurring = [f1 for told, f1 in by_class.values() if told["events"]]
    figures: dict[str, Any] = {"reward_macro_f1": None, "reward_macro_f1_interval": None}
    if occurring:
        f1 = torch.stack(occurring).mean(0)
        figures = {"reward_macro_f1": float(f1[0]), "reward_macro_f1_interval": interval(f1)}
    signs = bool(getattr(model, "signs", False))
    figures |= {
        "reward_f1_by": "probabilities" if "reward_signs" in seen else "means",
        "reward_f1_events": int((reward != 0).sum()),
        "reward_by_class": {k: told for k, (told, _) in by_class.items()},
        "reward_calibration": {"of": "signs" if signs else "rewards"}
        | calibration(seen["reward_mean"], (truth if signs else reward).double(), weight, resamples),
        "reward_rows": len(log.place),
        "reward_zero_row_weight": zero_weight,
    }
    for name, kind in (("termination", "terminated"), ("life_loss", "life_loss")):
        if (p := seen.get(f"{kind}_mean")) is not None:
            ended, of = _ended(model, log, kind)
            came = torch.from_numpy(ended)
            told, _ = _detection(p > 0.5, came, weight, resamples)
            figures[name] = {"of": of, **told, "calibration": calibration(p, came.double(), weight, resamples)}
    return figures


def end_quality(
    model: WorldModel,
    store: Store | Mixture,
    split: str = "test",
    rows: int = 500,
    burn_in: int = 8,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
    progress: bool = True,
    kind: str = "terminated",
) -> dict[str, Any]:
    """Precision, recall and F1 of termination where ends count as much as all other rows together.

    Ends are one row in hundreds or thousands: a model that is right about how rare they are seldom gives one more than
    even odds, and `reward_quality`'s rule of 0.5 then says that nothing was found. Here a row is an alarm where the
    model thinks an end likelier than it is for any row of the train split, `share`. That is the better bet where ends
    and other rows are drawn alike, and so they are weighed: every end, and at most `rows` evenly spaced rows of the
    same episodes, which together count as much as the ends. `auc` needs no threshold: how often an end is thought
    likelier than another row, ties by half. By chance precision and `auc` are 0.5.

    For the split test, ends of both held-out splits are judged: they are few, and no checkpoint is chosen by them. Of
    validation, no test episode is opened. Rows are imagined as in `reward_quality`, and rows without a whole context
    are left out. `kind` "life_loss" judges lost lives in place of ends, by a model that tells them apart.
    """
    splits = ["validation", "test"] if split == "test" else [split]
    log = _Rows(*(np.concatenate(x) for x in zip(*(_rows(store, s, burn_in) for s in splits), strict=True)))
    ended, of = _ended(model, log, kind)
    ends, others = np.flatnonzero(ended), np.flatnonzero(~ended)
    others = others[np.linspace(0, len(others) - 1, min(rows, len(others))).round().astype(int)]
    train, _ = _ended(model, _rows(store, "train", 0), kind)
    share = float((train if len(train) else ended).mean()) if len(ended) else 0.0
    figures: dict[str, Any] = {"of": of, "splits": splits, "events": len(ends), "others": len(others), "share": share}
    if not len(ends) or not len(others):
        names = ("precision", "recall", "f1", "auc")
        return figures | {f"{name}{tail}": None for name in names for tail in ("", "_interval")}
    places = log.place[np.concatenate([ends, others])]
    parts = track(batches(places, batch_size), "ends of games" if kind == "terminated" else "lost lives", progress)
    p = _foreseen(model, store, parts, burn_in, generator)[f"{kind}_mean"]
    truth, resamples = torch.arange(len(places)) < len(ends), resample_episodes(places[:, 0])
    told, _ = _detection(p > share, truth, torch.where(truth, 1.0, len(ends) / len(others)).double(), resamples)
    drawn = resamples.counts[:, resamples.episode[~truth]]
    ahead = (resamples.sums(truth[:, None] * torch.sign(p[:, None] - p[~truth])) * drawn).sum(1)
    auc = (1 + ahead / (resamples.sums(truth) * drawn.sum(1))) / 2
    return figures | told | {"auc": number(auc[0]), "auc_interval": interval(auc)}


def _foreseen(
    model: WorldModel,
    store: Store | Mixture,
    parts: Iterable[np.ndarray],
    burn_in: int,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """The fields `FORESEEN` that the model has, (N, ...) float64, of the rows (N, 2) in `parts`, each imagined once."""
    device = "cpu" if generator is None else generator.device
    seen: dict[str, list[Tensor]] = {}
    for part in parts:
        window = store.read(part - [0, burn_in], burn_in + 1).to(device)
        _, step = model.step(model.start(window.steps(0, burn_in)), window.action[:, burn_in], generator)
        for name in FORESEEN:
            if (value := getattr(step, name)) is not None:
                seen.setdefault(name, []).append(value.cpu().double())
    return {name: torch.cat(values) for name, values in seen.items()}


def _expected(seen: dict[str, Tensor], sign: int) -> Tensor:
    """(N,) bool: whether a reward of this sign is foreseen."""
    if "reward_signs" in seen:
        return seen["reward_signs"][:, int(sign > 0)] > 0.5
    return sign * seen["reward_mean"] > 0.5


def _rows(store: Store | Mixture, split: str, burn_in: int) -> _Rows:
    """All rows after a whole context."""
    rows, rewards, flags = [np.empty((0, 2), np.int64)], store.column("reward"), store.column("flags")
    for e in split_episodes(store, split):
        t = np.arange(burn_in, store.lengths[e])
        rows.append(np.stack([np.full_like(t, e), t], axis=1))
    rows = np.concatenate(rows)
    place = store.offsets[rows[:, 0]] + rows[:, 1]
    terminated, _, life_loss = split_flags(flags[place])
    return _Rows(rows, rewards[place], terminated, life_loss)


def _ended(model: WorldModel, log: _Rows, kind: str) -> tuple[np.ndarray, str]:
    """Whether what the model foretells by `kind` came, (N,) bool, and the ends of what it is."""
    if kind == "life_loss":
        return log.life_loss, "lives"
    if getattr(model, "ends_with_lives", False):
        return log.terminated | log.life_loss, "games and lives"
    return log.terminated, "games"


def _detection(guess: Tensor, truth: Tensor, weight: Tensor, resamples: Resamples) -> tuple[dict[str, Any], Tensor]:
    """Precision, recall and F1 of `guess` (N,) bool with their intervals, and the F1 of every resample, (1 + R,).

    Without an event there are no intervals, and without an alarm none of precision.
    """
    hits, alarms, events = (resamples.sums(weight * x) for x in (guess & truth, guess, truth))
    told: dict[str, Any] = {"events": int(truth.sum())}
    f1 = 2 * hits / (alarms + events)
    for name, values in {"precision": hits / alarms, "recall": hits / events, "f1": f1}.items():
        known = told["events"] and not values[0].isnan()
        told |= {name: float(values[0].nan_to_num(0)), f"{name}_interval": interval(values) if known else None}
    return told, f1


def calibration(predicted: Tensor, came: Tensor, weight: Tensor, resamples: Resamples) -> dict[str, Any]:
    """Whether what is predicted comes as often as it says: expected calibration error and the reliability curve.

    The error is the mean over rows of the distance between mean prediction and mean outcome of a row's bin (Guo et al.
    2017, eq. 3, for means in place of probabilities). As most rows have no event and are predicted to have none, the
    same error over the rows predicted at `ALARM` or more in size stands beside it. Intervals keep the bins; where few
    rows are in a bin they lie high, as drawing episodes again adds its own distance to each bin's.

    Args:
        predicted: (N,) float64.
        came: (N,) float64.
        weight: (N,) float64, of each row.
        resamples: of the rows' episodes.
    """
    low, high = min(float(predicted.min()), 0.0), max(float(predicted.max()), 1e-6)
    bins = F.one_hot(((predicted - low) / (high - low) * BINS).long().clamp(max=BINS - 1), BINS)

    def sums(rows: Tensor) -> list[Tensor]:
        """The weight of `rows` (N,), and of it what is predicted and what came, by bin: (1 + R, BINS) each."""
        return [resamples.sums((weight * rows * x)[:, None] * bins) for x in (torch.ones_like(came), predicted, came)]

    figures: dict[str, Any] = {}
    loud = predicted.abs() >= ALARM
    for name, rows in (("error", torch.ones_like(loud)), ("error_of_alarms", loud)):
        count, mean, outcome = sums(rows)
        error = (mean - outcome).abs().sum(1) / count.sum(1)
        figures |= {name: number(error[0]), f"{name}_interval": None if error[0].isnan() else interval(error)}
    count, mean, outcome = (x[0] for x in sums(torch.ones_like(loud)))
    curve = [
        {"predicted": number(m / n), "came": number(o / n), "rows": number(n)}
        for n, m, o in zip(count, mean, outcome, strict=True)
        if n
    ]
    return figures | {"alarms": number(weight[loud].sum()), "curve": curve}

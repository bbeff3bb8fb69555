"""How far a world model's dreams are from what really happened, beside baselines that never move.

Open loop: the model sees `burn_in` logged transitions, then takes the logged actions on its own frames. 'Changed
pixels' are those where the true frame t+h differs from the true frame t, the last one seen, by more than 8/255 in any
channel: elsewhere copying is right, so that only they tell whether motion was learned. Copying the last frame errs
there twice (where a sprite was and where it is), erasing every sprite only once, hence the static baselines: every
blend of the last frame and the per-pixel median of the training frames in steps of 0.1.

Shapes: W windows, H horizons, S static baselines, R resamples.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodels.data.mixing import Mixture
from worldmodels.data.sampling import even_windows
from worldmodels.data.store import Store
from worldmodels.evaluation.objects import find_objects
from worldmodels.imagination import LoggedActions, imagine
from worldmodels.types import Segment, UserError, WorldModel

HORIZONS = (1, 2, 4, 8, 16)
BLENDS = tuple(round(0.1 * k, 1) for k in range(11))
"""Share of the last frame in the static baselines: 0 is the median frame, 1 is copying the last."""
HIT_PIXELS = {"paddle": 3.0, "ball": 4.0}
"""How near, in pixels, an imagined object must be to its true place."""


def changed_pixels(true: Tensor, last: Tensor) -> Tensor:
    """(B, T, 1, H, W) bool: where `true` (B, T, C, H, W) uint8 differs from `last` (B, C, H, W) by more than 8/255."""
    return ((true.int() - last[:, None].int()).abs() > 8).any(2, keepdim=True)


def _squared_error(a: Tensor, b: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of squared errors on [0, 1] and number of values summed, (B, T) float64 each."""
    error = ((a.float() - b.float()) / 255).square()
    if where is None:
        where = torch.ones_like(error[:, :, :1])
    return (error * where).sum((2, 3, 4), dtype=torch.float64), a.shape[2] * where.sum((2, 3, 4), dtype=torch.float64)


def _psnr(error: Tensor, count: Tensor) -> Tensor:
    """In dB; at most 100, so that a perfect dream has a number, and NaN where nothing was counted."""
    return -10 * torch.log10((error / count).clamp(min=1e-10))


def _plain(values: Tensor) -> list[Any]:
    """Nested lists of numbers of four digits, None for NaN, as JSON wants them."""
    return [_plain(v) if v.ndim else None if v.isnan() else round(float(v), 4) for v in values]


def window_starts(store: Store | Mixture, split: str, length: int, windows: int) -> np.ndarray:
    """At most `windows` evenly spaced (episode, first step) of windows of `length` transitions that hold no padding.

    Raises:
        UserError: if the split has no episode that long.
    """
    if split not in store.splits:
        raise UserError(f"split={split} is unknown; choose one of {', '.join(store.splits)}")
    episodes = store.splits[split][store.lengths[store.splits[split]] > length]
    if not len(episodes):
        raise UserError(
            f"the {split} split of the store {store.path} has no episode of more than {length} steps, the length of a "
            "rollout; lower the horizon or burn_in, choose another split=..., or collect longer episodes"
        )
    # one step longer than needed: the frame after an episode's last action may not have been kept
    return even_windows(store, episodes, windows, length + 1)


def median_frame(store: Store | Mixture, split: str = "train", frames: int = 2000) -> Tensor:
    """Per-pixel median (C, H, W) float32 of at most `frames` evenly spaced frames of a split."""
    starts = window_starts(store, split, 1, frames)
    return torch.from_numpy(np.median(store.read(starts, 1).obs[:, 0].numpy(), axis=0).astype(np.float32))


def open_loop(
    model: WorldModel, window: Segment, burn_in: int, generator: torch.Generator | None = None, device: str = "cpu"
) -> Segment:
    """Dream the rest of `window` (B, burn_in + horizon transitions) from its first `burn_in`, with its actions."""
    policy = LoggedActions(window.action[:, burn_in:].to(device))
    context = window.steps(0, burn_in).to(device)
    return imagine(model, policy, context, window.length - burn_in, generator).to("cpu")


def rollout_quality(
    model: WorldModel,
    store: Store | Mixture,
    split: str = "test",
    windows: int = 128,
    horizons: Sequence[int] = HORIZONS,
    burn_in: int = 8,
    reward_rows: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Every figure of a model on held-out episodes, as plain numbers and lists over `horizons`.

    Args:
        model: on `device`, in evaluation mode.
        store: real play of one game.
        split: "train", "validation" or "test".
        windows: number of rollouts, evenly spaced.
        horizons: steps after the last real frame.
        burn_in: logged transitions before the first imagined frame.
        reward_rows: at most so many rows without reward count in the reward figures (`reward_quality`); 0 omits them.
        batch_size: rollouts in one batch.
        seed: of the model's noise.
        device: where the model is.
        progress: show a bar with the remaining time.

    Raises:
        UserError: if the split is empty or too short.
    """
    generator = torch.Generator(device).manual_seed(seed)
    index = torch.tensor(horizons) - 1
    median = median_frame(store)
    game = str(store.card.get("game"))
    starts = window_starts(store, split, burn_in + max(horizons), windows)
    sums, places = [], []
    for part in track(np.array_split(starts, -(-len(starts) // batch_size)), f"rollouts on {split}", progress):
        window = store.read(part, burn_in + max(horizons))
        assert bool(window.next_mask.all()), "windows were chosen to hold no padding"
        last, true = window.obs[:, burn_in], window.obs[:, burn_in + 1 :][:, index]
        dream = open_loop(model, window, burn_in, generator, device).obs[:, 1:][:, index]
        static = [(b * last.float() + (1 - b) * median)[:, None].expand_as(true) for b in BLENDS]
        moved = changed_pixels(true, last)
        sums.append(
            torch.stack(
                [torch.stack([*_squared_error(x, true), *_squared_error(x, true, moved)]) for x in (dream, *static)]
            )
        )
        copies = last[:, None].expand_as(true)
        places.append([find_objects(x.flatten(0, 1), game) for x in (true, dream, copies)])
    # (1 + S, 4, W, H): error and count on all pixels, error and count on changed ones; the model comes first
    table = torch.cat(sums, dim=2)
    figures: dict[str, Any] = {"game": game, "split": split, "horizons": list(horizons), "windows": len(starts)}
    figures |= {"episodes": len(np.unique(starts[:, 0])), "burn_in": burn_in}
    figures |= _psnr_figures(table, torch.from_numpy(starts[:, 0]), seed)
    figures |= _hit_figures(places, len(horizons), horizons)
    if reward_rows:
        figures |= reward_quality(model, store, split, reward_rows, burn_in, 4 * batch_size, generator, progress)
    return figures


def _psnr_figures(table: Tensor, episode: Tensor, seed: int) -> dict[str, Any]:
    """PSNR of the model and the baselines, and the gains with 95 % intervals from resampling whole episodes."""
    _, row = torch.unique(episode, return_inverse=True)
    episodes = int(row.max()) + 1
    draws = torch.randint(episodes, (1000, episodes), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(1000, episodes, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())
    weights = torch.cat([torch.ones(1, episodes, dtype=torch.float64), weights])[:, row]  # the first is the sample
    sums = torch.einsum("rw,skwh->rskh", weights, table)
    figures: dict[str, Any] = {"changed_share": _plain(sums[0, 0, 3] / sums[0, 0, 1])}
    for name, k in (("psnr", 0), ("psnr_changed", 2)):
        psnr = _psnr(sums[:, :, k], sums[:, :, k + 1])  # (R, 1 + S, H)
        figures[f"{name}_db"] = _plain(psnr[0, 0])
        figures[f"{name}_static_db"] = {str(b): _plain(p) for b, p in zip(BLENDS, psnr[0, 1:], strict=True)}
        baseline = psnr[:, -1] if k == 0 else psnr[:, 1:].amax(1)
        gain = psnr[:, 0] - baseline
        figures[f"{name.replace('psnr', 'psnr_gain')}_db"] = _plain(gain[0])
        low, high = gain[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
        figures[f"{name.replace('psnr', 'psnr_gain')}_interval_db"] = _plain(torch.stack([low, high], 1))
    return figures


def _hit_figures(places: list[list[dict[str, Tensor]]], steps: int, horizons: Sequence[int]) -> dict[str, Any]:
    """Share of the frames showing an object in which the dream has it in (nearly) the same place, by horizon.

    The same share for the copied last frame stands beside it. An object counts in frames where the real one shows it.
    """
    figures: dict[str, Any] = {}
    columns = list(zip(*places, strict=True))  # true, dream, copied
    for name in places[0][0]:
        true, dream, copied = (torch.cat([found[name] for found in z]).unflatten(0, (-1, steps)) for z in columns)
        shown = ~true[..., 0].isnan()
        figures[f"{name}_shown"] = shown.sum(0).tolist()
        for label, found in (("hit_rate", dream), ("hit_rate_copy_last", copied)):
            hit = (found - true).norm(dim=-1) <= HIT_PIXELS[name]  # false where the distance is NaN
            figures[f"{name}_{label}"] = _plain(hit.sum(0) / shown.sum(0))
        if 8 in horizons:
            figures[f"{name}_hit_rate_8"] = figures[f"{name}_hit_rate"][list(horizons).index(8)]
    return figures


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
    """Precision, recall and F1 of the reward's sign, one step ahead on imagined frames.

    For a row t of the split the model sees `burn_in` logged transitions, takes the logged action and imagines the next
    frame; its reward counts as +1 where `reward_mean` > 0.5, as -1 where it is < -0.5. Every row with a reward is
    judged, and at most `zero_rows` evenly spaced rows without; a false alarm among these weighs the inverse of their
    sampling rate, so that the figures hold for the natural mixture of rows. `reward_macro_f1` is the mean F1 of the
    classes -1 and +1 that occur; the class zero is left out. Rows without a whole context are left out.
    """
    rows, truth, rewards = [], [], store.column("reward")
    for e in store.splits[split]:
        reward = rewards[store.offsets[e] : store.offsets[e + 1]]
        t = np.arange(burn_in, len(reward))
        rows.append(np.stack([np.full_like(t, e), t], axis=1))
        truth.append(np.sign(reward[burn_in:]))
    rows, truth = np.concatenate(rows), np.concatenate(truth)
    events, zeros = np.flatnonzero(truth), np.flatnonzero(truth == 0)
    sampled = zeros[np.linspace(0, len(zeros) - 1, min(zero_rows, len(zeros))).round().astype(int)]
    chosen = np.concatenate([events, sampled])
    weight = np.concatenate([np.ones(len(events)), np.full(len(sampled), len(zeros) / max(len(sampled), 1))])
    rows, truth = rows[chosen], truth[chosen]
    device = "cpu" if generator is None else generator.device
    predicted = []
    for part in track(np.array_split(rows, -(-len(rows) // batch_size)), f"rewards on {split}", progress):
        window = store.read(part - [0, burn_in], burn_in + 1).to(device)
        _, step = model.step(model.start(window.steps(0, burn_in)), window.action[:, burn_in], generator)
        predicted.append(((step.reward_mean > 0.5).int() - (step.reward_mean < -0.5).int()).cpu().numpy())
    guess = np.concatenate(predicted)
    by_class = {}
    for sign in (-1, 1):
        true_positive = weight[(guess == sign) & (truth == sign)].sum()
        alarms, count = weight[guess == sign].sum(), int((truth == sign).sum())
        by_class[f"{sign:+d}"] = {
            "events": count,
            "precision": float(true_positive / alarms) if alarms else 0.0,
            "recall": float(true_positive / count) if count else 0.0,
            "f1": float(2 * true_positive / (alarms + count)) if count else 0.0,
        }
    occurring = [c["f1"] for c in by_class.values() if c["events"]]
    return {
        "reward_macro_f1": float(np.mean(occurring)) if occurring else None,
        "reward_f1_events": len(events),
        "reward_by_class": by_class,
        "reward_rows": len(rows),
        "reward_zero_row_weight": float(weight[-1]),
    }


def mean_figures(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over several stores of what `rollout_quality` gave for each, and the sums of rollouts and episodes.

    Each store counts alike; a figure that some lack (an object that a game does not have) is left out, and a number
    that some lack (no reward occurred) is the mean over the others.
    """
    means = {
        name: _mean([part[name] for part in parts])
        for name in parts[0]
        if all(name in part for part in parts) and (name.endswith(_MEANT) or name == "reward_macro_f1")
    }
    sums = {name: sum(part[name] for part in parts) for name in ("windows", "episodes")}
    return {name: parts[0][name] for name in ("split", "horizons", "burn_in")} | sums | means


_MEANT = ("psnr_db", "psnr_changed_db", "_static_db", "gain_db", "gain_changed_db", "_hit_rate", "_hit_rate_copy_last")


def _mean(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: _mean([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], list):
        return [_mean(column) for column in zip(*values, strict=True)]
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def summary(figures: dict[str, Any]) -> list[str]:
    """The figures of `rollout_quality` or `mean_figures` as lines of a table for people."""
    horizons = figures["horizons"]
    lines = [
        f"{figures['windows']} rollouts from {figures['episodes']} episodes of the {figures['split']} split",
        f"{'steps after the last real frame':<44}" + "".join(f"{h:>8}" for h in horizons),
    ]
    rows = {
        "PSNR, all pixels, dB": figures["psnr_db"],
        "  above copying the last frame": figures["psnr_gain_db"],
        "PSNR, changed pixels, dB": figures["psnr_changed_db"],
        "  above the best static baseline": figures["psnr_gain_changed_db"],
    }
    rows |= {f"{name} found": figures[f"{name}_hit_rate"] for name in HIT_PIXELS if f"{name}_hit_rate" in figures}
    for name, values in rows.items():
        lines.append(f"{name:<44}" + "".join("    none" if v is None else f"{v:>8.2f}" for v in values))
    if "reward_macro_f1" in figures:
        by_class = [f"{k}: {c['f1']:.2f} of {c['events']}" for k, c in figures.get("reward_by_class", {}).items()]
        score = "none" if figures["reward_macro_f1"] is None else f"{figures['reward_macro_f1']:.2f}"
        lines.append(f"reward F1 one step ahead: {score}" + (f" ({', '.join(by_class)})" if by_class else ""))
    return lines


def track(parts: Sequence[np.ndarray], description: str, progress: bool = True) -> Iterable[np.ndarray]:
    """`parts`, under a bar that shows the remaining time."""
    from rich.progress import track as bar

    return bar(parts, description, disable=not progress)

"""How far a world model's dreams are from what really happened, beside baselines that never move.

Open loop: the model sees `burn_in` logged transitions, then takes the logged actions on its own frames. Frames are
compared as frames.py says, objects as object_error.py, rewards and terminations as events.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worldmodels.data.mixing import Mixture
from worldmodels.data.store import Store
from worldmodels.evaluation.events import end_quality, reward_quality
from worldmodels.evaluation.frames import frame_figures, frame_scores, static_films
from worldmodels.evaluation.object_error import HIT_PIXELS, object_figures
from worldmodels.evaluation.objects import find_objects, without_objects
from worldmodels.evaluation.perceptual import Perceptual
from worldmodels.evaluation.rollouts import batches, median_frame, open_loop, track, window_starts
from worldmodels.evaluation.stats import episode_weights
from worldmodels.types import WorldModel

HORIZONS = (1, 2, 4, 8, 16)


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
    baseline: WorldModel | None = None,
    lpips: str | None = None,
    fvd: str | None = None,
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
        baseline: a further model to be judged on the same rollouts; its figures stand under "baseline".
        lpips: path of AlexNet's weights for LPIPS (perceptual.py).
        fvd: path of I3D as TorchScript for FVD.

    Raises:
        UserError: if the split is empty or too short, or weights cannot be used.
    """
    models = {"dream": model} if baseline is None else {"dream": model, "baseline": baseline}
    perceptual = Perceptual(lpips, fvd)
    generators = [torch.Generator(device).manual_seed(seed) for _ in models]
    index = torch.tensor(horizons) - 1
    median = median_frame(store)
    game = str(store.card.get("game"))
    starts = window_starts(store, split, burn_in + max(horizons), windows)
    scores, places = [], []
    for part in track(batches(starts, batch_size), f"rollouts on {split}", progress):
        window = store.read(part, burn_in + max(horizons))
        assert bool(window.next_mask.all()), "windows were chosen to hold no padding"
        last, true = window.obs[:, burn_in], window.obs[:, burn_in + 1 :]
        films = {
            name: open_loop(m, window, burn_in, g, device).obs[:, 1:]
            for (name, m), g in zip(models.items(), generators, strict=True)
        }
        dreams = [film[:, index] for film in films.values()]
        static = static_films(last, median, len(horizons))
        scores.append(frame_scores([*dreams, *static], true[:, index], last))
        films |= {"true": true, "copy_last": last[:, None].expand_as(true)}
        places.append({name: find_objects(x[:, index].flatten(0, 1), game) for name, x in films.items()})
        perceptual.see(films, index)
    weights = episode_weights(starts[:, 0], seed)
    figures: dict[str, Any] = {"game": game, "split": split, "horizons": list(horizons), "windows": len(starts)}
    figures |= {"episodes": len(set(starts[:, 0].tolist())), "burn_in": burn_in}
    figures |= frame_figures(torch.cat(scores, 2), weights, window.obs.shape[2], baseline is not None)
    found = {
        film: {o: torch.cat([p[film][o] for p in places]).unflatten(0, (-1, len(horizons))) for o in objects}
        for film, objects in places[0].items()
    }
    of_objects = object_figures(found, weights, horizons)
    second = figures.pop("baseline", {}) | of_objects.pop("baseline", {})
    figures |= of_objects | perceptual.figures(weights)
    if reason := without_objects(window.obs, game):
        figures["without_objects"] = reason
    if reward_rows:
        judged = []
        for m, g in zip(models.values(), generators, strict=True):
            how = {"burn_in": burn_in, "batch_size": 4 * batch_size, "generator": g, "progress": progress}
            rewards = reward_quality(m, store, split, reward_rows, **how)
            ends = {"ends": end_quality(m, store, split, min(500, reward_rows), **how)}
            if "life_loss" in rewards:
                ends["lives"] = end_quality(m, store, split, min(500, reward_rows), **how, kind="life_loss")
            judged.append(rewards | ends)
        figures |= judged[0]
        second |= judged[-1]
    return figures | ({"baseline": second} if baseline is not None else {})


def example_films(
    model: WorldModel,
    store: Store | Mixture,
    split: str,
    horizons: Sequence[int],
    burn_in: int,
    batch_size: int,
    seed: int,
    device: str,
) -> tuple[Tensor, Tensor]:
    """Imagined and real films (N, T+1, C, H, W) uint8 of at most four rollouts; arguments as in `rollout_quality`."""
    window = store.read(
        window_starts(store, split, burn_in + max(horizons), min(4, batch_size)), burn_in + max(horizons)
    )
    dream = open_loop(model, window, burn_in, torch.Generator(device).manual_seed(seed), device)
    return dream.obs, window.obs[:, burn_in:]


def summary(figures: dict[str, Any]) -> list[str]:
    """The figures of `rollout_quality`, or of `mean_figures` of them, as lines of a table for people."""
    horizons, second = figures["horizons"], figures.get("baseline", {})
    alone = " (one episode: its intervals have no width and say nothing)" if figures["episodes"] == 1 else ""
    lines = [
        f"{figures['windows']} rollouts from {figures['episodes']} episodes of the {figures['split']} split{alone}",
        f"{'steps after the last real frame':<44}" + "".join(f"{h:>8}" for h in horizons),
    ]
    rows = {
        "PSNR, all pixels, dB": figures["psnr_db"],
        "  above copying the last frame": figures["psnr_gain_db"],
        "PSNR, changed pixels, dB": figures["psnr_changed_db"],
        "  above the best static baseline": figures["psnr_gain_changed_db"],
        "  above the further checkpoint": second.get("psnr_gain_changed_db"),
        "SSIM, all pixels": figures["ssim"],
        "SSIM, changed pixels": figures["ssim_changed"],
    }
    for name in HIT_PIXELS:
        rows[f"{name} found"] = figures.get(f"{name}_hit_rate")
        rows[f"{name} off by, pixels"] = figures.get(f"{name}_error_px")
    for name, values in rows.items():
        if values is not None:
            lines.append(f"{name:<44}" + "".join("    none" if v is None else f"{v:>8.2f}" for v in values))
    if "reward_macro_f1" in figures:
        by_class = [f"{k}: {c['f1']:.2f} of {c['events']}" for k, c in figures.get("reward_by_class", {}).items()]
        score = "none" if figures["reward_macro_f1"] is None else f"{figures['reward_macro_f1']:.2f}"
        lines.append(f"reward F1 one step ahead: {score}" + (f" ({', '.join(by_class)})" if by_class else ""))
        sure = figures["reward_calibration"]["error_of_alarms"]
        lines.append(
            "where a reward is thought possible, " + ("none is" if sure is None else f"its mean is off by {sure:.2f}")
        )
    if end := figures.get("termination"):
        lines.append(f"termination F1 one step ahead: {end['f1']:.2f} of {end['events']} ends of {end['of']}")
    if (lost := figures.get("life_loss")) and lost["events"]:
        lines.append(f"lost lives F1 one step ahead: {lost['f1']:.2f} of {lost['events']}")
    for even in (figures[name] for name in ("ends", "lives") if name in figures):
        if even["f1"] is not None:
            lines.append(
                f"{even['events']} ends of {even['of']} beside as many other rows: precision {even['precision']:.2f}, "
                f"recall {even['recall']:.2f}, F1 {even['f1']:.2f}, thought likelier than another row {even['auc']:.2f}"
            )
    if other := figures.get("other_actions"):
        lines += _about_other_actions(other)
    if spread := figures.get("sample_spread"):
        ratio = "unknown" if spread["ratio"] is None else f"{spread['ratio']:.2f}"
        lines.append(f"samples after an event, times as far apart as elsewhere: {ratio}")
    lines += [figures[k] for k in ("without_objects", "without_lpips", "without_fvd") if k in figures]
    return lines


def _about_other_actions(other: dict[str, Any]) -> list[str]:
    lines = [f"under other actions, {other['windows']} dreams of {other['steps']} steps:"]
    if reason := other["without_emulator"]:
        return [*lines, f"  {reason}"]
    ratio = "".join(f"{'none' if v is None else f'{v:.2f}':>8}" for v in other["apart_ratio"])
    lines.append(f"{'  frames move apart, times the real game':<44}{ratio}")
    for judge, told in other["divergence"].items():
        rule = ", ".join(f"{k} {v:g}" for k, v in told["threshold"].items())
        steps = ["later" if q is None else f"{q:g}" for q in told["dream"]["quartiles"]]
        lines.append(
            f"  left the real game by {judge} ({rule}) at step {steps[1]} (half between {steps[0]} and {steps[2]})"
        )
    return lines

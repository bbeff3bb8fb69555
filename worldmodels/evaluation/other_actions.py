"""What other actions would have done: how far dreams move apart under them, beside how far the real game does.

From the same held-out frame the model dreams twice with the same noise, once under the logged actions and once under
others. Where the emulator can be brought to that frame, it plays the others as well: then it is known how far frames
should have moved apart, how near the dream of what never was logged is to the truth, and at which step it left it.

Shapes: W windows, T steps, R resamples.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodels.data.mixing import Mixture
from worldmodels.data.store import Store
from worldmodels.evaluation.divergence import divergence_figures
from worldmodels.evaluation.frames import frame_figures, frame_scores, static_films
from worldmodels.evaluation.objects import find_objects
from worldmodels.evaluation.replay import play_on, replay_states
from worldmodels.evaluation.rollouts import batches, median_frame, open_loop, split_episodes, track, window_starts
from worldmodels.evaluation.stats import episode_weights, interval, plain, weighted_mean
from worldmodels.types import UserError, WorldModel

HOLD = 4
"""Steps for which an action is held: long enough to see what it does."""


def other_actions(
    model: WorldModel,
    store: Store | Mixture,
    split: str = "test",
    windows: int = 32,
    steps: int = 32,
    horizons: Sequence[int] = (1, 2, 4, 8, 16),
    burn_in: int = 8,
    divergence_db: float = 15.0,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Action sensitivity, and the step at which dreams leave the real game.

    Args:
        model: on `device`, in evaluation mode.
        store: real play of one game.
        split: "train", "validation" or "test".
        windows: starts, evenly spaced.
        steps: length of the dreams; fewer where the episodes are shorter.
        horizons: steps at which frames are compared; those past the length are left out.
        burn_in: logged transitions before the first imagined frame.
        divergence_db: PSNR on changed pixels below which a dream has left the game.
        batch_size: rollouts in one batch.
        seed: of the actions and of the model's noise.
        device: where the model is.
        progress: show a bar with the remaining time.

    Returns:
        The figures, and films (W, T+1, C, H, W) uint8 under the other actions: "imagined" and, where the emulator
        played them, "real"; none where the log knows a single action. "apart" is the root mean square distance of two
        frames, in levels of 255.

    Raises:
        UserError: if the split is empty or too short.
    """
    known = np.unique(store.column("action"))
    if len(known) < 2:
        return {"windows": 0, "steps": 0, "without_emulator": "the log knows a single action, so there is no other"}, {}
    longest = int(store.lengths[split_episodes(store, split)].max(initial=0))
    steps = max(1, min(steps, longest - burn_in - 1))
    starts = window_starts(store, split, burn_in + steps, windows)
    window = store.read(starts, burn_in + steps)
    generator = torch.Generator().manual_seed(seed)
    other = window.action.clone()
    other[:, burn_in:] = _others(window.action[:, burn_in], known, steps, generator)
    dreams = []
    for k, part in enumerate(track(batches(np.arange(len(starts)), batch_size), "other actions", progress)):
        rows = window.rows(torch.from_numpy(part))
        pair = (rows, replace(rows, action=other[part]))
        # the same noise for both: what moves apart does so for the actions
        dreams.append(
            [open_loop(model, w, burn_in, torch.Generator(device).manual_seed(seed + k), device).obs for w in pair]
        )
    logged, imagined = (torch.cat(films) for films in zip(*dreams, strict=True))
    try:
        real, alive, reason = *_real(store, starts + [0, burn_in], other[:, burn_in:], progress), None
    except UserError as error:
        real, alive, reason = None, torch.ones(len(starts), steps, dtype=torch.bool), str(error)

    shown = [h for h in horizons if h <= steps] or [steps]
    index = torch.tensor(shown) - 1
    weights = episode_weights(starts[:, 0], seed)
    figures: dict[str, Any] = {"windows": len(starts), "episodes": len(np.unique(starts[:, 0])), "steps": steps}
    figures |= {"horizons": shown, "without_emulator": reason}
    true, game = window.obs[:, burn_in + 1 :], str(store.card.get("game"))
    counted = alive[:, index]
    films = {"dream": (logged[:, 1:][:, index], imagined[:, 1:][:, index])}
    if real is not None:
        films["real"] = (true[:, index], real[:, index])
    figures |= _apart(films, counted, game, weights)
    if real is None:
        return figures, {"imagined": imagined}
    last = window.obs[:, burn_in]
    static = static_films(last, median_frame(store), len(shown))
    scores = frame_scores([films["dream"][1], *static], films["real"][1], last) * counted
    figures["frames"] = frame_figures(scores, weights, last.shape[1])
    by_name = {"dream": imagined[:, 1:], "copy_last": last[:, None].expand_as(real)}
    figures["divergence"] = divergence_figures(by_name, real, last, alive, game, divergence_db, weights)
    return figures, {"real": torch.cat([last[:, None], real], 1), "imagined": imagined}


def _others(logged: Tensor, known: np.ndarray, steps: int, generator: torch.Generator) -> Tensor:
    """Random actions (W, T), each held for `HOLD` steps, the first of them another than `logged` (W,)."""
    choice = torch.randint(len(known), (len(logged), -(-steps // HOLD)), generator=generator)
    shift = torch.randint(1, len(known), (len(logged),), generator=generator)
    choice[:, 0] = (torch.from_numpy(np.searchsorted(known, logged.numpy())) + shift) % len(known)
    return torch.from_numpy(known.astype(np.int64))[choice].repeat_interleave(HOLD, 1)[:, :steps]


def _real(store: Store | Mixture, places: np.ndarray, actions: Tensor, progress: bool) -> tuple[Tensor, Tensor]:
    """What the emulator shows after each of `actions` (W, T) from `places`: frames, and whether the game went on."""
    env, states = replay_states(store, places, progress=progress)
    frames, alive = zip(*(play_on(env, s, a) for s, a in zip(states, actions, strict=True)), strict=True)
    return torch.stack(frames), torch.stack(alive)


def _apart(films: dict[str, tuple[Tensor, Tensor]], counted: Tensor, game: str, weights: Tensor) -> dict[str, Any]:
    """How far the two films of each pair are from each other, over the horizons, in levels and in pixels of objects."""
    figures: dict[str, Any] = {}
    levels = {}
    for name, (a, b) in films.items():
        square = (a.float() - b.float()).square().mean((2, 3, 4)).masked_fill(~counted, torch.nan)
        levels[name] = weighted_mean(weights, square).sqrt()
        figures |= {f"{name}_apart": plain(levels[name][0]), f"{name}_apart_interval": interval(levels[name])}
        places = [find_objects(x.flatten(0, 1), game) for x in (a, b)]
        for k in places[0]:
            distance = (places[0][k] - places[1][k]).norm(dim=-1).unflatten(0, a.shape[:2])
            distance = weighted_mean(weights, distance.masked_fill(~counted, torch.nan))
            figures |= {f"{k}_{name}_apart_px": plain(distance[0]), f"{k}_{name}_apart_interval_px": interval(distance)}
    if "real" in levels:
        ratio = levels["dream"] / levels["real"]
        figures |= {"apart_ratio": plain(ratio[0]), "apart_ratio_interval": interval(ratio)}
    return figures

"""Whether dreams differ where the future is open and agree where it is not.

From one frame the model dreams several times under the same actions. The future is open after an event (a reward or a
lost life): a ball is served, anew and from a place that no frame tells. Elsewhere, in a game without sticky actions, it
follows from the frames. Where actions are sticky and the emulator can be brought to the frame, it plays the actions
several times as well, and its own spread stands beside the model's.

Shapes: W windows, K samples, T steps, R resamples.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodels.data.catalog import split_flags
from worldmodels.data.mixing import Mixture
from worldmodels.data.store import Store
from worldmodels.evaluation.objects import find_objects
from worldmodels.evaluation.replay import play_on, replay_states
from worldmodels.evaluation.rollouts import batches, open_loop, split_episodes, track
from worldmodels.evaluation.stats import episode_weights, interval, number, plain, weighted_mean
from worldmodels.types import UserError, WorldModel

QUIET = 24
"""Steps before the first frame in which there must be no event for the future to count as settled."""


def sample_spread(
    model: WorldModel,
    store: Store | Mixture,
    split: str = "test",
    windows: int = 8,
    samples: int = 4,
    after: int = 8,
    steps: int = 16,
    burn_in: int = 8,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """How far several dreams from one frame are from each other, by step, at events and elsewhere.

    Args:
        model: on `device`, in evaluation mode.
        store: real play of one game.
        split: "train", "validation" or "test".
        windows: starts of either kind, evenly spaced; fewer where there are fewer.
        samples: dreams from each, K of at least 2.
        after: steps from an event to the last real frame (in Pong the ball is served 15 steps after a point).
        steps: length of the dreams.
        burn_in: logged transitions before the first imagined frame.
        batch_size: rollouts in one batch.
        seed: of the model's noise.
        device: where the model is.
        progress: show a bar with the remaining time.

    Returns:
        Under "at_events" and "elsewhere" the number of windows and, by step, `frames`, the root mean square distance of
        two samples in levels of 255, and by object the mean distance of two samples that show it, in pixels; the same
        of the real game under "real_at_events" and "real_elsewhere". `ratio` is the mean of `frames` over all steps at
        events, divided by that elsewhere. `without_emulator` says why there is no real spread. Episodes are drawn again
        for all windows together, as one episode has windows of both kinds.

    Raises:
        UserError: fewer than two samples.
    """
    if samples < 2:
        raise UserError(f"spread.samples={samples} cannot differ from each other; take 2 or more, or spread.windows=0")
    figures: dict[str, Any] = {"samples": samples, "steps": steps, "after": after, "without_emulator": None}
    game = str(store.card.get("game"))
    places = _places(store, split, after, steps, burn_in)
    for name, every in places.items():
        places[name] = every[np.unique(np.linspace(0, len(every) - 1, min(windows, len(every))).round().astype(int))]
    drawn = episode_weights(np.concatenate(list(places.values()))[:, 0], seed)
    weights = dict(zip(places, drawn.split([len(starts) for starts in places.values()], 1), strict=True))
    mean = {}
    for name, starts in places.items():
        figures[name] = {"windows": len(starts)}
        if not len(starts):
            continue
        generator = torch.Generator(device).manual_seed(seed)
        spreads = []
        for part in track(
            batches(starts, max(1, batch_size // samples)), f"samples {name.replace('_', ' ')}", progress
        ):
            window = store.read(part, burn_in + steps)
            window = window.rows(torch.arange(len(part)).repeat_interleave(samples))
            obs = open_loop(model, window, burn_in, generator, device).obs[:, 1:]
            spreads.append(_spread(obs.unflatten(0, (-1, samples)), game))
        figures[name] |= _told(spreads, weights[name])
        mean[name] = weighted_mean(weights[name], torch.cat([s["frames"] for s in spreads])).sqrt().mean(1)
        try:
            spreads = _real(store, starts, samples, steps, burn_in, game, progress)
            figures[f"real_{name}"] = {"windows": len(starts)} | _told(spreads, weights[name])
        except UserError as reason:
            figures["without_emulator"] = str(reason)
    ratio = mean["at_events"] / mean["elsewhere"] if len(mean) == 2 else torch.full((2,), torch.nan)
    return figures | {"ratio": number(ratio[0]), "ratio_interval": interval(ratio) if ratio[0].isfinite() else None}


def _places(store: Store | Mixture, split: str, after: int, steps: int, burn_in: int) -> dict[str, np.ndarray]:
    """(N, 2) episode and first step of all windows at events, and of those that have none near."""
    rewards, flags = store.column("reward"), store.column("flags")
    at_events, elsewhere = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
    for e in split_episodes(store, split):
        rows = slice(store.offsets[e], store.offsets[e + 1])
        event = (rewards[rows] != 0) | split_flags(flags[rows])[2]
        # the last real frame is obs[last]; an event of row t is seen in obs[t + 1]
        last = np.arange(burn_in, len(event) - steps)
        seen = np.concatenate([[0], np.cumsum(event)])  # events in the rows before
        quiet = seen[last + steps] == seen[np.maximum(last - QUIET, 0)]
        just = (last > after) & event[np.maximum(last - 1 - after, 0)]
        for places, chosen in ((at_events, just), (elsewhere, quiet)):
            places.append(np.stack([np.full(chosen.sum(), e), last[chosen] - burn_in], 1))
    return {"at_events": np.concatenate(at_events), "elsewhere": np.concatenate(elsewhere)}


def _spread(obs: Tensor, game: str) -> dict[str, Tensor]:
    """Mean distance of two of the K samples in obs (W, K, T, C, H, W), (W, T) each: "frames" squared, in levels."""
    # the mean squared distance of two samples is twice their variance
    spread = {"frames": 2 * obs.float().var(1).mean((2, 3, 4))}
    for name, place in find_objects(obs.flatten(0, 2), game).items():
        place = place.unflatten(0, obs.shape[:3]).transpose(1, 2)  # (W, T, K, 2)
        k = torch.triu_indices(obs.shape[1], obs.shape[1], 1)
        spread[name] = (place[:, :, k[0]] - place[:, :, k[1]]).norm(dim=-1).nanmean(-1)
    return spread


def _told(spreads: list[dict[str, Tensor]], weights: Tensor) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in spreads[0]:
        mean = weighted_mean(weights, torch.cat([s[name] for s in spreads]))
        key, mean, unit = (name, mean.sqrt(), "") if name == "frames" else (name, mean, "_px")
        figures |= {f"{key}{unit}": plain(mean[0]), f"{key}_interval{unit}": interval(mean)}
    return figures


def _real(
    store: Store | Mixture, starts: np.ndarray, samples: int, steps: int, burn_in: int, game: str, progress: bool
) -> list[dict[str, Tensor]]:
    """The spread of the real game, whose sticky actions are drawn anew in each sample."""
    if not store.card.get("sticky_prob"):
        raise UserError("the log has no sticky actions, so that one state of the emulator has one future")
    env, states = replay_states(store, starts + [0, burn_in], rng=False, progress=progress)
    spreads = []
    for start, state in zip(starts, states, strict=True):
        actions = store.read(start[None], burn_in + steps).action[0, burn_in:]
        films = torch.stack([play_on(env, state, actions)[0] for _ in range(samples)])
        spreads.append(_spread(films[None], game))
    return spreads

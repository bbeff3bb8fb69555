"""What MuZero learns from a window of play: its targets, and how an unroll is held against them.

Source: Schrittwieser et al. 2021 (MuZero Unplugged), with the consistency and the value prefix of Ye et al. 2021 and
the term of Liu et al. 2023 (ROSMO) that keeps to logged actions which turned out well.

Legend: B batch, T transitions, F frames of context, K steps of the unroll, A actions, D, h, w of the latent image.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from worldmodels.models.muzero_context import changed, contexts
from worldmodels.ops.groups import action_table, move_windows
from worldmodels.ops.returns import n_step
from worldmodels.types import Metrics, Segment, UserError

POLICY, VALUE = "target_policy", "target_value"
"""Columns of a segment's `side` that hold targets by row: (B, T, A) and (B, T) float32."""
POLICY_KNOWN, VALUE_KNOWN = "target_policy_known", "target_value_known"
"""Beside them, (B, T) bool, which rows have one: where play was cut the logged actions are known and no return is."""
NEVER = -1e9
"""Logit of an action that a game does not have."""


def loss_of(model: Any, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
    """The weighted sum of all losses, each summed over the steps of a window, those after the root weighed by 1 / K.

    Args:
        model: a `MuZero`.
        segment: windows, with targets by row where a search gave them.
        generator: of the changes of the frames.

    Returns:
        The scalar, scalar metrics by name, and `window_loss` (B,), the root's error of value.

    Raises:
        UserError: windows shorter than the context and the unroll.
    """
    first, k = model.frames - 1, model.unroll
    if segment.length < first + k:
        raise UserError(
            f"windows of {segment.length} transitions are too short for frames={model.frames} and unroll={k}; give "
            f"data.length={model.least_length}"
        )
    segment = moved(model, segment, generator)
    told = segment if model.games is None else model.games.withheld(segment, generator)
    targets, unrolled = Targets.of(model, segment), Unrolled.of(model, told, generator)
    scale = torch.full((k + 1,), 1 / k, device=segment.obs.device)
    scale[0] = 1.0
    weight = segment.side["importance"][:, None] if "importance" in segment.side else 1.0

    def mean(error: Tensor, counts: Tensor) -> Tensor:
        # by the number of roots, and not by that of the rows at each step: few windows reach the last, and these few
        # would drown what is learned of the first
        share = scale[-error.shape[1] :] / targets.reached[:, 0].sum().clamp(min=1)
        return (torch.where(counts, error, 0.0) * weight * share).sum()

    end = F.binary_cross_entropy_with_logits(unrolled.end, targets.end, reduction="none")
    logits = unrolled.policy
    if model.games is not None:  # finite, so that 0 times it is 0
        logits = logits.masked_fill(~model.games.legal[model.games.rows(segment)][:, None], NEVER)
    chances = logits.log_softmax(-1)
    losses = {
        "policy": mean(-(targets.policy * chances).sum(-1), targets.policy_known),
        "value": mean(model.value.loss(unrolled.value, targets.value), targets.value_known),
        "reward": mean(model.reward.loss(unrolled.reward, targets.reward), targets.taken),
        "end": mean(end, targets.taken),
    }
    if model.weights["behaviour"]:
        losses["behaviour"] = mean(-chances.gather(-1, targets.action[..., None])[..., 0], targets.better)
    if model.projector is not None:
        losses["consistency"] = mean(_consistency(model, told, unrolled.latent, generator), targets.reached[:, 1:])
    if model.probe is not None:
        losses["probe"] = mean(_probed(model, segment, unrolled.latent), _seen(segment, first, k))
    total = torch.stack([model.weights[name] * loss for name, loss in losses.items()]).sum()
    root = model.value.mean(unrolled.value[:, 0])
    # of several games as the head sees values, or windows of the one with the most points would always come first
    seen = model.value.encode if model.games is not None else lambda value: value
    surprise = torch.where(targets.value_known[:, 0], (seen(root) - seen(targets.value[:, 0])).abs(), 0.0)
    metrics = {"loss": total} | {f"loss_{name}": loss for name, loss in losses.items()}
    metrics |= {"value": root.mean(), "window_loss": surprise}
    return total, {name: metric.detach() for name, metric in metrics.items()}


class Unrolled(NamedTuple):
    """What the loss compares at the root and after each of K actions.

    Args:
        latent: (B, K+1, D, h, w).
        policy: logits (B, K+1, A).
        value: features (B, K+1, V) for the value's head.
        reward: features (B, K, R) for the reward's head, after each action.
        end: logits (B, K) of termination.
    """

    latent: Tensor
    policy: Tensor
    value: Tensor
    reward: Tensor
    end: Tensor

    @classmethod
    def of(cls, model: Any, segment: Segment, generator: torch.Generator | None) -> "Unrolled":
        """From the root of each window along its logged actions."""
        first = model.frames - 1
        frames, *context = contexts(model, segment, [first])
        state = model.root(changed(model, frames, generator), *context)
        latents, rewards, ends = [state["latent"]], [], []
        for place in model.places(segment)[:, first : first + model.unroll].clamp(min=0).unbind(1):
            state, features, end, _ = model.after(state, place)
            rewards.append(features)
            ends.append(end)
            latents.append(state["latent"])
            # the gradient is halved between two steps, so that what reaches the root does not grow with K, and whole
            # from what is read at a step (Schrittwieser et al. 2021, pseudocode)
            state = state | {"latent": torch.lerp(state["latent"].detach(), state["latent"], model.gradient)}
        latent = torch.stack(latents, 1)
        flat, shape = latent.flatten(0, 1), latent.shape[:2]
        policy, value = (x.unflatten(0, shape) for x in (model.logits(flat), model.read_value(flat)))
        return cls(latent, policy, value, torch.stack(rewards, 1), torch.stack(ends, 1))


class Targets(NamedTuple):
    """What a window teaches at the root and after each of K actions.

    Args:
        policy: (B, K+1, A).
        policy_known: (B, K+1) bool, where it counts.
        value: (B, K+1).
        value_known: (B, K+1) bool.
        reward: (B, K), or its sum since the last reset of the value prefix.
        end: (B, K) float, 1 where the action ended the episode.
        taken: (B, K) bool, where the action was taken in the log, and so reward and end count.
        reached: (B, K+1) bool, where the log has a row.
        action: (B, K+1) int64, the logged action's place among the model's.
        better: (B, K+1) bool, where things went on better than the row's own target value, as far as is known.
    """

    policy: Tensor
    policy_known: Tensor
    value: Tensor
    value_known: Tensor
    reward: Tensor
    end: Tensor
    taken: Tensor
    reached: Tensor
    action: Tensor
    better: Tensor

    @classmethod
    def of(cls, model: Any, segment: Segment) -> "Targets":
        """From the side columns of a window or, where they are missing, from the model itself.

        Nothing is made up: what would be bootstrapped from a row without a target, or from behind the window, does not
        count. Where play was cut within n steps, the value is of fewer, bootstrapped at the last row that it has; any n
        from 1 on is a target of the same kind (Ye et al. 2021, EfficientZero, shorten it likewise for old play).
        """
        columns = segment.side if POLICY in segment.side else own_targets(model, segment)
        first, k = model.frames - 1, model.unroll
        known, own = columns[VALUE_KNOWN] & segment.mask, columns[VALUE].float()
        followed = segment.mask & segment.next_mask & ~segment.terminated & ~segment.truncated
        stop = ~followed & ~segment.terminated
        row = torch.arange(segment.length, device=own.device)
        # nothing has a target after the last row before a cut, so that its reward is no part of a return
        ahead = n_step(segment.reward.masked_fill(stop, 0.0), segment.terminated, stop, model.gamma, model.td_steps)
        steps = ahead.steps - stop.gather(1, row + ahead.steps - 1).long()
        place = row + steps
        after, after_known = (F.pad(x, (0, 1)).gather(1, place) for x in (own, known))
        over = ahead.discount == 0
        value = ahead.reward + torch.where(over, 0.0, model.gamma**steps * after)
        value_known = segment.mask & (over | after_known) & (steps > 0)
        action = model.places(segment)
        # by more than rounding: a logged return is made of the same rewards as what it is held against
        better = value_known & known & (action >= 0) & (value - own > 1e-4 * (1 + own.abs()))
        if model.search_value:
            value = torch.lerp(value, own, model.search_value)
            value_known = known if model.search_value == 1 else value_known & known
        legal, pad = action >= 0, max(0, first + k + 1 - segment.length)

        def unrolled(rows: Tensor) -> Tensor:
            return F.pad(rows, (0, pad))[:, first : first + k + 1]

        reached = unrolled(segment.mask).clone()
        reached[:, 1:] &= (followed & legal)[:, first : first + k].cumprod(1).bool()
        taken = reached[:, :-1] & legal[:, first : first + k]
        reward, end = (x[:, first : first + k].float() for x in (segment.reward, segment.terminated))
        if model.prefix is not None:
            reward = torch.cat([part.cumsum(1) for part in reward.split(model.horizon, 1)], 1)
        return cls(
            policy=F.pad(columns[POLICY].float(), (0, 0, 0, pad))[:, first : first + k + 1],
            policy_known=reached & unrolled(columns[POLICY_KNOWN]),
            value=unrolled(value),
            value_known=reached & unrolled(value_known),
            reward=reward,
            end=end,
            taken=taken,
            reached=reached,
            action=unrolled(action.clamp(min=0)),
            better=reached & unrolled(better),
        )


def moved(model: Any, segment: Segment, generator: torch.Generator | None) -> Segment:
    """In training the windows, actions and policies, each window under an element of `model.turned` drawn for it."""
    if len(model.turned) == 1 or not model.training:
        return segment
    g = torch.randint(len(model.turned), (segment.batch_size,), generator=generator, device=segment.obs.device)
    segment = move_windows(segment, model.turned, g)
    if (policy := segment.side.get(POLICY)) is None:
        return segment
    moves = action_table(model.turned, model.actions).to(g.device)[g][:, None].expand_as(policy)
    return replace(segment, side=segment.side | {POLICY: torch.empty_like(policy).scatter_(-1, moves, policy)})


@torch.no_grad()
def own_targets(model: Any, segment: Segment) -> dict[str, Tensor]:
    """Targets by row without any search: the logged action, and the model's own value of each frame."""
    state = model.root(*contexts(model, segment, range(segment.length)))
    value = model.roots(state)[1].unflatten(0, (-1, segment.length))
    place = model.places(segment)
    policy, known = F.one_hot(place.clamp(min=0), len(model.actions)).float(), segment.mask & (place >= 0)
    return {POLICY: policy, VALUE: value, POLICY_KNOWN: known, VALUE_KNOWN: known}


def _consistency(model: Any, segment: Segment, latent: Tensor, generator: torch.Generator | None) -> Tensor:
    """How far (B, K) dynamics from the root lead away from what is seen there (EfficientZero, section 4.1)."""
    first, k = model.frames - 1, model.unroll
    frames, *context = contexts(model, segment, range(first + 1, first + k + 1))
    with torch.no_grad():
        seen = model.represent(changed(model, frames, generator), *context)
    return model.projector(latent[:, 1:].flatten(0, 1), seen).unflatten(0, (-1, k))


def _probed(model: Any, segment: Segment, latent: Tensor) -> Tensor:
    """Squared error (B, K+1) of the frames that the probe draws, in levels of 0 to 1."""
    first = model.frames - 1
    frames = model.probe(latent.flatten(0, 1)).unflatten(0, latent.shape[:2])
    return (frames - segment.obs[:, first : first + latent.shape[1]].float() / 255).square().mean((2, 3, 4))


def _seen(segment: Segment, first: int, k: int) -> Tensor:
    """Where (B, K+1) the log has the frame that play from the root leads to."""
    followed = (segment.mask & segment.next_mask)[:, first : first + k].cumprod(1).bool()
    return torch.cat([segment.mask[:, first : first + 1], followed], 1)

"""MuZero: a latent model of what matters for acting, learned to be searched in (Schrittwieser et al. 2020 and 2021).

A representation makes a latent image of the last frames, dynamics move it by an action, and small heads read reward,
end, value and policy from it. No frame is predicted, but for a probe to look at.

Legend: B batch, N rows, T transitions, F frames of context, K steps of the unroll, A actions, C channels, H and W
pixels, D channels of the latent image and h, w its places.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldmodels.models.muzero_context import contexts
from worldmodels.models.muzero_loss import loss_of
from worldmodels.models.muzero_networks import PARTS, networks
from worldmodels.models.muzero_widths import matched_widths
from worldmodels.nn.equivariant import expand_once
from worldmodels.nn.games import Games
from worldmodels.nn.heads import wide
from worldmodels.nn.latent import Probe, Projector, scaled
from worldmodels.nn.recurrent import init_lstm
from worldmodels.ops.groups import action_table, group, transform
from worldmodels.types import ACTIONS, Metrics, RecurrentOutput, Segment, State, Step, UserError

Head = Callable[..., nn.Module]
WEIGHTS = {
    **{"policy": 1.0, "value": 0.25, "reward": 1.0, "end": 1.0},
    **{"consistency": 2.0, "probe": 1.0, "behaviour": 0.0},
}
"""Of the losses, where nothing else is said."""


class MuZero(nn.Module):
    """Latent dynamics with reward, end, value and policy; a `WorldModel`, and the `Recurrent` of a search.

    Where an episode ends, the model says so by the chance of an end, which discounts what follows; the published MuZero
    learns values of 0 behind the end in its place. Nothing is therefore learned from rows behind an end.

    Targets by row are in the segment's `side`: `target_policy` (B, T, A) and `target_value` (B, T) float32, and
    `target_policy_known` and `target_value_known` (B, T) bool. Without them the logged action is the policy, and
    rewards and the model's own values make the value: cloning, with a value beside it.

    Args:
        image_channels: C.
        image_size: H = W.
        actions: indices into the 18-action set; a search's action k is the k-th of them. Of several games by the name
            of each: the model has all 18 then, and in a window, a state and a search those that its game has.
        representation: further settings of `nn.latent.Representation`.
        dynamics: of `nn.latent.Dynamics`.
        readout: of `nn.latent.Readout`, of which values, policy and rewards have one each.
        value: makes the value's head for a number of features (nn/heads.py).
        reward: makes the reward's head.
        frames: F, how many are seen at the root.
        recurrent: false stacks them; true sees them one by one, each joined to what the dynamics expected.
        unroll: K of the loss.
        gamma: discount.
        td_steps: rows after which the value of a row is bootstrapped from `target_value`.
        search_value: share of a row's own `target_value` in its value's target, the rest being that of n steps; 1 is
            off-policy correction by the search's value alone.
        weights: of the losses of `policy`, `value`, `reward`, `end`, of `consistency` and `probe` where there are such,
            and of `behaviour`, the likelihood of logged actions that turned out better than expected.
        gradient: share of the gradient that goes back from each step of the unroll to the one before.
        standardise: what a pixel differs from its mean, by its deviation, is what is seen; `know` tells both.
        scale_latent: bring each latent image to 0..1.
        consistency: settings of `nn.latent.Projector`, for EfficientZero's loss of self-supervision; None: without.
        value_prefix: `lstm` and `horizon`, for EfficientZero's sum of rewards in place of each one; None: without.
        shift: greatest random shift of the frames in pixels, in training.
        intensity: deviation of a random factor of the frames' brightness, in training.
        probe: `hidden` of `nn.latent.Probe`, which draws frames to look at; None: steps have no frame.
        symmetry: "none", "flip_lr", "flip_ud", "c4" or "d4": what is built into the networks (Deac et al. 2023).
        symmetric: which of `PARTS` have it; None: all, so that the search has it, too.
        route: how the representation has it: "layers" (group convolutions) or "symmetrised" (the paper's).
        matched: with symmetry, widths are such that there are about as many parameters as without, whichever parts have
            it; false: the numbers in the layers of a symmetric representation are of fields.
        turned: a group as `symmetry`, by an element of which each training window is moved: augmentation of the data.
        games: further settings of `nn.games.Games`: the latent image of a frame is told which game it is of, where
            actions are by game; None: the frame must show it.

    Raises:
        UserError: no action, an action outside the set, or a number out of range.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        actions: Sequence[int] | Mapping[str, Sequence[int]],
        representation: dict[str, Any],
        dynamics: dict[str, Any],
        readout: dict[str, Any],
        value: Head,
        reward: Head,
        frames: int = 4,
        recurrent: bool = False,
        unroll: int = 5,
        gamma: float = 0.997,
        td_steps: int = 5,
        search_value: float = 0.0,
        weights: dict[str, float] | None = None,
        gradient: float = 0.5,
        standardise: bool = True,
        scale_latent: bool = True,
        consistency: dict[str, int] | None = None,
        value_prefix: dict[str, int] | None = None,
        shift: int = 0,
        intensity: float = 0.0,
        probe: dict[str, int] | None = None,
        symmetry: str = "none",
        symmetric: Sequence[str] | None = None,
        route: str = "layers",
        matched: bool = True,
        turned: str = "none",
        games: dict[str, float] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        by_game = dict(actions) if isinstance(actions, Mapping) else None
        self.games = None if by_game is None else Games(by_game, **games or {})
        if games is not None and self.games is None:
            raise UserError(f"model.games needs the actions of each game by its name, and not actions={list(actions)}")
        own: Any = actions if by_game is None else range(len(ACTIONS))
        self.actions: list[int] = sorted(set(own))
        if not self.actions or self.actions[0] < 0 or self.actions[-1] >= len(ACTIONS):
            raise UserError(f"model.actions={list(actions)} must be indices 0 to {len(ACTIONS) - 1}, one at least")
        whole, shares = (
            {"frames": frames, "unroll": unroll, "td_steps": td_steps},
            {"gamma": gamma, "gradient": gradient},
        )
        shares["search_value"] = search_value
        for name, number in whole.items():
            if type(number) is not int or number < 1:
                raise UserError(f"model.{name}={number} must be a whole number of at least 1")
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"model.{name}={share} must be from 0 to 1")
        self.image_channels, self.image_size, self.frames, self.unroll = image_channels, image_size, frames, unroll
        self.gamma, self.td_steps, self.search_value, self.gradient = gamma, td_steps, search_value, gradient
        self.weights = WEIGHTS | dict(weights or {})
        if unknown := set(self.weights) - set(WEIGHTS):
            raise UserError(f"model.weights names {min(unknown)}; it has {', '.join(WEIGHTS)}")
        self.standardise, self.scale_latent, self.shift, self.intensity = standardise, scale_latent, shift, intensity
        frame = (image_channels, image_size, image_size)
        self.register_buffer("mean", torch.full(frame, 0.5), persistent=standardise)
        self.register_buffer("scale", torch.full(frame, 2.0), persistent=standardise)
        index = torch.full((len(ACTIONS),), -1)
        index[self.actions] = torch.arange(len(self.actions))
        self.register_buffer("index", index, persistent=False)
        parts = set(PARTS if symmetric is None else symmetric) if symmetry != "none" else set()
        self.group = group(symmetry)
        table, self.turned = action_table(self.group, self.actions), group(turned, "turned")
        for mine in (by_game or {"": self.actions}).values():  # refuses a group under which the actions are not closed
            action_table(self.group, sorted(mine))
            action_table(self.turned, sorted(mine), "turned")
        if parts and matched:
            # the channels of a plain one are fields to the others
            multiple = 1 if "representation" in parts else len(self.group)
            representation, readout = matched_widths(MuZero, given, multiple)
        seen = image_channels * (1 if recurrent else frames)
        made = networks(
            self.group, table, parts, route, seen, image_size, representation, dynamics, readout, recurrent=recurrent
        )
        self.representation, self.dynamics, self.blend = made.representation, made.dynamics, made.blend
        self.read_value, self.read_reward, self.policy = made.read_value, made.read_reward, made.policy
        shape, self.game = self.representation.shape, None
        if games is not None and self.games is not None:  # all channels of a field alike: no symmetry broken
            self.game = nn.Embedding(len(self.games), shape.channels // len(self.group))
        self.prefix, self.horizon, width = None, 0, self.read_reward.width
        if value_prefix is not None:
            self.prefix, self.horizon = nn.LSTMCell(width, value_prefix["lstm"]), value_prefix["horizon"]
            init_lstm(self.prefix)
            width = self.prefix.hidden_size
        self.value: Any = value(features=self.read_value.width)
        self.reward: Any = reward(features=width)
        self.end = nn.Linear(self.read_reward.width, 1)
        self.projector = None if consistency is None else Projector(shape, **consistency)
        self.probe = None if probe is None else Probe(shape, image_channels, image_size, **probe)
        for head in (self.policy.output, self.end, self.value, self.reward):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
        nn.init.constant_(self.end.bias, -3.0)  # ends are rare

    def networks(self) -> list[nn.Module]:
        """What may be compiled in place."""
        return [self.representation, self.dynamics, self.read_value, self.policy, self.read_reward]

    def components(self) -> dict[str, nn.Module]:
        """The parts that a learner optimises: all are one."""
        return {"muzero": self}

    def stages(self) -> dict[str, list[list[nn.Module]]]:
        """The parts from what sees the frames to the output heads, which are the last."""
        seeing = [[layer] for layer in getattr(self.representation, "layers", [self.representation])]
        reading = [self.read_value, self.read_reward, self.policy.read, self.prefix, self.projector]
        heads = [self.value, self.reward, self.end, self.policy.output, self.probe]
        stages = [*seeing, [self.game, self.blend, self.dynamics], reading, heads]
        return {"muzero": [[part for part in stage if part is not None] for stage in stages]}

    # What is seen

    def know(self, frames: Tensor) -> None:
        """Take mean and deviation of each pixel from frames (N, C, H, W) uint8 of the log."""
        if self.standardise:
            deviation, mean = torch.std_mean(frames.double() / 255, dim=0, correction=0)
            self.mean.copy_(self._alike(mean))
            self.scale.copy_(1 / (self._alike(deviation) + 0.1))

    def _alike(self, picture: Tensor) -> Tensor:
        """The mean of what is made of a picture (C, H, W) by the turns of training and then the group.

        So it is what is seen in training, and breaks no symmetry.
        """
        for moves in (self.turned, self.group):
            picture = torch.stack([transform(picture, element) for element in moves.elements]).mean(0)
        return picture

    def represent(self, frames: Tensor, action: Tensor, real: Tensor, game: Tensor | None = None) -> Tensor:
        """The latent image (N, D, h, w) of a context.

        Args:
            frames: (N, F, C, H, W) uint8, or float as `pixels` gives them.
            action: (N, F-1) int64, places in `actions`, between the frames.
            real: (N, F) bool, false for frames before the episode's start.
            game: (N,) int64, rows of the vocabulary of games; 0 by default.
        """
        pixels = self.pixels(frames) if frames.dtype == torch.uint8 else frames
        pixels = torch.where(real[..., None, None, None], pixels, 0.0)  # the mean frame
        if self.blend is None:
            return self._seen(pixels.flatten(1, 2), game)
        each = None if game is None else game.repeat_interleave(pixels.shape[1])
        seen = self._seen(pixels.flatten(0, 1), each).unflatten(0, pixels.shape[:2])
        latent = seen[:, 0]
        for k in range(1, pixels.shape[1]):
            expected = self.move(latent, action[:, k - 1])
            joined = self._scaled(self.blend(expected, seen[:, k]))
            latent = torch.where(real[:, k - 1, None, None, None], joined, seen[:, k])
        return latent

    def _seen(self, pixels: Tensor, game: Tensor | None) -> Tensor:
        latent = self.representation(pixels)
        if self.game is not None:
            row = torch.zeros(len(latent), dtype=torch.long, device=latent.device) if game is None else game
            told = self.game(row).repeat_interleave(len(self.group), 1)
            latent = latent + told[..., None, None]
        return self._scaled(latent)

    def move(self, latent: Tensor, action: Tensor) -> Tensor:
        """The latent image after `action` (N,) int64, a place in `actions`."""
        return self._scaled(self.dynamics(latent, action))

    def pixels(self, frames: Tensor) -> Tensor:
        """What is seen of frames (..., C, H, W) uint8: their difference from the mean, by the deviation."""
        return torch.addcmul(-self.mean * self.scale, frames.float(), self.scale / 255)

    def _scaled(self, latent: Tensor) -> Tensor:
        return scaled(latent) if self.scale_latent else latent

    def places(self, segment: Segment) -> Tensor:
        """Place (B, T) in `actions` of each logged action; -1 where the model, or the window's game, has it not."""
        place = self.index[segment.action]
        return place if self.games is None else torch.where(self.games.has(segment), place, -1)

    # World model, and what a search needs

    def start(self, context: Segment) -> State:
        """The state after the last frame of `context`, of any length."""
        return self.root(*contexts(self, context, [context.length]))

    def root(self, frames: Tensor, action: Tensor, real: Tensor, game: Tensor | None = None) -> State:
        """The state after a context; arguments as of `represent`."""
        return self.fresh(self.represent(frames, action, real, game), game)

    def fresh(self, latent: Tensor, game: Tensor | None = None) -> State:
        """The state of a latent image that was seen and not imagined, in a game (N,) int64 of the vocabulary."""
        state = {"latent": latent}
        if self.games is not None and game is not None:
            state["game"] = game
        if self.prefix is not None:
            zeros = latent.new_zeros(len(latent), 2 * self.prefix.hidden_size + 1)
            state |= {"prefix": zeros, "age": torch.zeros(len(latent), dtype=torch.long, device=latent.device)}
        return state

    def roots(self, state: State) -> tuple[Tensor, Tensor]:
        """Policy logits (B, A) and value (B,) of a state; -inf for actions that its game does not have."""
        latent, logits = state["latent"], self.logits(state["latent"])
        if self.games is not None and "game" in state:
            logits = logits.masked_fill(~self.games.legal[state["game"]], -torch.inf)
        return logits, self.value.mean(self.read_value(latent))

    def logits(self, latent: Tensor) -> Tensor:
        """Policy logits (N, A) of latent images, at least float32."""
        return wide(self.policy(latent))

    def recurrent(self, state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        """A step of a search: `action` (B,) int64 is a place in `actions`."""
        state, features, end, before = self.after(state, action)
        logits, value = self.roots(state)
        reward = self.reward.mean(features) - before
        return RecurrentOutput(reward, self.gamma * (1 - end.sigmoid()), logits, value), state

    def after(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor, Tensor | float]:
        """State, features (B, R) for the reward's head, and the logit (B,) of an end after `action` (B,) int64.

        The action is a place in `actions`. The last that is given is to be taken from the head's mean: the value prefix
        before the action, or 0.
        """
        latent = self.move(state["latent"], action)
        read, after = self.read_reward(latent), {"latent": latent}
        if "game" in state:
            after["game"] = state["game"]
        end = wide(self.end(read)[:, 0])
        if self.prefix is None:
            return after, read, end, 0.0
        width = self.prefix.hidden_size
        fresh = (state["age"] % self.horizon == 0)[:, None]
        memory = torch.where(fresh, 0.0, state["prefix"])
        hidden, cell = (wide(x) for x in self.prefix(read, (memory[:, :width], memory[:, width:-1])))
        total = self.reward.mean(hidden)
        after |= {"prefix": torch.cat([hidden, cell, total[:, None]], 1), "age": state["age"] + 1}
        return after, hidden, end, memory[:, -1]

    @torch.no_grad()
    def step(self, state: State, action: Tensor, generator: torch.Generator | None = None) -> tuple[State, Step]:
        """Take `action` (B,) int64 of the 18-action set.

        Raises:
            UserError: an action that is not among the model's, or that the game of its row does not have.
        """
        if self.games is not None and "game" in state:
            self.games.refuse_illegal(state["game"], action)
        place = self.index[action]
        if (place < 0).any():
            raise UserError(f"the model was trained for the actions {self.actions} and cannot take {action.tolist()}")
        state, features, end, before = self.after(state, place)
        chance = end.sigmoid()
        terminated = torch.rand(chance.shape, generator=generator, device=chance.device) < chance
        reward = self.reward.sample(features, generator) - before
        frame = None if self.probe is None else (self.probe(state["latent"]) * 255).round().byte()
        mean = self.reward.mean(features) - before
        return state, Step(frame, reward, terminated, mean, chance, torch.zeros_like(terminated))

    # Training

    def rows(self) -> tuple[range, range]:
        """Rows of a window whose `target_policy`, and whose `target_value`, the loss needs.

        Where an episode was cut, values are bootstrapped from any row up to `td_steps` later.
        """
        first, last = self.frames - 1, self.frames + self.unroll
        values = range(min(first + self.td_steps, last), last + self.td_steps)
        return range(first, last), values if self.search_value == 0 else range(first, values.stop)

    @property
    def least_length(self) -> int:
        """Transitions that a window of training has at least: the context's, the unroll's and those of the returns."""
        return self.frames + self.unroll + self.td_steps

    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Scalar loss, scalar metrics and `window_loss` (B,), the root's error of value; see `muzero_loss.loss_of`."""
        with expand_once(self):
            return loss_of(self, segment, generator)

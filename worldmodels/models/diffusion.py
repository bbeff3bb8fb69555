"""Diffusion world model: the next frame by an EDM denoiser, reward and termination by the model of models/reward.py.

Source: Alonso et al. 2024, "Diffusion for World Modeling" (DIAMOND), sections 3 and appendices; the settings named
`paper` in conf/model/diffusion.yaml are its published ones. Every other setting is a documented departure.

Legend: B batch, L frames of context, T transitions, C colour channels, H and W pixels, A actions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.models.denoiser import Denoiser
from worldmodels.models.frames import blurred, images_of, logged_frames, to_float, to_uint8
from worldmodels.models.reward import RewardModel
from worldmodels.nn.games import Games
from worldmodels.ops.categorical import expectation, sign_probabilities
from worldmodels.ops.edm import (
    SCHEDULERS,
    Churn,
    diffusers_scheduler,
    karras_sigmas,
    sample,
    sample_with,
)
from worldmodels.ops.groups import Group, action_table, group, move_windows
from worldmodels.ops.shortcut import jump_levels
from worldmodels.types import Metrics, Segment, State, Step, UserError

SAMPLER = (
    "steps",
    "sigma_min",
    "sigma_max",
    "rho",
    "order",
    "start",
    "quantize",
    "churn",
    "scheduler",
    "context_noise",
)


class DiffusionWorldModel(nn.Module):
    """Denoiser and reward model as one `WorldModel`.

    Args:
        denoiser: settings of `Denoiser`.
        reward_model: settings of `RewardModel`.
        sampler: steps, sigma_min, sigma_max, rho and order of the sampler, and `start`: "unit" begins from unit noise
            whatever sigma_max is (as DIAMOND's code), "sigma" from noise at the level sigma_max around the centre;
            and `quantize`: "every" rounds what each network call gives to 8 bits (DIAMOND), "last" the finished frame.
            `churn` has the fields of `ops.edm.Churn`; with `scheduler` one of diffusers' takes the place of our own
            loop (`ops.edm.diffusers_scheduler`), and order and churn do not count.
            `context_noise` is the standard deviation of the noise that the context gets, at most `denoiser`'s; 0 by
            default. A denoiser with `few_step` jumps where steps is a power of two below 2**doublings, and is an
            EDM denoiser for other numbers of steps.
        num_actions: size of the action vocabulary; 18 is ALE's full set.
        image_size: H = W.
        image_channels: C, 3 for RGB and 1 for grey.
        own_frames: share of the training rows in which the reward model sees the denoiser's own next frames in place
            of the logged ones, so that it reads imagined frames as well (DIAMOND: 0).
        reward_length: transitions at the end of a segment that the reward model is trained on, where a segment is long
            for the sake of the denoiser's memory; None for all (DIAMOND). Its own memory is then never longer in
            training: where an episode is a few steps more (Catch of 10x10 cells), it foresaw the end in no dream.
        games: settings of `nn.games.Games`: both models are told which game a window is of, and a dream refuses
            actions that its game does not have; None for one game, or several that are not told apart (DIAMOND).
        symmetry: of the denoiser, which then gives moved frames for moved ones exactly, see there; "none": DIAMOND.
        turned: a group as `symmetry`, by an element of which each training window is moved, frames and actions
            together: augmentation of the data, for the reward model as well; "none": DIAMOND.

    Raises:
        UserError: if a size is not a multiple of the patch, or a choice or noise level of the sampler is not one
            that there is.
    """

    def __init__(
        self,
        denoiser: dict[str, Any],
        reward_model: dict[str, Any],
        sampler: dict[str, Any],
        num_actions: int = 18,
        image_size: int = 64,
        image_channels: int = 3,
        own_frames: float = 0.0,
        reward_length: int | None = None,
        games: dict[str, Any] | None = None,
        symmetry: str = "none",
        turned: str = "none",
    ) -> None:
        super().__init__()
        self.games = None if games is None else Games(**games)
        told = {"games": 0 if self.games is None else len(self.games)}
        shared: dict[str, Any] = {"num_actions": num_actions, "image_channels": image_channels}
        for part, settings in (("denoiser.network", denoiser["network"]), ("reward_model", reward_model)):
            if image_size % settings.get("patch", 1):
                raise UserError(
                    f"model.{part}.patch is {settings['patch']}, which does not divide the image size {image_size}."
                )
        for name, given, known in (
            ("sampler", sampler, SAMPLER),
            ("sampler.churn", sampler.get("churn") or {}, Churn._fields),
        ):
            if unknown := set(given) - set(known):
                raise UserError(f"{name} has no setting {min(unknown)!r}; it has {', '.join(known)}.")
        choices = {"start": ("unit", "sigma"), "quantize": ("every", "last"), "order": (1, 2)}
        for name, allowed in (choices | {"scheduler": (None, *SCHEDULERS)}).items():
            if (value := sampler.get(name, allowed[0])) not in allowed:
                raise UserError(f"sampler.{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")
        if type(sampler["steps"]) is not int or sampler["steps"] < 1:
            raise UserError(f"sampler.steps is {sampler['steps']!r}; it must be a whole number of at least 1.")
        if not (rho := sampler.get("rho", 7.0)) > 0:
            raise UserError(f"sampler.rho is {rho}; it must be above 0.")
        trained = {"sigma_min": 2e-3, "sigma_max": 20.0} | (denoiser.get("noise") or {})
        low, churn = sampler["sigma_min"], Churn(**sampler.get("churn") or {})
        high = sampler["sigma_max"] * (1 + churn.most(sampler["steps"]))
        # a single call is made at sigma_max, but learning to jump makes others
        least = low if sampler["steps"] > 1 or denoiser.get("few_step") is not None else high
        if not (0 < low < high and trained["sigma_min"] <= least and high <= trained["sigma_max"]):
            raise UserError(
                f"sampler.sigma_min={low} and sampler.sigma_max={high:g} (churn included) must rise within what is "
                f"trained, denoiser.noise.sigma_min={trained['sigma_min']} to {trained['sigma_max']}."
            )
        settings = denoiser | {"network": shared | denoiser["network"], "symmetry": symmetry}
        self.turned = group(turned, "turned")
        action_table(
            self.turned, range(num_actions), "turned"
        )  # refuses a group under which the actions are not closed
        if (few_step := denoiser.get("few_step")) is not None:
            ends = {name: sampler[name] for name in ("sigma_min", "sigma_max", "rho") if name in sampler}
            settings["few_step"] = ends | few_step
        self.denoiser = Denoiser(**settings, **told)
        if self.denoiser.jump_of(sampler["steps"]):
            for name, needed in {"start": "sigma", "order": 1, "scheduler": None, "churn": None}.items():
                given = sampler.get(name) or choices.get(name, (None,))[0]
                if given != needed:
                    raise UserError(f"denoiser.few_step needs sampler.{name}={needed or 'null'}, not {given!r}.")
        if not 0 <= sampler.get("context_noise", 0.0) <= self.denoiser.context_noise:
            raise UserError(
                f"sampler.context_noise is {sampler['context_noise']}; it must be from 0 to what is trained, "
                f"denoiser.context_noise={self.denoiser.context_noise}."
            )
        self.reward_model = RewardModel(**shared, image_size=image_size, **reward_model, **told)
        self.num_actions, self.image_size, self.image_channels = num_actions, image_size, image_channels
        self.own_frames, self.reward_length = own_frames, reward_length
        self.context = self.denoiser.context
        self.sampler = dict(sampler)
        # the layout that convolutions are fastest in, in bfloat16 above all
        self.to(memory_format=torch.channels_last)  # pyrefly: ignore

    def quicken(self) -> "DiffusionWorldModel":
        """For imagination alone, on hardware that multiplies bfloat16: convolutions in it, the rest as it is.

        Autocast would convert every weight at every call, which one row at a time costs more than it saves.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.GroupNorm) and self.denoiser.network.backbone != "unet2d":
                module.to(torch.bfloat16)
        return self.eval().requires_grad_(False)

    @property
    def symmetries(self) -> dict[str, Group]:
        """Under which the actions of a game must be closed, by the settings that ask for them."""
        return {"turned": self.turned, "symmetry": self.denoiser.symmetry}

    @property
    def signs(self) -> bool:
        """Whether rewards are known by their sign alone."""
        return self.reward_model.rewards == "sign"

    @property
    def ends_with_lives(self) -> bool:
        """Whether the loss of a life is learned as a termination."""
        return self.reward_model.life_loss == "end"

    def components(self) -> dict[str, nn.Module]:
        """The parts that a learner optimises, with gradient clipping of their own."""
        return {"denoiser": self.denoiser, "reward_model": self.reward_model}

    def stages(self) -> dict[str, list[list[nn.Module]]]:
        """The parts of each component from what sees the frames to its output heads, which are the last."""
        return {"denoiser": self.denoiser.stages(), "reward_model": self.reward_model.stages()}

    def networks(self) -> list[nn.Module]:
        """What is worth compiling (`hardware.compile_in_place`)."""
        return [self.denoiser.network]

    @property
    def min_length(self) -> int:
        """Fewest transitions T of a segment that `loss` takes."""
        return self.context + self.denoiser.rollout

    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Denoising loss plus reward and termination loss of a batch.

        The denoiser is trained on the last 1 + rollout frames of each segment, the reward model on all transitions or
        on the last `reward_length`.

        Args:
            segment: obs (B, T+1, C, H, W) with T >= `min_length`.
            generator: of the noise; torch's own if None.

        Raises:
            UserError: if the segment is too short or its frames are of another size.
        """
        self._check(segment, self.min_length)
        if self.training and len(self.turned) > 1:
            g = torch.randint(len(self.turned), (segment.batch_size,), generator=generator, device=segment.obs.device)
            segment = move_windows(segment, self.turned, g)
        tail = segment.steps(max(0, segment.length - self.min_length - self.denoiser.history), segment.length)
        game = None if self.games is None else self.games.rows(self.games.withheld(segment, generator))
        denoising, seen, each = self.denoiser.loss(tail, generator, game)
        if self.reward_length:
            segment = segment.steps(max(0, segment.length - self.reward_length), segment.length)
        frames = images_of(segment, self.denoiser.padding)
        next_frames = frames[:, 1:]
        if self.own_frames:
            own = torch.rand(len(frames), generator=generator, device=frames.device) < self.own_frames
            seen = torch.cat([frames[:, : -seen.shape[1]], seen], dim=1)[:, -frames.shape[1] :]
            next_frames = torch.where(own[:, None, None, None, None], seen[:, 1:], next_frames)
        reward, metrics = self.reward_model.loss(segment, frames[:, :-1], next_frames, game)
        loss = denoising + reward
        return loss, {"loss": loss.detach(), "loss_denoising": denoising.detach(), **metrics, "window_loss": each}

    def _check(self, segment: Segment, least: int) -> None:
        """Frames and length must be what the networks were built for."""
        expected = (self.image_channels, self.image_size, self.image_size)
        if segment.obs.shape[2:] != expected or segment.obs.dtype != torch.uint8:
            raise UserError(
                f"The model takes frames {expected} uint8 (channels, height, width) but got "
                f"{tuple(segment.obs.shape[2:])} {segment.obs.dtype}; set model.image_size and model.image_channels."
            )
        if segment.length < least:
            raise UserError(
                f"Segments have {segment.length} transitions but the model needs {least}; "
                f"set data.length={least} or more (burn_in where a dream begins)."
            )

    @torch.no_grad()
    def start(self, context: Segment) -> State:
        """State after the last frame of `context`: its last L frames, its game, and what both models remember of it.

        Args:
            context: obs (B, T+1, C, H, W) uint8; masked rows, and what fewer than L frames leave out, are padding as in
                training, where windows begin before the start of an episode.

        Raises:
            UserError: if it holds no transition, or its frames are of another size or type.
        """
        self._check(context, 1)
        frames, action, missing = context.obs, context.action, self.context - context.obs.shape[1]
        grey = 128 if self.denoiser.padding == "grey" else 0  # no level is exactly that of training; 128 is 0.004 away
        frames = torch.where(logged_frames(context), frames, grey)
        if missing > 0:
            frames = F.pad(frames, (0, 0, 0, 0, 0, 0, missing, 0), value=grey)
            action = F.pad(action, (missing, 0))
        images = images_of(context, self.denoiser.padding)
        game = None if self.games is None else self.games.rows(context)
        _, _, memory = self.reward_model(images[:, :-1], images[:, 1:], context.action, None, game)
        state = {
            "frames": frames[:, -self.context :],
            "actions": action[:, action.shape[1] - self.context + 1 :],
            "hidden": memory[0][0],
            "cell": memory[1][0],
        }
        if self.denoiser.memory is not None:
            state["history"] = self.denoiser.memory(images, context.mask)
        if game is not None:
            state["game"] = game
        return state

    @torch.no_grad()
    def step(self, state: State, action: Tensor, generator: torch.Generator | None = None) -> tuple[State, Step]:
        """Imagine one transition.

        Args:
            state: of `start` or an earlier step, for B rows.
            action: (B,) int64.
            generator: decides the frame's noise and the draws of reward and termination.

        Returns:
            The new state, and a `Step` with frame (B, C, H, W) uint8.

        Raises:
            UserError: an action that the game of its row does not have, where the model knows games.
        """
        game = state.get("game")
        if self.games is not None and game is not None:
            self.games.refuse_illegal(game, action)
        frames = to_float(state["frames"])
        actions = torch.cat([state["actions"], action[:, None]], dim=1)
        image = self._sample(frames, actions, generator, state.get("history"), game)
        memory = (state["hidden"][None], state["cell"][None])
        reward_p, end_p, memory = self.reward_model.predict(
            frames[:, -1:], image[:, None], action[:, None], memory, game
        )
        reward_p, end_p, bins = reward_p[:, 0], end_p[:, 0], self.reward_model.bins
        apart = self.reward_model.ends == 2
        drawn = reward_p.multinomial(1, generator=generator)[:, 0]
        ended = torch.rand(end_p.shape, generator=generator, device=end_p.device) < end_p
        frame = to_uint8(image)
        new = {
            "frames": torch.cat([state["frames"][:, 1:], frame[:, None]], dim=1),
            "actions": actions[:, 1:],
            "hidden": memory[0][0],
            "cell": memory[1][0],
        }
        if self.denoiser.memory is not None:
            two = torch.stack([state["frames"][:, -1], frame], dim=1)
            new["history"] = self.denoiser.memory(to_float(two), state=state["history"])
        if game is not None:
            new["game"] = game
        return new, Step(
            frame=frame,
            reward=bins[drawn],
            terminated=ended[:, 0],
            reward_mean=expectation(reward_p, bins),
            terminated_mean=end_p[:, 0],
            truncated=torch.zeros_like(action, dtype=torch.bool),
            life_loss=ended[:, 1] if apart else None,
            life_loss_mean=end_p[:, 1] if apart else None,
            reward_signs=sign_probabilities(reward_p, bins),
        )

    def _sample(
        self,
        context: Tensor,
        action: Tensor,
        generator: torch.Generator | None,
        history: Tensor | None = None,
        game: Tensor | None = None,
    ) -> Tensor:
        """The next 8-bit frame (B, C, H, W) in [-1, 1] for context (B, L, C, H, W), actions (B, L), memory and game."""
        s = self.sampler
        levels = (s["steps"], s["sigma_min"], s["sigma_max"], s.get("rho", 7.0))
        shape = (len(context), *context.shape[2:])
        noise = torch.randn(shape, generator=generator, device=context.device)
        centre = self.denoiser.centre_of(context)
        x = noise * s["sigma_max"] + centre if s.get("start", "unit") == "sigma" else noise

        every, jump = s.get("quantize", "every") == "every", self.denoiser.jump_of(s["steps"])
        jumps = torch.full((len(context),), jump, device=context.device)
        blur = torch.full((len(context),), s.get("context_noise", 0.0), device=context.device)
        if s.get("context_noise"):
            context = blurred(context, blur, generator)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            image = self.denoiser.predict(x - centre, sigma, context, action, centre, jumps, blur, history, game)[0]
            return self.denoiser.quantize(image, centre) if every else image.clamp(-1, 1)

        if s.get("scheduler"):
            image = sample_with(diffusers_scheduler(s["scheduler"], *levels), denoise, x, generator)
        else:
            churn = Churn(**s.get("churn") or {})
            sigmas = jump_levels(*levels) if jump else karras_sigmas(*levels)
            image = sample(denoise, x, sigmas, s.get("order", 1), churn, generator)
        return image if every else self.denoiser.quantize(image, centre)

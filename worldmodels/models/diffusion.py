"""Diffusion world model: the next frame by an EDM denoiser, reward and termination by the model of models/reward.py.

Source: Alonso et al. 2024, "Diffusion for World Modeling" (DIAMOND), sections 3 and appendices; the settings named
`paper` in conf/model/diffusion.yaml are its published ones. Every other setting is a documented departure.

Legend: B batch, L frames of context, T transitions, C colour channels, H and W pixels, A actions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.models.reward import RewardModel
from worldmodels.nn.dilated import DilatedNet
from worldmodels.nn.unet import UNet, conv3x3, groups
from worldmodels.nn.unet2d import UNet2D
from worldmodels.ops.categorical import expectation
from worldmodels.ops.edm import (
    SCHEDULERS,
    Churn,
    add_noise,
    diffusers_scheduler,
    karras_sigmas,
    preconditioners,
    sample,
    sample_with,
    training_sigmas,
)
from worldmodels.ops.motion import move_on
from worldmodels.types import Metrics, Segment, State, Step, UserError

SAMPLER = ("steps", "sigma_min", "sigma_max", "rho", "order", "start", "quantize", "churn", "scheduler")
FRAME_STD = 0.5  # standard deviation by which frames are divided where they enter a network (DIAMOND's sigma_data)


def to_float(frames: Tensor) -> Tensor:
    """uint8 frames to float32 in [-1, 1]."""
    return frames.float().div(127.5).sub(1)


def images_of(segment: Segment, padding: str) -> Tensor:
    """The frames of a segment as float32 (B, T+1, C, H, W) in [-1, 1]; padding is "black" (-1) or "grey" (0)."""
    images = to_float(segment.obs)
    if padding == "black":
        return images
    there = F.pad(segment.mask, (0, 1)) | F.pad(segment.next_mask, (1, 0))
    return torch.where(there[..., None, None, None], images, 0.0)


def to_uint8(images: Tensor, rounding: bool = True) -> Tensor:
    """Float images in [-1, 1] to uint8; without rounding the fraction is cut off (DIAMOND: half a level darker)."""
    levels = images.clamp(-1, 1).add(1).mul(127.5)
    return (levels.round() if rounding else levels).to(torch.uint8)


class FourierFeatures(nn.Module):
    """Random cosine and sine features of a scalar: (B,) -> (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.randn(width // 2))

    def forward(self, x: Tensor) -> Tensor:
        angle = 2 * math.pi * x[:, None] * self.frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class DenoiserNetwork(nn.Module):
    """The network F of EDM over the stacked context and the noisy frame, conditioned on noise level and actions.

    Args:
        num_actions: size A of the action vocabulary.
        image_channels: C.
        context: L, frames (and actions) of context.
        cond_channels: width of the conditioning vector.
        channels: channels of each level.
        depths: residual blocks of each level.
        attention: whether each level attends (the middle always does).
        patch: side of the pixel patches that are folded into channels before the first convolution (1: none).
        hints: further frames that come with the context.
        normed_skip: as in `nn.unet.SelfAttention` (DIAMOND: true).
        backbone: "unet" for our own, "unet2d" for diffusers' (`nn.unet2d`), which has no `normed_skip`, "dilated" for
            one level of `channels` (`nn.dilated`), which knows neither depths nor attention.
        dilations: of the blocks of the dilated backbone.

    Raises:
        UserError: another backbone, or levels that it cannot have.
    """

    def __init__(
        self,
        num_actions: int,
        image_channels: int,
        context: int,
        cond_channels: int,
        channels: list[int],
        depths: Sequence[int] = (),
        attention: Sequence[bool] = (),
        patch: int = 1,
        hints: int = 0,
        normed_skip: bool = False,
        backbone: str = "unet",
        dilations: Sequence[int] = (1, 2, 4, 1, 2),
    ) -> None:
        super().__init__()
        if backbone not in ("unet", "unet2d", "dilated"):
            raise UserError(f"network.backbone is {backbone!r}; allowed are 'unet', 'unet2d' and 'dilated'.")
        self.patch, self.backbone = patch, backbone
        self.noise_embedding = FourierFeatures(cond_channels)
        self.action_embedding = nn.Embedding(num_actions, cond_channels // context)
        self.condition = nn.Sequential(
            nn.Linear(cond_channels, cond_channels), nn.SiLU(), nn.Linear(cond_channels, cond_channels)
        )
        channels_in, channels_out = (context + hints + 1) * image_channels * patch**2, image_channels * patch**2
        if backbone == "unet2d":
            self.unet = UNet2D(channels_in, channels_out, channels, list(depths), cond_channels, list(attention))
            return
        self.conv_in = conv3x3(channels_in, channels[0])
        if backbone == "dilated":
            if len(channels) != 1:
                raise UserError(f"network.backbone=dilated has one level, not network.channels={list(channels)}.")
            self.unet = DilatedNet(channels[0], cond_channels, list(dilations))
        else:
            self.unet = UNet(channels, list(depths), cond_channels, list(attention), normed_skip)
        self.norm_out = nn.GroupNorm(groups(channels[0]), channels[0])
        self.conv_out = conv3x3(channels[0], channels_out)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, noisy: Tensor, c_noise: Tensor, context: Tensor, action: Tensor) -> Tensor:
        """(B, C, H, W), (B,), (B, (L + hints)*C, H, W), (B, L) int64 -> (B, C, H, W)."""
        cond = self.condition(self.noise_embedding(c_noise) + self.action_embedding(action).flatten(1))
        x = F.pixel_unshuffle(torch.cat([context, noisy], dim=1), self.patch)
        if self.backbone == "unet2d":
            x = self.unet(x, cond)
        else:
            x = self.conv_in(x.to(self.conv_in.weight.dtype))
            x = self.conv_out(F.silu(self.norm_out(self.unet(x, cond))))
        return F.pixel_shuffle(x, self.patch)


class Denoiser(nn.Module):
    """EDM denoiser of the next frame given L frames and L actions.

    Args:
        network: settings of `DenoiserNetwork`.
        sigma_data: standard deviation of what is denoised (the frame, or its difference from the last frame).
        sigma_offset: standard deviation of the offset noise.
        noise: settings of `ops.edm.training_sigmas`.
        centre: what is denoised: with "none" the frame itself (DIAMOND); with "last" its difference from the last
            context frame, so that an untrained network copies it and sprites stay sharp; with "moved" its difference
            from the last frame moved on by its own motion (`ops.motion.move_on`), so that what flies goes on flying.
        reach: for "moved", the largest displacement in a step, pixels down and across.
        still: a pixel that is predicted this close to the centre, in [-1, 1], is left as the centre has it, so that
            faint errors do not add up over a rollout (DIAMOND: 0).
        changed_weight: weight in the loss of pixels that differ from the last context frame, or from where "moved"
            expects things, by more than 8/255, where the others weigh 1. 1 is DIAMOND's plain mean.
        rollout: how many further targets are conditioned on the model's own output (DIAMOND: 1).
        rollout_share: share of the batches that have these further targets; the others cost half as much (DIAMOND: 1).
        rounding: whether frames are rounded to 8 bits; DIAMOND cuts the fraction off.
        padding: what stands for frames before an episode's start, "grey" (DIAMOND) or "black".
        noiseless: the network sees zeros for the noisy frame, so that with one noise level and one call it is a
            deterministic regressor of the same size, the baseline of a diffusion model.
    """

    def __init__(
        self,
        network: dict[str, Any],
        sigma_data: float = 0.5,
        sigma_offset: float = 0.3,
        noise: dict[str, Any] | None = None,
        centre: str = "none",
        changed_weight: float = 1.0,
        rollout: int = 1,
        rounding: bool = False,
        rollout_share: float = 1.0,
        still: float = 0.0,
        reach: tuple[int, int] = (5, 7),
        padding: str = "grey",
        noiseless: bool = False,
    ) -> None:
        super().__init__()
        if centre not in ("none", "last", "moved"):
            raise UserError(f"denoiser.centre is {centre!r}; allowed are 'none', 'last' and 'moved'.")
        if padding not in ("grey", "black"):
            raise UserError(f"denoiser.padding is {padding!r}; allowed are 'grey' and 'black'.")
        if centre == "moved" and network["context"] < 4:
            raise UserError(f"denoiser.centre=moved needs 4 frames of context, not {network['context']}.")
        self.network = DenoiserNetwork(**network, hints=int(centre == "moved"))
        self.context: int = network["context"]
        self.sigma_data, self.sigma_offset = sigma_data, sigma_offset
        self.noise = noise or {"loc": -0.4, "scale": 1.2, "sigma_min": 2e-3, "sigma_max": 20.0}
        self.centre, self.changed_weight, self.rollout, self.rounding = centre, changed_weight, rollout, rounding
        self.rollout_share, self.still, self.reach, self.padding = rollout_share, still, tuple(reach), padding
        self.noiseless = noiseless

    @torch.no_grad()
    def centre_of(self, context: Tensor) -> Tensor:
        """What is subtracted from the frame before it is denoised, for context (B, L, C, H, W)."""
        if self.centre == "moved":
            with torch.autocast(context.device.type, enabled=False):  # which displacement is best hangs on small sums
                return move_on(context, self.reach)
        return context[:, -1] if self.centre == "last" else torch.zeros_like(context[:, -1])

    def _scaled(self, context: Tensor, centre: Tensor) -> Tensor:
        """Context (B, L, C, H, W) as the network's input (B, (L + hints)*C, H, W), of about unit variance.

        Centred on a frame, the earlier ones enter as differences from the last: motion stands out of the scene.
        """
        if self.centre == "none":
            return context.flatten(1, 2) / FRAME_STD
        last = context[:, -1:]
        frames = [(context[:, :-1] - last) / self.sigma_data, last / FRAME_STD]
        if self.centre == "moved":
            frames.append((centre[:, None] - last) / self.sigma_data)
        return torch.cat(frames, dim=1).flatten(1, 2)

    def predict(
        self, noisy: Tensor, sigma: Tensor, context: Tensor, action: Tensor, centre: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The denoised frame before clamping, and the c_out that scales the network's output in it (EDM eq. 7).

        Args:
            noisy: (B, C, H, W) noisy frame less its centre.
            sigma: (B,) noise level.
            context: (B, L, C, H, W) frames in [-1, 1].
            action: (B, L) int64.
            centre: (B, C, H, W) of `centre_of`.
        """
        if self.noiseless:
            noisy = torch.zeros_like(noisy)
        c = preconditioners(sigma, self.sigma_data, self.sigma_offset)
        output = self.network(noisy * c.c_in, c.c_noise, self._scaled(context, centre), action).float()
        return c.c_skip * noisy + c.c_out * output + centre, c.c_out

    def quantize(self, image: Tensor, centre: Tensor) -> Tensor:
        """The frame as it is shown: what hardly differs from the centre is left still, and 8 bits can hold it."""
        if self.still:
            image = torch.where((image - centre).abs().amax(1, keepdim=True) > self.still, image, centre)
        return to_float(to_uint8(image, self.rounding))

    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean denoising loss over the targets after the first L frames, and the frames as the model saw them.

        Returns:
            The scalar loss, in which a window counts by its `importance` in `side`, if there is one; (B, T+1, C, H, W)
            float frames in which targets are replaced by the model's own output; and the loss (B,) of each window.
        """
        frames = list(images_of(segment, self.padding).unbind(1))
        losses, each, rollout = [], [], self.rollout
        importance = segment.side.get("importance", 1.0)
        if torch.rand((), generator=generator, device=segment.obs.device) >= self.rollout_share:
            rollout = 0
        for t in range(self.context, self.context + 1 + rollout):
            context, target = torch.stack(frames[t - self.context : t], dim=1), frames[t]
            action = segment.action[:, t - self.context : t]
            centre = self.centre_of(context)
            sigma = training_sigmas(len(target), **self.noise, generator=generator, device=target.device)
            noisy = add_noise(target - centre, sigma, self.sigma_offset, generator)
            denoised, c_out = self.predict(noisy, sigma, context, action, centre)
            # EDM's loss on the network's output: the denoised frame's error divided by c_out
            error = ((denoised - target) / c_out).square()
            if self.changed_weight != 1:
                wrong = (target - context[:, -1]).abs()
                if self.centre == "moved":  # where something was expected and did not come
                    wrong = torch.maximum(wrong, (target - centre).abs())
                changed = wrong.amax(1, keepdim=True) > 2 * 8 / 255
                error = error * torch.where(changed, self.changed_weight, 1.0)
            real = segment.next_mask[:, t - 1].float()
            each.append(error.mean((1, 2, 3)) * real)
            losses.append((each[-1] * importance).sum() / real.sum().clamp(min=1))
            frames[t] = self.quantize(denoised.detach(), centre)
        return torch.stack(losses).mean(), torch.stack(frames, dim=1), torch.stack(each).mean(0).detach()


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
        num_actions: size of the action vocabulary; 18 is ALE's full set.
        image_size: H = W.
        image_channels: C, 3 for RGB and 1 for grey.
        own_frames: share of the training rows in which the reward model sees the denoiser's own next frames in place
            of the logged ones, so that it reads imagined frames as well (DIAMOND: 0).

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
    ) -> None:
        super().__init__()
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
        trained = {"sigma_min": 2e-3, "sigma_max": 20.0} | (denoiser.get("noise") or {})
        low, high = sampler["sigma_min"], sampler["sigma_max"]
        least = low if sampler["steps"] > 1 else high  # a single call is made at sigma_max
        if not (0 < low < high and trained["sigma_min"] <= least and high <= trained["sigma_max"]):
            raise UserError(
                f"sampler.sigma_min={low} and sampler.sigma_max={high} must rise within what is trained, "
                f"denoiser.noise.sigma_min={trained['sigma_min']} to {trained['sigma_max']}."
            )
        self.denoiser = Denoiser(**{**denoiser, "network": shared | denoiser["network"]})
        self.reward_model = RewardModel(**shared, image_size=image_size, **reward_model)
        self.num_actions, self.image_size, self.image_channels = num_actions, image_size, image_channels
        self.own_frames = own_frames
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
    def signs(self) -> bool:
        """Whether rewards are known by their sign alone."""
        return self.reward_model.rewards == "sign"

    def components(self) -> dict[str, nn.Module]:
        """The parts that a learner optimises, with gradient clipping of their own."""
        return {"denoiser": self.denoiser, "reward_model": self.reward_model}

    @property
    def min_length(self) -> int:
        """Fewest transitions T of a segment that `loss` takes."""
        return self.context + self.denoiser.rollout

    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Denoising loss plus reward and termination loss of a batch.

        The denoiser is trained on the last L + 1 + rollout frames of each segment, the reward model on all transitions.

        Args:
            segment: obs (B, T+1, C, H, W) with T >= `min_length`.
            generator: of the noise; torch's own if None.

        Raises:
            UserError: if the segment is too short or its frames are of another size.
        """
        self._check(segment, self.min_length)
        tail = segment.steps(segment.length - self.min_length, segment.length)
        denoising, seen, each = self.denoiser.loss(tail, generator)
        frames = images_of(segment, self.denoiser.padding)
        next_frames = frames[:, 1:]
        if self.own_frames:
            own = torch.rand(len(frames), generator=generator, device=frames.device) < self.own_frames
            seen = torch.cat([frames[:, : -seen.shape[1]], seen], dim=1)
            next_frames = torch.where(own[:, None, None, None, None], seen[:, 1:], next_frames)
        reward, metrics = self.reward_model.loss(segment, frames[:, :-1], next_frames)
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
        """State after the last frame of `context`: its last L frames, and the reward model's memory of all of it.

        Args:
            context: obs (B, T+1, C, H, W) uint8; with fewer than L frames the missing ones are padding, as before the
                start of an episode.

        Raises:
            UserError: if it holds no transition, or its frames are of another size or type.
        """
        self._check(context, 1)
        frames, action, missing = context.obs, context.action, self.context - context.obs.shape[1]
        if missing > 0:
            # no level is exactly the grey of training; 128 is 0.004 away
            grey = 128 if self.denoiser.padding == "grey" else 0
            frames = F.pad(frames, (0, 0, 0, 0, 0, 0, missing, 0), value=grey)
            action = F.pad(action, (missing, 0))
        images = to_float(context.obs)
        _, _, memory = self.reward_model(images[:, :-1], images[:, 1:], context.action)
        return {
            "frames": frames[:, -self.context :],
            "actions": action[:, action.shape[1] - self.context + 1 :],
            "hidden": memory[0][0],
            "cell": memory[1][0],
        }

    @torch.no_grad()
    def step(self, state: State, action: Tensor, generator: torch.Generator | None = None) -> tuple[State, Step]:
        """Imagine one transition.

        Args:
            state: of `start` or an earlier step, for B rows.
            action: (B,) int64.
            generator: decides the frame's noise and the draws of reward and termination.

        Returns:
            The new state, and a `Step` with frame (B, C, H, W) uint8.
        """
        frames = to_float(state["frames"])
        actions = torch.cat([state["actions"], action[:, None]], dim=1)
        image = self._sample(frames, actions, generator)
        memory = (state["hidden"][None], state["cell"][None])
        reward_p, end_p, memory = self.reward_model.predict(frames[:, -1:], image[:, None], action[:, None], memory)
        reward_p, end_p, bins = reward_p[:, 0], end_p[:, 0], self.reward_model.bins
        apart = self.reward_model.ends == 2
        drawn = reward_p.multinomial(1, generator=generator)[:, 0]
        ended = torch.rand(end_p.shape, generator=generator, device=end_p.device) < end_p
        frame = to_uint8(image)
        state = {
            "frames": torch.cat([state["frames"][:, 1:], frame[:, None]], dim=1),
            "actions": actions[:, 1:],
            "hidden": memory[0][0],
            "cell": memory[1][0],
        }
        return state, Step(
            frame=frame,
            reward=bins[drawn],
            terminated=ended[:, 0],
            reward_mean=expectation(reward_p, bins),
            terminated_mean=end_p[:, 0],
            truncated=torch.zeros_like(action, dtype=torch.bool),
            life_loss=ended[:, 1] if apart else None,
            life_loss_mean=end_p[:, 1] if apart else None,
        )

    def _sample(self, context: Tensor, action: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next 8-bit frame (B, C, H, W) in [-1, 1] for context (B, L, C, H, W) and actions (B, L)."""
        s = self.sampler
        levels = (s["steps"], s["sigma_min"], s["sigma_max"], s.get("rho", 7.0))
        shape = (len(context), *context.shape[2:])
        noise = torch.randn(shape, generator=generator, device=context.device)
        centre = self.denoiser.centre_of(context)
        x = noise * s["sigma_max"] + centre if s.get("start", "unit") == "sigma" else noise

        every = s.get("quantize", "every") == "every"

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            image = self.denoiser.predict(x - centre, sigma, context, action, centre)[0]
            return self.denoiser.quantize(image, centre) if every else image.clamp(-1, 1)

        if s.get("scheduler"):
            image = sample_with(diffusers_scheduler(s["scheduler"], *levels), denoise, x, generator)
        else:
            churn = Churn(**s.get("churn") or {})
            image = sample(denoise, x, karras_sigmas(*levels), s.get("order", 1), churn, generator)
        return image if every else self.denoiser.quantize(image, centre)

"""The denoiser of the diffusion world model: what EDM's network sees of the next frame and its past, and its loss.

Source: Karras et al. 2022 (EDM) and Alonso et al. 2024, "Diffusion for World Modeling" (DIAMOND), section 3 and
appendices.

Legend: B batch, L frames of context, T transitions, C colour channels, H and W pixels, A actions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.nn.dilated import DilatedNet
from worldmodels.nn.unet import UNet, conv3x3, groups
from worldmodels.nn.unet2d import UNet2D
from worldmodels.ops.edm import add_noise, preconditioners, training_sigmas
from worldmodels.ops.motion import move_on
from worldmodels.types import Segment, UserError

FRAME_STD = 0.5  # standard deviation by which frames are divided where they enter a network (DIAMOND's sigma_data)


def to_float(frames: Tensor) -> Tensor:
    """uint8 frames to float32 in [-1, 1]."""
    return frames.float().div(127.5).sub(1)


def images_of(segment: Segment, padding: str) -> Tensor:
    """The frames of a segment as float32 (B, T+1, C, H, W) in [-1, 1]; padding is "black" (-1) or "grey" (0)."""
    images = to_float(segment.obs)
    return images if padding == "black" else torch.where(logged_frames(segment), images, 0.0)


def logged_frames(segment: Segment) -> Tensor:
    """Which frames are no padding, (B, T+1, 1, 1, 1) bool."""
    return (F.pad(segment.mask, (0, 1)) | F.pad(segment.next_mask, (1, 0)))[..., None, None, None]


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

"""The network F of EDM in the diffusion world model, on one of three backbones.

Source: Karras et al. 2022 (EDM) and Alonso et al. 2024, "Diffusion for World Modeling" (DIAMOND), appendices.

Legend: B batch, L frames of context, C colour channels, H and W pixels, A actions.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.nn.dilated import DilatedNet
from worldmodels.nn.unet import UNet, conv3x3, groups
from worldmodels.nn.unet2d import UNet2D
from worldmodels.types import UserError


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
        labels: further conditions by name, and how many values each has; they start without effect, but for "game".

    Raises:
        UserError: another backbone, levels that it cannot have, or a context that does not divide the condition.
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
        labels: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if backbone not in ("unet", "unet2d", "dilated"):
            raise UserError(f"network.backbone is {backbone!r}; allowed are 'unet', 'unet2d' and 'dilated'.")
        if type(context) is not int or context < 1 or cond_channels % context:
            raise UserError(
                f"network.context is {context}; it must be a whole number that divides network.cond_channels, "
                f"{cond_channels}, of which the action of each frame has an equal share."
            )
        self.patch, self.backbone = patch, backbone
        self.noise_embedding = FourierFeatures(cond_channels)
        self.action_embedding = nn.Embedding(num_actions, cond_channels // context)
        self.condition = nn.Sequential(
            nn.Linear(cond_channels, cond_channels), nn.SiLU(), nn.Linear(cond_channels, cond_channels)
        )
        self.labels = nn.ModuleDict({name: nn.Embedding(n, cond_channels) for name, n in (labels or {}).items()})
        for name, embedding in self.labels.items():
            if name != "game":  # what scales by the condition begins at zero; two zeros in a row would learn nothing
                nn.init.zeros_(embedding.weight)  # pyrefly: ignore
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

    def stages(self) -> list[list[nn.Module]]:
        """Its parts from input to output, the last of which are its head."""
        told: list[nn.Module] = [self.action_embedding, self.condition, self.labels]
        stages = self.unet.stages()
        if self.backbone == "unet2d":
            return [[*told, *stages[0]], *stages[1:]]
        return [[*told, self.conv_in], *stages, [self.norm_out, self.conv_out]]

    def forward(
        self,
        noisy: Tensor,
        c_noise: Tensor,
        context: Tensor,
        action: Tensor,
        labels: Mapping[str, Tensor],
        memory: Tensor | None = None,
    ) -> Tensor:
        """The output (B, C, H, W).

        Args:
            noisy: (B, C, H, W).
            c_noise: (B,).
            context: (B, (L + hints)*C, H, W).
            action: (B, L) int64.
            labels: (B,) int64 by name.
            memory: (B, channels[0], h, w), a coarse image.
        """
        cond = self.noise_embedding(c_noise) + self.action_embedding(action).flatten(1)
        for name, embedding in self.labels.items():
            cond = cond + embedding(labels[name])
        cond = self.condition(cond)
        x = torch.cat([context, noisy], dim=1)
        if self.patch > 1:  # patches of one pixel would be copied
            x = F.pixel_unshuffle(x, self.patch)
        if self.backbone == "unet2d":
            x = self.unet(x, cond)
        else:
            x = self.conv_in(x.to(self.conv_in.weight.dtype))
            if memory is not None:
                x = x + F.interpolate(memory.to(x.dtype), x.shape[-2:], mode="bilinear")
            x = self.conv_out(F.silu(self.norm_out(self.unet(x, cond))))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x

"""Residual U-Net blocks conditioned by adaptive group norm, as DIAMOND's denoiser and reward model use them.

Source: Alonso et al. 2024 (DIAMOND), section 3. Legend: B batch, C channels, H and W pixels, D condition.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from worldmodels.types import UserError

GROUP_SIZE = 32  # channels a norm group
NORM_EPS = 1e-5
HEAD_DIM = 8  # channels an attention head


def groups(channels: int) -> int:
    """Number of norm groups for so many channels."""
    return max(1, channels // GROUP_SIZE)


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size (or halves it with stride 2)."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1)


def check_levels(channels: Sequence[int], depths: Sequence[int], attention: Sequence[bool]) -> None:
    """Refuse settings of levels that do not tell as much of each.

    Raises:
        UserError: there is no level, or the lists differ in length.
    """
    if not 0 < len(channels) == len(depths) == len(attention):
        raise UserError(
            f"channels={list(channels)}, depths={list(depths)} and attention={list(attention)} must have one entry "
            "for each level of the network."
        )


class _NormSiLU(torch.autograd.Function):
    """SiLU(n (1 + scale) + shift), n being the group norm of x, that keeps n alone for its gradients.

    Composed of torch's functions it would keep x, n and the input of SiLU, which are most of what training holds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int) -> Tensor:
        """(B, C, H, W), scale and shift (B, C, 1, 1)."""
        b, c, h, w = x.shape
        # F.group_norm sees to this, what is below it refuses: on a GPU it takes one layout alone, on a CPU these two
        if not (x.is_contiguous() or (x.is_cpu and x.is_contiguous(memory_format=torch.channels_last))):
            x = x.contiguous()
        norm, _, deviation = torch.native_group_norm(x, None, None, b, c, h * w, groups, NORM_EPS)
        ctx.save_for_backward(norm, scale, shift, deviation)
        return F.silu(torch.addcmul(shift, norm, 1 + scale), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With respect to x, scale and shift."""
        norm, scale, shift, inverse = ctx.saved_tensors  # inverse: (B, groups), 1 / standard deviation
        (c, h, w), k, factor = norm.shape[1:], inverse.shape[1], 1 + scale
        g = torch.ops.aten.silu_backward(gradient, torch.addcmul(shift, norm, factor))
        # sums of bfloat16 are formed in float32, and ten times as fast as those that are asked for in float32
        to_shift, to_scale = g.sum((2, 3)), (g * norm).sum((2, 3))  # (B, C)
        # gradient of a norm: (g - mean of g - n * mean of g n) / deviation, with g factor in the place of g
        per_channel = torch.stack([to_shift, to_scale]).float() * factor.flatten(1)
        mean, along = per_channel.unflatten(2, (k, -1)).sum(-1) * inverse / (h * w * c // k)  # (B, groups) each
        mean, along, inverse = (
            t.repeat_interleave(c // k, 1)[:, :, None, None].to(norm.dtype) for t in (-mean, -along, inverse)
        )
        to_x = torch.addcmul(mean, norm, along).addcmul_(g, inverse * factor)
        to_scale, to_shift = (t[:, :, None, None].to(scale.dtype) for t in (to_scale, to_shift))
        return to_x, to_scale, to_shift, None


class AdaGroupNorm(nn.Module):
    """SiLU of a group norm whose scale and shift are linear in the condition: (B, C, H, W), (B, D) -> (B, C, H, W)."""

    def __init__(self, channels: int, cond_channels: int) -> None:
        super().__init__()
        self.groups = groups(channels)
        self.linear = nn.Linear(cond_channels, 2 * channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.linear(cond).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        if torch.is_grad_enabled():
            return _NormSiLU.apply(x, scale, shift, self.groups)
        # an autograd function costs time of its own even where no gradient is wanted
        return F.silu(torch.addcmul(shift, F.group_norm(x, self.groups, eps=NORM_EPS), 1 + scale), inplace=True)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels of (B, C, H, W), added to them.

    Args:
        channels: C.
        normed_skip: add it to the normalised pixels, as DIAMOND's code does, in place of the pixels themselves.
    """

    def __init__(self, channels: int, normed_skip: bool = False) -> None:
        super().__init__()
        self.normed_skip = normed_skip
        self.heads = max(1, channels // HEAD_DIM)
        self.norm = nn.GroupNorm(groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # pyrefly: ignore

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        qkv = self.qkv(normed).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2)
        y = F.scaled_dot_product_attention(*qkv.unbind(1))  # (B, heads, H*W, C/heads)
        return (normed if self.normed_skip else x) + self.out(y.transpose(-1, -2).reshape(x.shape))


class ResBlock(nn.Module):
    """Two conditioned convolutions and a skip; the second starts at zero, so that the block starts as its skip."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        cond_channels: int,
        attention: bool = False,
        normed_skip: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)
        self.norm1 = AdaGroupNorm(channels_in, cond_channels)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=dilation, dilation=dilation)
        self.norm2 = AdaGroupNorm(channels_out, cond_channels)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.attention = SelfAttention(channels_out, normed_skip) if attention else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x, cond))
        y = self.conv2(self.norm2(y, cond))
        return self.attention(self.skip(x) + y)


def downsample(channels: int) -> nn.Conv2d:
    """Strided convolution with orthogonal weights: halves H and W."""
    conv = conv3x3(channels, channels, stride=2)
    nn.init.orthogonal_(conv.weight)
    return conv


class Upsample(nn.Module):
    """Nearest-neighbour doubling of H and W, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """Levels of residual blocks, halving the size between levels, and attending blocks at the lowest.

    Args:
        channels: channels of each level.
        depths: residual blocks of each level.
        cond_channels: width D of the condition.
        attention: whether the blocks of each level attend.
        middle: number of attending blocks at the lowest level (DIAMOND: 2).
        normed_skip: as in `SelfAttention`.

    Raises:
        UserError: the three lists differ in length.
    """

    def __init__(
        self,
        channels: list[int],
        depths: list[int],
        cond_channels: int,
        attention: list[bool],
        middle: int = 2,
        normed_skip: bool = False,
    ) -> None:
        super().__init__()
        check_levels(channels, depths, attention)
        previous = [channels[0], *channels[:-1]]
        self.levels = nn.ModuleList(
            nn.ModuleList(ResBlock(p if i == 0 else c, c, cond_channels, a, normed_skip) for i in range(depth))
            for p, c, depth, a in zip(previous, channels, depths, attention, strict=True)
        )
        self.down = nn.ModuleList([nn.Identity(), *map(downsample, channels[:-1])])
        self.middle = nn.ModuleList(
            ResBlock(channels[-1], channels[-1], cond_channels, True, normed_skip) for _ in range(middle)
        )

    def stages(self) -> list[list[nn.Module]]:
        """Its parts from input to output."""
        return [*([down, level] for down, level in zip(self.down, self.levels, strict=True)), [self.middle]]

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """(B, C0, H, W), (B, D) -> the lowest features, and by level every feature map a decoder may join."""
        skips = []
        for down, level in zip(self.down, self.levels, strict=True):
            x = down(x)
            maps = [x]
            for block in level:  # pyrefly: ignore
                x = block(x, cond)
                maps.append(x)
            skips.append(maps)
        for block in self.middle:
            x = block(x, cond)
        return x, skips


class UNet(nn.Module):
    """Encoder and mirrored decoder with a skip into every decoder block: (B, C0, H, W), (B, D) -> (B, C0, H, W).

    Sizes that the levels do not divide are padded with zeros on the right and below, and cut again.
    """

    def __init__(
        self,
        channels: list[int],
        depths: list[int],
        cond_channels: int,
        attention: list[bool],
        normed_skip: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(channels, depths, cond_channels, attention, normed_skip=normed_skip)
        previous = [channels[0], *channels[:-1]]
        self.levels = nn.ModuleList(
            nn.ModuleList(
                # the last block of a level hands over the width of the level above
                ResBlock(2 * c if i < depth else c + p, c if i < depth else p, cond_channels, a, normed_skip)
                for i in range(depth + 1)
            )
            for p, c, depth, a in reversed(list(zip(previous, channels, depths, attention, strict=True)))
        )
        self.up = nn.ModuleList([nn.Identity(), *map(Upsample, reversed(channels[:-1]))])
        self.multiple = 2 ** (len(channels) - 1)

    def stages(self) -> list[list[nn.Module]]:
        """Its parts from input to output."""
        return [*self.encoder.stages(), *([up, level] for up, level in zip(self.up, self.levels, strict=True))]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        right, below = -w % self.multiple, -h % self.multiple
        if right or below:  # padding by nothing would copy
            x = F.pad(x, (0, right, 0, below))
        x, skips = self.encoder(x, cond)
        for up, level, maps in zip(self.up, self.levels, reversed(skips), strict=True):
            x = up(x)
            for block, skip in zip(level, reversed(maps), strict=True):  # pyrefly: ignore
                x = block(torch.cat([x, skip], dim=1), cond)
        return x[..., :h, :w]

"""diffusers' UNet2DModel in the place of our own U-Net, to compare the two.

It differs in that its norms adapt to the condition only in the second half of a block, and in an attention less in the
middle. Legend: B batch, C channels, H and W pixels, D condition.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.nn.unet import HEAD_DIM, check_levels, groups
from worldmodels.types import UserError


class UNet2D(nn.Module):
    """UNet2DModel, input and output convolutions included: (B, C, H, W), (B, D) -> (B, C', H, W).

    The condition enters as its class embedding, as it is; the noise level is in the condition, and its own time step
    is 0. Blocks and output start at zero, as ours do. Sizes that the levels do not divide are padded and cut again.

    Args:
        channels_in: C.
        channels_out: C'.
        channels: channels of each level.
        depths: residual blocks of each level, the same in all.
        cond_channels: D.
        attention: whether each level attends.

    Raises:
        UserError: levels of different depth, or lists that differ in length.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        channels: list[int],
        depths: list[int],
        cond_channels: int,
        attention: list[bool],
    ) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        check_levels(channels, depths, attention)
        if len(set(depths)) != 1:
            raise UserError(f"network.backbone=unet2d takes levels of one depth, not network.depths={depths}.")
        self.net: Any = UNet2DModel(
            in_channels=channels_in,
            out_channels=channels_out,
            block_out_channels=tuple(channels),
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            layers_per_block=depths[0],
            norm_num_groups=groups(channels[0]),
            attn_norm_num_groups=groups(channels[-1]),
            attention_head_dim=HEAD_DIM,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
            time_embedding_dim=cond_channels,
        )
        for name, weight in self.named_parameters():
            if name.endswith(("conv2.weight", "conv_out.weight", "to_out.0.weight", "to_out.0.bias")):
                nn.init.zeros_(weight)
        self.multiple = 2 ** (len(channels) - 1)

    def stages(self) -> list[list[nn.Module]]:
        """Its parts from input to output, the two convolutions at its ends included."""
        net = self.net
        first, last = [net.conv_in, net.time_embedding], [net.conv_norm_out, net.conv_out]
        return [first, *([block] for block in (*net.down_blocks, net.mid_block, *net.up_blocks)), last]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = F.pad(x, (0, -w % self.multiple, 0, -h % self.multiple))
        time = torch.zeros(len(x), device=x.device)
        return self.net(x, time, class_labels=cond, return_dict=False)[0][..., :h, :w]

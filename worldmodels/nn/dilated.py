"""A residual network of one resolution, whose dilated convolutions see as far as a U-Net's lower levels do.

A U-Net halves the size, and where a ball of one pixel bounces is then learned anew for each place within a cell of the
coarse grid. Here all places share what is learned. Source of the dilation: Yu & Koltun 2016, "Multi-Scale Context
Aggregation by Dilated Convolutions". Legend: B batch, C channels, H and W pixels, D condition.
"""

from torch import Tensor, nn

from worldmodels.nn.unet import ResBlock


class DilatedNet(nn.Module):
    """Residual blocks one after the other: (B, C, H, W), (B, D) -> (B, C, H, W).

    Args:
        channels: C.
        cond_channels: width D of the condition.
        dilations: of the first convolution of each block, in pixels.
    """

    def __init__(self, channels: int, cond_channels: int, dilations: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels, channels, cond_channels, dilation=d) for d in dilations)

    def stages(self) -> list[list[nn.Module]]:
        """Its parts from input to output."""
        return [[block] for block in self.blocks]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, cond)
        return x

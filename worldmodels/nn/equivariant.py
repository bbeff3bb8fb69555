"""Layers that commute with the symmetries of a picture: group convolutions in the regular representation.

Features are fields (B, F, G) or (B, F, G, H, W), moved by `ops.groups.transform_fields`. On them torch's own pointwise
functions, `nn.GroupNorm(groups, F)` and `nn.BatchNorm3d(F)` are equivariant as they are: the norms' statistics and
factors are of whole fields. What has a weight for each place is not, such as `nn.LayerNorm`.
With the group `none` (G = 1) each layer is the plain one of torch, which it then equals in cost, too.

Source: Cohen and Welling 2016, sections 6 and 7. For equal channels F x G the arithmetic is that of a plain convolution
and the parameters are G times fewer.

Legend: B batch, C channels, F fields (I in, O out), G elements of the group, H and W pixels, k kernel.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.ops.groups import Group, check_square, transform_fields
from worldmodels.types import UserError


class _Expand(torch.autograd.Function):
    """A weight (O, I, S) moved by each element, (O, G, I, S): one rearrangement of S for each.

    So that its gradient is a rearrangement, too, and not a scattered sum.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.inverse, ctx.dtype = inverse, weight.dtype
        return _rearranged(weight.to(dtype)[:, None], index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _rearranged(gradients[0].to(ctx.dtype), ctx.inverse).sum(1), None, None, None


def _rearranged(weight: Tensor, index: Tensor) -> Tensor:
    """(O, 1 or G, I, S) by an index (G, S) to (O, G, I, S)."""
    shape = (weight.shape[0], len(index), *weight.shape[2:])
    return weight.expand(shape).gather(3, index[:, None].expand(shape))


class Expanded(nn.Module):
    """A layer that has one weight and works with all that the group makes of it.

    Args:
        shape: of the weight, (O, I, ...).
        index: (G, S) int64, S being the product of the last sizes: what each element makes of places 0 to S - 1.
        fan_in: inputs that are summed, for torch's usual initial scale.
    """

    index: Tensor
    inverse: Tensor

    def __init__(self, shape: tuple[int, ...], index: Tensor, fan_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.uniform_(self.weight, -(fan_in**-0.5), fan_in**-0.5)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("inverse", index.argsort(1), persistent=False)
        self.kept: dict[Any, Tensor] | None = None

    def expanded(self) -> Tensor:
        """The weight (O, G, I, S), in the precision that a product under autocast wants."""
        weight, device = self.weight, self.weight.device.type
        if len(self.index) == 1:
            return weight.flatten(2)[:, None]
        cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if cast else weight.dtype
        if self.kept is None or torch.compiler.is_compiling():  # a compiler shares what a graph computes twice
            return _Expand.apply(weight.flatten(2), self.index, self.inverse, dtype)
        key = dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if key not in self.kept:
            self.kept[key] = _Expand.apply(weight.flatten(2), self.index, self.inverse, dtype)
        return self.kept[key]


@contextmanager
def expand_once(network: nn.Module) -> Iterator[None]:
    """Let each layer of a network expand its weight once for all its calls in the block, such as an unroll or a search.

    Weights must not change in the block: it is opened anew for each step of training. Outside of any block every call
    expands, as only the caller knows when weights change: torch counts no change by fused optimizers or `.data`.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, Expanded) and layer.kept is None]
    for layer in layers:
        layer.kept = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None


class GroupLinear(Expanded):
    """The most general linear layer from fields to fields.

    Args:
        group: whose fields they are.
        inputs: I.
        outputs: O.
        bias: one number a field.
    """

    def __init__(self, group: Group, inputs: int, outputs: int, bias: bool = True) -> None:
        size = len(group)
        super().__init__((outputs, inputs, size), _moves(group, size, 1), inputs * size)
        self.bias = _bias(outputs, inputs * size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, G) to (B, O, G)."""
        weight, size = self.expanded(), len(self.index)
        bias = None if self.bias is None else self.bias.repeat_interleave(size)
        return F.linear(x.flatten(1), weight.flatten(2).flatten(0, 1), bias).unflatten(1, (-1, size))


class _Convolution(Expanded):
    """A convolution to fields.

    Args:
        group: of the fields.
        inputs: I.
        outputs: O.
        kernel: k.
        stride: pixels between windows.
        padding: with zeros.
        bias: one number a field.
    """

    pictures: bool
    """Whether it is from pictures, and not from fields."""

    def __init__(
        self,
        group: Group,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 1,
        bias: bool = True,
    ) -> None:
        slots = 1 if self.pictures else len(group)
        fan_in = inputs * slots * kernel**2
        super().__init__((outputs, inputs, slots, kernel, kernel), _moves(group, slots, kernel), fan_in)
        self.bias = _bias(outputs, fan_in) if bias else None
        self.group, self.kernel, self.stride, self.padding = group, kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) of pictures, or (B, I, G, H, W) of fields, to (B, O, G, H', W').

        Raises:
            UserError: the pictures' size breaks the symmetry (`check_grid`).
        """
        check_grid(self.group, (x.shape[-2], x.shape[-1]), self.kernel, self.stride, self.padding)
        size = len(self.group)
        weight = self.expanded().flatten(0, 1).reshape(-1, x.shape[1:-2].numel(), self.kernel, self.kernel)
        bias = None if self.bias is None else self.bias.repeat_interleave(size)
        pictures = x if self.pictures else x.flatten(1, 2)
        return F.conv2d(pictures, weight, bias, self.stride, self.padding).unflatten(1, (-1, size))


class LiftConv2d(_Convolution):
    """From pictures, whose channels no symmetry touches, to fields.

    To fold squares of p pixels into channels would break the symmetry: take stride p and a kernel of p, or of 3p with
    padding p, in its place.
    """

    pictures = True


class GroupConv2d(_Convolution):
    """From fields to fields; a kernel of 1 mixes the entries of each place."""

    pictures = False


class GroupPool2d(nn.Module):
    """Greatest value or mean of windows, of fields or of a picture.

    Args:
        group: whose symmetry is kept.
        reduce: "max" or "mean".
        kernel: of the windows.
        stride: pixels between windows; None: the kernel.
        padding: beside the borders: nothing for the greatest value, zeros that count for the mean.

    Raises:
        UserError: an unknown `reduce`.
    """

    def __init__(
        self, group: Group, reduce: Literal["max", "mean"], kernel: int = 2, stride: int | None = None, padding: int = 0
    ) -> None:
        super().__init__()
        if reduce not in ("max", "mean"):
            raise UserError(f"a pooling's reduce={reduce} is unknown; choose max or mean")
        self.group, self.pool = group, F.max_pool2d if reduce == "max" else F.avg_pool2d
        self.kernel, self.stride, self.padding = kernel, stride or kernel, padding

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., H, W) to (B, ..., H', W').

        Raises:
            UserError: the pictures' size breaks the symmetry (`check_grid`).
        """
        check_grid(self.group, (x.shape[-2], x.shape[-1]), self.kernel, self.stride, self.padding)
        return self.pool(x.flatten(1, -3), self.kernel, self.stride, self.padding).unflatten(1, x.shape[1:-2])


class GroupResidual(nn.Module):
    """Twice layer norm, ReLU and 3x3 group convolution, with a skip around them.

    Args:
        group: of the fields.
        inputs: I.
        outputs: O; where it differs from I the skip is a convolution of each place.
    """

    def __init__(self, group: Group, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.GroupNorm(1, inputs), nn.ReLU(), GroupConv2d(group, inputs, outputs)),
            *(nn.GroupNorm(1, outputs), nn.ReLU(), GroupConv2d(group, outputs, outputs)),
        )
        self.skip = nn.Identity() if inputs == outputs else GroupConv2d(group, inputs, outputs, 1, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, G, H, W) to (B, O, G, H, W)."""
        return self.skip(x) + self.layers(x)


def check_grid(group: Group, size: tuple[int, int], kernel: int, stride: int, padding: int) -> None:
    """Refuse sizes (H, W) on which windows break the symmetry: they must reach as far to one border as to the other.

    A kernel of 3 with stride 2 and padding 1 therefore needs odd sizes, and a kernel of 4 even ones.

    Raises:
        UserError: with the sizes and the kernels beside that work.
    """
    check_square(group, *size)
    for name, pixels, reverses in zip(("height", "width"), size, group.reverses, strict=True):
        if reverses and (left := (pixels + 2 * padding - kernel) % stride):
            kernels = [k for k in range(max(1, kernel - stride), kernel + stride) if (k - kernel - left) % stride == 0]
            raise UserError(
                f"a {name} of {pixels} breaks symmetry={group.name} under a kernel of {kernel} with stride {stride} "
                f"and padding {padding}, as the last window ends {left} before the border: use a {name} of "
                f"{pixels - left} or {pixels - left + stride}, or a kernel of {' or '.join(map(str, kernels))}"
            )


def matched_width(build: Callable[[int], nn.Module], parameters: int) -> int:
    """The width (such as a number of fields) with which a network comes closest to so many parameters.

    Args:
        build: makes the network of a width, with more parameters the wider it is; it is called without memory for them.
        parameters: wished for, such as those of the plain network.
    """

    def count(width: int) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build(width).parameters())

    below = bisect_right(range(1, 1 << 16), parameters, key=count)
    return min(max(below, 1), below + 1, key=lambda width: abs(count(width) - parameters))


def _moves(group: Group, slots: int, kernel: int) -> Tensor:
    """(G, slots * k * k): where each element takes the places of a kernel from `slots` pictures (1 or G) to one."""
    places = torch.arange(slots * kernel**2, device="cpu").view(1, 1, slots, kernel, kernel)
    if slots == 1:
        places = places.expand(1, 1, len(group), kernel, kernel)
    moved = [transform_fields(places, group, g)[:, :, :slots] for g in range(len(group))]
    return torch.stack([places.flatten() for places in moved])


def _bias(fields: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(fields).uniform_(-(fan_in**-0.5), fan_in**-0.5))

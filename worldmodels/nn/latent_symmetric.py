"""The networks of nn/latent.py with the symmetries of a picture built in; a latent image is then fields of a group.

Fields (N, F, G, h, w) are handed on as channels (N, F * G, h, w), so that any part can be exchanged for a plain one.
Representations are told their fields. A readout that is told N channels has N / sqrt(G) fields, and so about as many
parameters as the plain one has.

Source: Deac et al. 2023 (Equivariant MuZero).

Legend: N rows, C channels of the input, F fields, G elements of the group, A actions, h and w places of the latent.
"""

import torch
from torch import Tensor, nn

from worldmodels.nn.equivariant import GroupConv2d, GroupLinear, GroupPool2d, GroupResidual, LiftConv2d, check_grid
from worldmodels.nn.equivariant_heads import ActionEmbedding, ActionHead, flatten_fields, invariant
from worldmodels.nn.latent import Representation, Shape
from worldmodels.nn.symmetrise import Symmetrised
from worldmodels.ops.groups import Group
from worldmodels.types import UserError


def fields_of(group: Group, channels: int) -> int:
    """Fields with which a layer has about as many parameters as a plain one of so many channels."""
    return max(1, round(channels / len(group) ** 0.5))


class SymmetricRepresentation(nn.Module):
    """A stack of frames as fields, by group convolutions.

    Args:
        group: of the fields.
        inputs: C.
        image_size: H = W.
        layers: as in `nn.latent.Representation`, the first of them a convolution; their numbers are of fields.
        patch: side of the squares of pixels between two windows of the first convolution.

    Raises:
        UserError: an unknown layer, or a size on which a layer would break the symmetry.
    """

    def __init__(self, group: Group, inputs: int, image_size: int, layers: list[str], patch: int = 1) -> None:
        super().__init__()
        if image_size % patch:
            raise UserError(f"model.representation.patch={patch} does not divide the image size {image_size}")
        made: list[nn.Module] = []
        fields, side = 0, image_size
        for layer in layers:
            match layer.split():
                case ["conv", width] if width.isdigit() and not made:
                    outputs = int(width)
                    # what a plain convolution of 3 sees of folded patches
                    made += [LiftConv2d(group, inputs, outputs, 3 * patch, patch, patch), nn.ReLU()]
                    fields, side = outputs, side // patch
                case ["conv" | "down" as kind, width] if width.isdigit() and made:
                    stride = 1 + (kind == "down")
                    kernel = 3 if stride == 1 or side % 2 else 4  # windows that reach as far to either border
                    check_grid(group, (side, side), kernel, stride, 1)
                    outputs = int(width)
                    made += [GroupConv2d(group, fields, outputs, kernel, stride, 1), nn.ReLU()]
                    fields, side = outputs, (side + 2 - kernel) // stride + 1
                case ["block"] if made:
                    made.append(GroupResidual(group, fields, fields))
                case ["pool"] if made:
                    check_grid(group, (side, side), 2, 2, 0)
                    made.append(GroupPool2d(group, "mean"))
                    side //= 2
                case _:
                    raise UserError(
                        f"model.representation.layers has {layer!r}, which with symmetry={group.name} is not allowed "
                        "there: 'conv N' comes first, then 'conv N', 'down N', 'block' and 'pool'"
                    )
        self.layers = nn.Sequential(*made)
        self.shape = Shape(fields * len(group), side)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float to (N, F * G, h, w)."""
        return self.layers(x).flatten(1, 2)


class SymmetrisedRepresentation(nn.Module):
    """The same by one plain network on all that the group makes of the frames: the paper's own way.

    Args:
        group: of the fields.
        inputs: C.
        image_size: H = W.
        settings: further ones of the plain `Representation`, whose channels are fields here.
    """

    def __init__(self, group: Group, inputs: int, image_size: int, **settings: object) -> None:
        super().__init__()
        plain = Representation(inputs, image_size, **settings)  # pyrefly: ignore
        self.network = Symmetrised(group, plain)
        self.shape = Shape(plain.shape.channels * len(group), plain.shape.side)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float to (N, F * G, h, w)."""
        return self.network(x).flatten(1, 2)


class SymmetricDynamics(nn.Module):
    """What an action makes of fields; see `nn.latent.Dynamics`.

    Args:
        group: of the fields.
        table: (G, A) of `ops.groups.action_table`.
        shape: of the latent image.
        blocks: residual blocks, or without a skip pairs of norm, ReLU and convolution.
        skip: add what the action changes to the latent image.
    """

    def __init__(self, group: Group, table: Tensor, shape: Shape, blocks: int = 1, skip: bool = True) -> None:
        super().__init__()
        self.fields, self.skip = shape.channels // len(group), skip
        width = self.fields
        self.action, self.conv = ActionEmbedding(table, width), GroupConv2d(group, width, width)
        layers: list[nn.Module] = []
        for _ in range(blocks if skip else 2 * blocks):
            step = [nn.GroupNorm(1, width), nn.ReLU(), GroupConv2d(group, width, width)]
            layers += [GroupResidual(group, width, width)] if skip else step
        self.blocks = nn.Sequential(*layers)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        """The latent image (N, F * G, h, w) after `action` (N,) int64."""
        x = latent.unflatten(1, (self.fields, -1))
        moved = self.conv(x) + self.action(action)[..., None, None]
        return self.blocks(x + moved if self.skip else moved).flatten(1, 2)


class SymmetricReadout(nn.Module):
    """Features of a whole latent image; see `nn.latent.Readout`.

    Args:
        group: of the fields.
        shape: of the latent image.
        channels: that each place is told in.
        width: of the features of the plain readout.
        still: whether no symmetry changes the features; otherwise they are fields.
    """

    def __init__(self, group: Group, shape: Shape, channels: int = 16, width: int = 64, still: bool = True) -> None:
        super().__init__()
        self.group, self.fields, self.still = group, shape.channels // len(group), still
        told, self.width = fields_of(group, channels), fields_of(group, width)
        self.norm = nn.Sequential(nn.GroupNorm(1, self.fields), nn.ReLU())
        self.places = GroupConv2d(group, self.fields, told, 1, padding=0)
        self.output = GroupLinear(group, told * shape.side**2 + self.fields, self.width)
        self.scale = nn.Sequential(nn.GroupNorm(1, self.width), nn.ReLU())

    def forward(self, latent: Tensor) -> Tensor:
        """(N, F * G, h, w) to (N, width), or (N, width, G) where symmetries move it."""
        x = self.norm(latent.unflatten(1, (self.fields, -1)))
        places = flatten_fields(self.places(x), self.group).relu()
        features = self.scale(self.output(torch.cat([places, x.amax((3, 4))], 1)))
        return invariant(features) if self.still else features


class SymmetricPolicy(nn.Module):
    """Logits of actions, which the group moves as it moves actions.

    Args:
        group: of the fields.
        table: (G, A) of `ops.groups.action_table`.
        shape: of the latent image.
        settings: further ones of `SymmetricReadout`.
    """

    def __init__(self, group: Group, table: Tensor, shape: Shape, **settings: int) -> None:
        super().__init__()
        self.read = SymmetricReadout(group, shape, still=False, **settings)
        self.output = ActionHead(table, self.read.width)

    def forward(self, latent: Tensor) -> Tensor:
        """(N, F * G, h, w) to (N, A)."""
        return self.output(self.read(latent))


class SymmetricBlend(nn.Module):
    """Joins what was expected with what is seen; see `nn.latent.Blend`.

    Args:
        group: of the fields.
        shape: of the latent image.
    """

    def __init__(self, group: Group, shape: Shape) -> None:
        super().__init__()
        self.fields = shape.channels // len(group)
        self.gate = GroupConv2d(group, 2 * self.fields, self.fields, 1, padding=0)

    def forward(self, expected: Tensor, seen: Tensor) -> Tensor:
        """Two latent images (N, F * G, h, w) as one."""
        both = torch.cat([x.unflatten(1, (self.fields, -1)) for x in (expected, seen)], 1)
        return torch.lerp(seen, expected, self.gate(both).flatten(1, 2).sigmoid())

"""Symmetrisation: one ordinary network on all that a group makes of its input gives fields of the group.

The other way to equivariance beside the layers of nn/equivariant.py, with the same fields in and out: it takes any
network as it is and runs it G times. What chooses at random for each row, as dropout does, breaks the symmetry.

Source: Deac et al. 2023 (Equivariant MuZero), figure 1: encoder E(X) = (h(X), h(RX), ...) and transition
T(z) = (tau(z1, z2, ...), tau(z2, z3, ...), ...). Entries here are counted by the inverse, as ops/groups.py says.

Legend: B batch, C channels, F fields (I in, O out), G elements of the group, H and W pixels.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from worldmodels.ops.groups import Group, check_square, transform
from worldmodels.types import UserError


class Symmetrised(nn.Module):
    """Entry u of the output is what the network makes of the input as u sees it: u h(u^-1 x).

    Args:
        group: of the fields.
        network: takes (N, C, H, W) or (N, C) and gives (N, O, H', W') or (N, O), row by row.
        sees: "own": each entry sees its own of the input's entries, C = I; "all": each sees all, its own first, and
            C = I * G. A picture is the same for each.

    Raises:
        UserError: an unknown `sees`.
    """

    def __init__(self, group: Group, network: nn.Module, sees: Literal["own", "all"] = "own") -> None:
        super().__init__()
        if sees not in ("own", "all"):
            raise UserError(f"sees={sees} is unknown; choose own or all")
        self.group, self.network, self.sees = group, network, sees

    def forward(self, x: Tensor) -> Tensor:
        """A picture (B, C, H, W), or fields (B, I, G) or (B, I, G, H, W), to fields (B, O, G) or (B, O, G, H', W').

        Raises:
            UserError: pictures, of the input or the output, that are not square under a group that turns them.
        """
        if x.ndim > 3:
            check_square(self.group, x.shape[-2], x.shape[-1])
        elements = self.group.elements
        seen = [self._seen(x, u) for u in range(len(elements))]
        given = self.network(torch.cat(seen)).unflatten(0, (len(elements), len(x)))
        if given.ndim == 3:
            return given.permute(1, 2, 0)
        check_square(self.group, given.shape[-2], given.shape[-1])
        return torch.stack([transform(given[u], element) for u, element in enumerate(elements)], 2)

    def _seen(self, x: Tensor, u: int) -> Tensor:
        if x.ndim != 4:
            x = x[:, :, u] if self.sees == "own" else x[:, :, list(self.group.product[u])].flatten(1, 2)
        return x if x.ndim == 2 else transform(x, self.group.elements[self.group.inverse[u]])


def orbit(pictures: Tensor, symmetry: Group) -> Tensor:
    """All that the group makes of pictures (B, ..., H, W), one element after the other: (G * B, ..., H, W)."""
    return torch.cat([transform(pictures, element) for element in symmetry.elements])


def orbit_mean(outputs: Tensor, symmetry: Group) -> Tensor:
    """What a network makes of an `orbit`, (G * B, ..., H, W), moved back and averaged: (B, ..., H, W).

    The mean of g^-1 f(g x) over the group (the Reynolds operator) is equivariant whatever f is, with no fields in
    between and no parameters of its own.
    """
    back = (symmetry.elements[i] for i in symmetry.inverse)
    parts = outputs.chunk(len(symmetry))
    return torch.stack([transform(part, element) for part, element in zip(parts, back, strict=True)]).mean(0)

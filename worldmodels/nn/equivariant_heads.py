"""How an action enters a network over fields of a group, and how numbers and logits of actions leave it.

Actions are places in a model's own set; a `table` (G, A) of `ops.groups.action_table` says what the group makes of
them.

Source: Deac et al. 2023 (Equivariant MuZero), whose policy averages what each entry says of the action as that entry
sees it, and whose values do not change.

Legend: B batch, F fields, G elements of the group, A actions, H and W pixels.
"""

import torch
from torch import Tensor, nn

from worldmodels.nn.equivariant import Expanded
from worldmodels.ops.groups import Group, check_square, transform


def embed_action(action: Tensor, table: Tensor) -> Tensor:
    """Actions (B,) int64 as fields (B, A, G) float32: entry u is the one-hot code of u^-1 a."""
    return (action[:, None, None] == table.T).float()


class ActionEmbedding(nn.Module):
    """An action as fields that are learned: entry u is the embedding of u^-1 a.

    Added to a latent image it says as much as planes of `embed_action` joined to the image (but for what a convolution
    of planes does at the borders), and costs no convolution.

    Args:
        table: of the actions.
        fields: F.
    """

    seen: Tensor

    def __init__(self, table: Tensor, fields: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(table.shape[1], fields)
        self.register_buffer("seen", table.argsort(1), persistent=False)

    def forward(self, action: Tensor) -> Tensor:
        """(B,) int64 to (B, F, G)."""
        return self.embedding(self.seen[:, action]).permute(1, 2, 0)


class ActionHead(Expanded):
    """The most general linear layer from fields to one number an action, which the group moves as it moves actions.

    Args:
        table: of the actions.
        inputs: F.
        bias: one number for all actions that the group takes to one another.
    """

    orbit: Tensor

    def __init__(self, table: Tensor, inputs: int, bias: bool = True) -> None:
        size, actions = table.shape
        super().__init__((1, inputs, actions), table.argsort(1), inputs * size)
        orbits = table.amin(0).unique(return_inverse=True)
        self.register_buffer("orbit", orbits[1], persistent=False)
        self.bias = nn.Parameter(torch.zeros(len(orbits[0]))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, G) to (B, A)."""
        logits = x.transpose(1, 2).flatten(1) @ self.expanded().flatten(0, 2)
        return logits if self.bias is None else logits + self.bias[self.orbit]


def invariant(x: Tensor) -> Tensor:
    """Fields (B, F, G) or (B, F, G, H, W) as features (B, F) that no symmetry changes: the means of fields."""
    return x.flatten(2).mean(2)


def flatten_fields(x: Tensor, group: Group) -> Tensor:
    """Fields of pictures (B, F, G, H, W) as fields (B, F * H * W, G), of which nothing is lost.

    Each entry's picture is turned back to how its element saw it, so that a place means the same to all entries.

    Raises:
        UserError: pictures that are not square under a group that turns them.
    """
    check_square(group, x.shape[-2], x.shape[-1])
    pictures = [transform(x[:, :, u], group.elements[group.inverse[u]]) for u in range(len(group))]
    return torch.stack(pictures, -1).flatten(1, 3)

"""MuZero's networks, each plain or with a symmetry built in."""

from collections.abc import Set
from typing import Any, NamedTuple

from torch import Tensor

from worldmodels.nn.latent import Blend, Dynamics, PolicyHead, Readout, Representation
from worldmodels.nn.latent_symmetric import (
    SymmetricBlend,
    SymmetricDynamics,
    SymmetricPolicy,
    SymmetricReadout,
    SymmetricRepresentation,
    SymmetrisedRepresentation,
)
from worldmodels.ops.groups import Group
from worldmodels.types import UserError

PARTS = ("representation", "dynamics", "reward", "value", "policy")
ROUTES = {"layers": SymmetricRepresentation, "symmetrised": SymmetrisedRepresentation}


class Networks(NamedTuple):
    """What frames and latent images go through; `blend` is None where frames are stacked."""

    representation: Any
    dynamics: Any
    blend: Any
    read_value: Any
    read_reward: Any
    policy: Any


def networks(
    group: Group,
    table: Tensor,
    parts: Set[str],
    route: str,
    seen: int,
    image_size: int,
    representation: dict[str, Any],
    dynamics: dict[str, Any],
    readout: dict[str, Any],
    recurrent: bool,
) -> Networks:
    """The networks, of which `parts` have the symmetries of a group.

    Args:
        group: of the symmetries.
        table: (G, A) of `ops.groups.action_table`, G elements of the group and A actions of the model.
        parts: some of `PARTS`.
        route: how the representation has them.
        seen: channels of what the representation sees at once.
        image_size: of what it sees, height and width.
        representation: further settings of `nn.latent.Representation`.
        dynamics: of `nn.latent.Dynamics`.
        readout: of `nn.latent.Readout`.
        recurrent: whether what is seen is joined to what was expected.

    Raises:
        UserError: an unknown part or route, or a latent image whose channels are no fields of the group.
    """
    if unknown := parts - set(PARTS):
        raise UserError(f"model.symmetric names {min(unknown)}; its parts are {', '.join(PARTS)}")
    if route not in ROUTES:
        raise UserError(f"model.route={route} is unknown; choose one of {', '.join(ROUTES)}")
    if "representation" in parts:
        seeing: Any = ROUTES[route](group, seen, image_size, **representation)
    else:
        seeing = Representation(seen, image_size, **representation)
    shape, actions = seeing.shape, table.shape[1]
    if parts and shape.channels % len(group):
        raise UserError(
            f"{shape.channels} channels of the latent image are no fields of symmetry={group.name}: {len(group)}"
        )
    still = {"representation", "dynamics"} <= parts

    def reading(part: str) -> Any:
        return SymmetricReadout(group, shape, **readout) if part in parts else Readout(shape, **readout)

    return Networks(
        representation=seeing,
        dynamics=SymmetricDynamics(group, table, shape, **dynamics)
        if "dynamics" in parts
        else Dynamics(shape, actions, **dynamics),
        blend=(SymmetricBlend(group, shape) if still else Blend(shape)) if recurrent else None,
        read_value=reading("value"),
        read_reward=reading("reward"),
        policy=SymmetricPolicy(group, table, shape, **readout)
        if "policy" in parts
        else PolicyHead(shape, actions, **readout),
    )

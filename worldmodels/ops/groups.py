"""Symmetries of a picture as finite groups: what they do to pixels, to fields of the group, and to ALE's actions.

An element is a number of quarter turns counter-clockwise (row 0 is on top), after which the picture is flipped
left-right or not. A field has one entry for each element, in the order of `Group.elements`, and is moved as the left
regular representation: (g F)_u = F_{g^-1 u}, where F_u is a picture that is itself moved, too. A network that is
equivariant in this sense makes a whole search equivariant (Deac et al. 2023, Equivariant MuZero; Cohen and Welling
2016 for the convolutions).

Legend: B batch, C channels, F fields, G elements of the group, A actions, H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from worldmodels.types import ACTIONS, Segment, UserError


class Element(NamedTuple):
    """`turns` quarter turns counter-clockwise, then a left-right flip where `flipped`."""

    turns: int
    flipped: bool

    def after(self, first: "Element") -> "Element":
        """The element that does `first` and then this one."""
        turns = self.turns if not first.flipped else -self.turns  # a turn before a flip is the turn back after it
        return Element((first.turns + turns) % 4, self.flipped != first.flipped)


@dataclass(frozen=True)
class Group:
    """Some symmetries that are closed under doing one after another; the first one changes nothing.

    Args:
        name: as settings call it.
        elements: in the order in which tables and fields count them.
        product: product[a][b] is the index of b followed by a.
        inverse: the index of what undoes each element.
        swaps: whether height and width change places, so that pictures must be square.
        reverses: whether rows, and whether columns, come to lie in reverse order under some element.
    """

    name: str
    elements: tuple[Element, ...]
    product: tuple[tuple[int, ...], ...]
    inverse: tuple[int, ...]
    swaps: bool
    reverses: tuple[bool, bool]

    def __len__(self) -> int:
        return len(self.elements)


def _group(name: str, *elements: Element) -> Group:
    product = tuple(tuple(elements.index(a.after(b)) for b in elements) for a in elements)
    straight = [element for element in elements if element.turns % 2 == 0]
    return Group(
        name,
        elements,
        product,
        inverse=tuple(row.index(0) for row in product),
        swaps=len(straight) < len(elements),
        reverses=(any(e.turns == 2 for e in straight), any((e.turns == 2) != e.flipped for e in straight)),
    )


_TURNS = tuple(Element(k, False) for k in range(4))
GROUPS = {
    group.name: group
    for group in (
        _group("none", _TURNS[0]),
        _group("flip_lr", _TURNS[0], Element(0, True)),
        _group("flip_ud", _TURNS[0], Element(2, True)),
        _group("c4", *_TURNS),
        _group("d4", *_TURNS, *(Element(k, True) for k in range(4))),
    )
}
"""By the names that settings use."""


def group(name: str, setting: str = "symmetry") -> Group:
    """The group of a setting such as `symmetry=c4`, which a mistake is told of by its name.

    Raises:
        UserError: there is no such group.
    """
    if name not in GROUPS:
        raise UserError(f"{setting}={name} is unknown; choose one of {', '.join(GROUPS)}")
    return GROUPS[name]


def check_square(symmetry: Group, height: int, width: int) -> None:
    """Refuse pictures that a quarter turn would give another shape.

    Raises:
        UserError: the group has quarter turns and the picture is not square.
    """
    if symmetry.swaps and height != width:
        side = max(height, width)
        raise UserError(
            f"symmetry={symmetry.name} turns pictures by 90 degrees, which a picture of {height}x{width} does not "
            f"survive: pad it to {side}x{side}, or use symmetry=flip_lr or flip_ud"
        )


def transform(picture: Tensor, element: Element) -> Tensor:
    """The picture (..., H, W) of any type, moved by an element; exact, and not contiguous."""
    turned = picture.rot90(element.turns, (-2, -1)) if element.turns else picture
    return turned.flip(-1) if element.flipped else turned


def transform_fields(fields: Tensor, symmetry: Group, g: int) -> Tensor:
    """Fields (B, F, G) or (B, F, G, H, W), moved by element number g: (g F)_u = F_{g^-1 u}, pictures moved as well."""
    moved = fields[:, :, list(symmetry.product[symmetry.inverse[g]])]
    return transform(moved, symmetry.elements[g]) if fields.ndim == 5 else moved


def _direction(name: str) -> tuple[int, int, bool]:
    """What an action of that name does: steps to the right, steps up, and whether it fires."""
    return ("RIGHT" in name) - ("LEFT" in name), ("UP" in name) - ("DOWN" in name), "FIRE" in name


_DIRECTIONS = [_direction(name) for name in ACTIONS]


def moved_action(action: int, element: Element) -> int:
    """What an action of the 18-action set is called in the moved picture: UP becomes LEFT by a quarter turn."""
    right, up, fire = _DIRECTIONS[action]
    for _ in range(element.turns):
        right, up = -up, right
    return _DIRECTIONS.index((-right if element.flipped else right, up, fire))


def is_closed(symmetry: Group, actions: Sequence[int]) -> bool:
    """Whether every element maps every action of the 18-action set that is given to another of them."""
    return closure(symmetry, actions) == sorted(set(actions))


def closure(symmetry: Group, actions: Sequence[int]) -> list[int]:
    """The least set that holds the actions and is closed, sorted."""
    return sorted({moved_action(action, element) for action in actions for element in symmetry.elements})


def nearest(symmetry: Group, actions: Sequence[int]) -> Group:
    """The group that works for the actions and shares most elements with the one that was wished for."""
    working = [other for other in GROUPS.values() if is_closed(other, actions)]
    return max(working, key=lambda other: (len(set(other.elements) & set(symmetry.elements)), len(other)))


def action_table(symmetry: Group, actions: Sequence[int] = range(len(ACTIONS)), setting: str = "symmetry") -> Tensor:
    """What each element makes of each action.

    Args:
        symmetry: the group.
        actions: indices into the 18-action set, which a model's own actions are places in.
        setting: that asks for the group, by the name that a mistake is told of.

    Returns:
        (G, A) int64: table[g, i] is the place in `actions` of what element g makes of the one in place i.

    Raises:
        UserError: the group takes an action to one that is not among them.
    """
    if added := sorted(set(closure(symmetry, actions)) - set(actions)):
        taken, to = next((a, b) for a in actions for e in symmetry.elements if (b := moved_action(a, e)) in added)
        raise UserError(
            f"{setting}={symmetry.name} takes the action {ACTIONS[taken]} to {ACTIONS[to]}, which is not among the "
            f"{len(actions)} actions {list(actions)}: use {setting}={nearest(symmetry, actions).name}, or add {added}"
        )
    places = {action: place for place, action in enumerate(actions)}
    table = [[places[moved_action(action, element)] for action in actions] for element in symmetry.elements]
    return torch.tensor(table, device="cpu")  # a table is read while a network is built, on whatever device


def move_windows(segment: Segment, symmetry: Group, g: Tensor) -> Segment:
    """Windows of play as they would be in the moved game: frames and actions together, each window by its own element.

    Side columns stay as they are.

    Args:
        segment: B windows with actions of the 18-action set.
        symmetry: the group.
        g: (B,) int64, which of its elements moves each window.

    Raises:
        UserError: pictures that are not square under a group that turns them.
    """
    check_square(symmetry, *segment.obs.shape[-2:])
    obs = segment.obs
    for k, element in list(enumerate(symmetry.elements))[1:]:
        obs = torch.where((g == k)[:, None, None, None, None], transform(segment.obs, element), obs)
    table = action_table(symmetry).to(g.device)
    return replace(segment, obs=obs, action=table[g[:, None], segment.action])

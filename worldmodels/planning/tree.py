"""What a search begins with and gives back, and the loop that grows a batch of trees by one node a simulation.

Shapes: B roots, A actions, n simulations, N = n + 1 nodes. Node 0 is the root, node s + 1 the one of simulation s.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from worldmodels.types import Recurrent, RecurrentOutput, State, UserError

OUTPUTS = RecurrentOutput._fields
GRAIN = 32768
"""Numbers in the states of all roots below which one thread is used: torch splits no elementwise work below it."""


class Root(NamedTuple):
    """Where the search starts: prior_logits (B, A), value (B,), state (whatever `recurrent` takes, batch first)."""

    prior_logits: Tensor
    value: Tensor
    state: State


class Tree(NamedTuple):
    """The grown trees, one column a node; a node that `max_depth` left unused has 0 visits and parent -1.

    What belongs to an edge is kept with the node that it leads to: the visits of a child are those of the edge, and
    Q(s, a) = reward + discount * value of the child.

    Args:
        parent: (B, N) int, -1 at the root.
        action: (B, N) int, taken in the parent.
        visits: (B, N) int, the expansion of the node itself included.
        value: (B, N) mean of the returns seen from here.
        raw_value: (B, N) as the model gave it.
        reward: (B, N) of the edge into the node.
        discount: (B, N) of the edge into the node, 0 where it ends the episode.
    """

    parent: Tensor
    action: Tensor
    visits: Tensor
    value: Tensor
    raw_value: Tensor
    reward: Tensor
    discount: Tensor

    def children(self, num_actions: int) -> Tensor:
        """(B, N, A) int64: the node that each action leads to, or -1."""
        batch, nodes = self.parent.shape
        table = torch.full((batch, nodes, num_actions), -1, dtype=torch.int64, device=self.parent.device)
        row, node = (self.parent >= 0).nonzero(as_tuple=True)
        table[row, self.parent[row, node].long(), self.action[row, node].long()] = node
        return table


class SearchResult(NamedTuple):
    """What a search gives back.

    Args:
        action: (B,) int64, index into the A actions of the search.
        action_weights: (B, A) target of the policy: Gumbel MuZero's improved policy, or pUCT's share of visits.
        value: (B,) of the root after the search.
        visits: (B, A) int64, of the root's actions.
        q: (B, A) of the root's actions; one without a visit has v_mix (Gumbel) or `value` (pUCT).
        tree: for tests and pictures.
    """

    action: Tensor
    action_weights: Tensor
    value: Tensor
    visits: Tensor
    q: Tensor
    tree: Tree


Search = TypeVar("Search", bound=Callable[..., SearchResult])


class Halving(NamedTuple):
    """Gumbel MuZero: sequential halving at the root, the improved policy inside (Danihelka et al. 2022).

    Args:
        bonus: (B, A) Gumbel noise plus logits, of which the largest legal logit is 0.
        considered: (B, n) int64, how often an action must have been visited to be considered in a simulation.
        visit_offset: c_visit.
        value_scale: c_scale.
        rescale: move completed Q to [0, 1] before it is scaled.
    """

    bonus: Tensor
    considered: Tensor
    visit_offset: float
    value_scale: float
    rescale: bool


class Puct(NamedTuple):
    """MuZero's pUCT (Schrittwieser et al. 2020, appendix B), Q normalised by the node's own value and children."""

    init: float
    base: float


class Plot(NamedTuple):
    """The ground that trees grow on, whatever grows them.

    Args:
        logits: (B, A) of the root, -inf where an action is illegal.
        value: (B,) of the root.
        illegal: (B, A) bool for every node below the root, or None.
        rule: of selection.
        simulations: n.
        max_depth: edges from the root to the deepest node.
        ties: (B, A) draws by which actions of equal scores are told apart, at every node; None: the first is taken.
    """

    logits: Tensor
    value: Tensor
    illegal: Tensor | None
    rule: Halving | Puct
    simulations: int
    max_depth: int
    ties: Tensor | None = None


class Backend(Protocol):
    """One batch of trees."""

    def select(self) -> tuple[Tensor, Tensor]:
        """(B,) int64 `parent * B + row` and (B,) int64 action: what to expand next. Valid until the next call."""
        ...

    def expand(self, output: RecurrentOutput) -> None:
        """Add what the model says of the selection, and move its value up to the root."""
        ...

    def finish(self) -> tuple[Tree, Tensor, Tensor]:
        """The tree, (B, A) visits and (B, A) Q of the root's actions (undefined without a visit)."""
        ...


@torch.no_grad()
def grow(recurrent: Recurrent, state: State, plot: Plot, backend: str) -> tuple[Tree, Tensor, Tensor]:
    """Run the simulations. The state that `recurrent` is given is overwritten by the next simulation.

    Raises:
        UserError: the model returns what is no number or of another shape, or a node without a legal action.
    """
    batch, n = len(plot.value), plot.simulations
    for k, v in state.items():
        if len(v) != batch:
            raise UserError(f"state '{k}' of the root has {len(v)} rows but its value has {batch}; give as many")
    trees = _backend(plot, backend)
    # [node, row, ...]: writing one simulation is one contiguous copy, reading is one gather.
    latents = {k: v.new_empty((n, *v.shape)) for k, v in state.items()}
    flat = {k: v.flatten(0, 1) for k, v in latents.items()}
    slots = {k: v.unbind() for k, v in latents.items()}
    gathered = {k: torch.empty_like(v, memory_format=torch.contiguous_format) for k, v in state.items()}
    for k, v in state.items():
        slots[k][0].copy_(v)
    for simulation in range(n):
        rows, action = trees.select()
        for k, v in flat.items():
            torch.index_select(v, 0, rows, out=gathered[k])
        output, new = recurrent(gathered, action)
        if not simulation:
            _check_model(plot, state, output, new)
        trees.expand(output)
        if simulation + 1 < n:
            for k, slot in slots.items():
                slot[simulation + 1].copy_(new[k])
    return trees.finish()


def _check_model(plot: Plot, state: State, output: RecurrentOutput, new: State) -> None:
    for name, tensor in zip(OUTPUTS, output, strict=True):
        wanted = plot.logits.shape if name == "prior_logits" else plot.value.shape
        if tensor.shape != wanted:
            raise UserError(f"the model gives {name} {tuple(tensor.shape)}; give {tuple(wanted)} for these roots")
    shapes = [{k: tuple(v.shape) for k, v in one.items()} for one in (state, new)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the model was given a state of {shapes[0]} and gives one of {shapes[1]}; give one alike")


def sparing(search: Search) -> Search:
    """Decorator: one thread for a model so small that a call takes less time than waiting for other threads may.

    A search makes hundreds of short calls one after the other, and each waits for all threads: on a machine with other
    work to do, a search of 20 ms was seen to take seconds.
    """

    @functools.wraps(search)
    def run(recurrent: Recurrent, root: Root, *args: Any, **settings: Any) -> SearchResult:
        small = sum(v.numel() for v in root.state.values()) < GRAIN
        if root.value.device.type != "cpu" or not small:
            return search(recurrent, root, *args, **settings)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return search(recurrent, root, *args, **settings)
        finally:
            torch.set_num_threads(threads)

    return cast(Search, run)


def _backend(plot: Plot, name: str) -> Backend:
    on_cpu = plot.value.device.type == "cpu"
    if name == "auto":
        name = "numba" if on_cpu else "torch"
    if name == "torch":
        from worldmodels.planning.torch_tree import TorchTree

        return TorchTree(plot)
    if name == "numba":
        if not on_cpu:
            raise UserError(f"backend=numba searches on the CPU but the root is on {plot.value.device}; use torch")
        from worldmodels.planning.numba_tree import NumbaTree

        return NumbaTree(plot)
    raise UserError(f"backend={name} is unknown; choose auto, numba or torch")


def check(
    root: Root, num_simulations: int, max_depth: int | None, ties: Tensor | None = None, **masks: Tensor | None
) -> None:
    """Refuse what cannot be searched.

    Raises:
        UserError: shapes do not agree, a number is out of range, or the root holds what is no number.
    """
    for name, number in (("num_simulations", num_simulations), ("max_depth", max_depth)):
        if number is not None and (type(number) is not int or number < 1):
            raise UserError(f"{name}={number} must be a whole number of at least 1")
    if root.prior_logits.ndim != 2 or root.value.shape != root.prior_logits.shape[:1] or not root.prior_logits.numel():
        raise UserError(
            f"the root has prior_logits {tuple(root.prior_logits.shape)} and value {tuple(root.value.shape)}; "
            "give (B, A) and (B,), neither of them empty"
        )
    if ties is not None and ties.shape != root.prior_logits.shape:
        raise UserError(
            f"ties has shape {tuple(ties.shape)}; give one draw an action: {tuple(root.prior_logits.shape)}"
        )
    for name, mask in masks.items():
        if mask is not None and (mask.shape != root.prior_logits.shape or mask.dtype != torch.bool):
            raise UserError(
                f"{name} is {tuple(mask.shape)} {mask.dtype}, but a mask of these roots is "
                f"{tuple(root.prior_logits.shape)} torch.bool"
            )
    for name, tensor in (("prior_logits", root.prior_logits), ("value", root.value)):
        if wrong(name, tensor).any():
            raise UserError(bad_number(name, int(wrong(name, tensor).nonzero()[0, 0]), None))


def check_finite(**settings: float) -> None:
    """Refuse settings of a search that are no finite numbers.

    Raises:
        UserError: one is not.
    """
    for name, number in settings.items():
        if not math.isfinite(number):
            raise UserError(f"{name}={number} must be a finite number")


def check_noise(noise: Tensor, logits: Tensor) -> None:
    """Refuse draws that are not one finite number for each of the `logits` (B, A).

    Raises:
        UserError: they are not.
    """
    if noise.shape != logits.shape:
        raise UserError(f"noise has shape {tuple(noise.shape)}; give one draw an action: {tuple(logits.shape)}")
    if not noise.isfinite().all():
        raise UserError("noise holds what is no finite number; give one draw an action")


def slack(dtype: torch.dtype) -> float:
    """What scores may differ by that are equal but for the rounding of a network with numbers of this type.

    A symmetry that a network has makes scores equal, and no more than that: its sums are in another order.
    """
    return torch.finfo(dtype).eps ** 0.75


def best_of(score: Tensor, ties: Tensor | None) -> Tensor:
    """(B,) int64, which of the scores (B, A) is the largest, and of equals the one with the largest of `ties` (B, A).

    Without draws it is the first of equals, which no symmetry of a picture respects: where turning it changes nothing,
    the actions that are turned to one another are equally good, and only chance treats them alike.
    """
    if ties is None:
        return score.argmax(-1)
    largest = score.amax(-1, keepdim=True)
    return ties.masked_fill(score < largest - slack(score.dtype), -torch.inf).argmax(-1)


def wrong(name: str, tensor: Tensor) -> Tensor:
    """(B,) bool: the row holds what is no number; -inf is allowed among logits, where it forbids an action."""
    if name == "prior_logits":
        return (tensor.isnan() | tensor.isposinf()).any(-1)
    return ~tensor.isfinite()


def bad_number(name: str, row: int, simulation: int | None) -> str:
    """The sentence for a tensor of the model that holds NaN or infinity."""
    where = "at the root" if simulation is None else f"in simulation {simulation}"
    return (
        f"the model's {name} is no finite number in row {row} of the batch {where} of the search; "
        "look for NaN in its weights and its input, and train with a lower learning rate"
    )


def nowhere_to_go(row: int, simulation: int | None) -> str:
    """The sentence for a node without a legal action."""
    where = "at the root" if simulation is None else f"at the node of simulation {simulation}"
    return (
        f"no action is legal in row {row} of the batch {where}; "
        "allow at least one by the mask and by the model's prior_logits"
    )


def legal_logits(logits: Tensor, invalid: Tensor | None) -> Tensor:
    """Logits in float32 or float64 with -inf for illegal actions.

    Raises:
        UserError: a root has no legal action.
    """
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if invalid is not None:
        logits = logits.masked_fill(invalid, -torch.inf)
    if (none := logits.isneginf().all(-1)).any():
        raise UserError(nowhere_to_go(int(none.nonzero()[0, 0]), None))
    return logits

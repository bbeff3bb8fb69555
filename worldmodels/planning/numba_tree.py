"""Trees on the CPU: one compiled call a simulation, which expands, backs up and selects, root after root.

A tree is a linked list of records, one a node, that fits a core's first cache; an edge's data are kept in the record
of the node it leads to. Unvisited actions are never walked over: within one node they share their completed Q, so the
best of them is the one of the largest prior, found once when a child is added. All sums are in float64.

One thread, and no OpenMP: pools that spin while torch's pool works were seen to make a search ten times slower.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from worldmodels.planning.tree import OUTPUTS, Halving, Plot, Tree, bad_number, nowhere_to_go
from worldmodels.types import RecurrentOutput, UserError

EPSILON = 1e-8
"""The least range that Q is divided by."""
TINY = float(np.finfo(np.float64).tiny)
NODE = np.dtype(
    [
        *((name, np.float64) for name in ("value", "raw_value", "reward", "discount")),
        ("prior", np.float64),  # probability of the edge into the node
        ("weight", np.float64),  # scratch of a selection in the parent
        ("unvisited", np.float64),  # sum of the priors of legal actions without a node
        *((name, np.int32) for name in ("parent", "action", "visits")),
        ("first", np.int32),  # the child that was added last
        ("next", np.int32),  # the sibling that was added before
        ("best", np.int32),  # legal action without a node that has the largest prior, or -1
    ],
    align=True,
)


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile on the first call, and keep the result on disk where a folder for it can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba finds no such folder
        return numba.njit(nogil=True, error_model="numpy")(function)


class NumbaTree:
    """See `planning.tree.Backend`."""

    def __init__(self, plot: Plot) -> None:
        (batch, actions), n = plot.logits.shape, plot.simulations
        self.plot, self.simulation = plot, 0
        self.nodes, self.prior = np.empty((batch, n + 1), NODE), np.empty((batch, n + 1, actions))
        self.rows, self.action = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
        nothing = torch.zeros(0, 0)
        illegal = nothing.bool() if plot.illegal is None else plot.illegal
        if isinstance(rule := plot.rule, Halving):
            bonus, considered = rule.bonus, rule.considered
            numbers = np.array([rule.visit_offset, rule.value_scale, rule.rescale], dtype=np.float64)
        else:
            bonus, considered = nothing, nothing
            total = np.arange(n + 2.0)
            numbers = np.sqrt(total) * (rule.init + np.log((total + rule.base + 1) / rule.base))
        self.fixed = (
            self.nodes,
            self.prior,
            self.rows.numpy(),
            self.action.numpy(),
            np.empty(batch, np.int64),
            illegal.numpy(),
            bonus.double().numpy(),
            considered.long().numpy(),
            numbers,
            isinstance(rule, Halving),
            plot.max_depth,
        )
        plant(plot.logits.double().numpy(), plot.value.detach().double().numpy(), n, *self.fixed)

    def select(self) -> tuple[Tensor, Tensor]:
        """What the last call has selected."""
        return self.rows, self.action

    def expand(self, output: RecurrentOutput) -> None:
        """Expand, back up, and select for the next simulation."""
        self.simulation += 1
        if any(x.dtype is not output.value.dtype for x in output) or output.value.itemsize < 4:
            output = RecurrentOutput(*(x.double() for x in output))
        arrays = [x.detach().numpy() for x in output]
        last = self.simulation == self.plot.simulations
        if (bad := step(*arrays, self.simulation, last, *self.fixed)) >= 0:
            row, which = divmod(bad, len(OUTPUTS) + 1)
            if which == len(OUTPUTS):
                raise UserError(nowhere_to_go(row, self.simulation - 1))
            raise UserError(bad_number(OUTPUTS[which], row, self.simulation - 1))

    def finish(self) -> tuple[Tree, Tensor, Tensor]:
        """See `planning.tree.Backend`; the tree is float64 and shares the records' memory."""
        batch, _, actions = self.prior.shape
        visits, q = np.zeros((batch, actions), np.int64), np.zeros((batch, actions))
        summary(self.nodes, visits, q)
        tree = Tree(*(torch.from_numpy(self.nodes[name]) for name in Tree._fields))
        return tree, torch.from_numpy(visits), torch.from_numpy(q).to(self.plot.value.dtype)


@_compiled
def plant(logits, value, n, nodes, prior, rows, actions, leaves, illegal, bonus, considered, numbers, halving, depth):
    """Make the roots and select for the first simulation."""
    for b in range(len(value)):
        for i in range(n + 1):
            nodes[b, i].visits = 0
            nodes[b, i].value = nodes[b, i].raw_value = nodes[b, i].reward = nodes[b, i].discount = 0.0
            nodes[b, i].parent = nodes[b, i].action = nodes[b, i].first = nodes[b, i].next = -1
        nodes[b, 0].visits = 1
        nodes[b, 0].value = nodes[b, 0].raw_value = value[b]
        _spread(nodes, prior, b, 0, logits[b], illegal)
        _descend(nodes, prior, b, 0, rows, actions, leaves, bonus, considered, numbers, halving, depth)


@_compiled
def step(
    reward, discount, logits, value, simulation, last,
    nodes, prior, rows, actions, leaves, illegal, bonus, considered, numbers, halving, depth,
):  # fmt: skip
    """One simulation of all trees; returns 5 * row + (index of the output that is wrong, or 4), or -1."""
    for b in range(len(value)):
        for k, x in enumerate((reward[b], discount[b])):
            if not np.isfinite(x):
                return 5 * b + k
        if not np.isfinite(value[b]):
            return 5 * b + 3
        parent = rows[b] // len(value)
        i = leaves[b]
        if i < 0:
            i = simulation
            nodes[b, i].parent = parent
            nodes[b, i].action = actions[b]
            nodes[b, i].prior = prior[b, parent, actions[b]]
            nodes[b, i].next = nodes[b, parent].first
            nodes[b, parent].first = i
            prior[b, parent, actions[b]] = -1.0
            _lookout(nodes, prior, b, parent)
        nodes[b, i].reward = reward[b]
        nodes[b, i].discount = discount[b]
        nodes[b, i].value = nodes[b, i].raw_value = value[b]
        nodes[b, i].visits += 1
        wrong = _spread(nodes, prior, b, i, logits[b], illegal)
        if wrong >= 0:
            return 5 * b + wrong
        back = np.float64(value[b])
        while i > 0:
            node = nodes[b, i]
            i = node.parent
            above = nodes[b, i]
            back = node.reward + node.discount * back
            above.value = (above.value * above.visits + back) / (above.visits + 1)
            above.visits += 1
        if not last:
            _descend(nodes, prior, b, simulation, rows, actions, leaves, bonus, considered, numbers, halving, depth)
    return -1


@_compiled
def summary(nodes, visits, q):
    """Fill in the visits and Q of the roots' actions."""
    for b in range(len(nodes)):
        i = nodes[b, 0].first
        while i >= 0:
            visits[b, nodes[b, i].action] = nodes[b, i].visits
            q[b, nodes[b, i].action] = nodes[b, i].reward + nodes[b, i].discount * nodes[b, i].value
            i = nodes[b, i].next


@_compiled
def _spread(nodes, prior, b, i, logits, illegal):
    """Priors of a new node: probabilities, and -1 for what cannot be taken; returns what is wrong, or -1."""
    top = -np.inf
    for a in range(len(logits)):
        x = logits[a]
        if not x < np.inf:
            return 2
        if len(illegal) and i > 0 and illegal[b, a]:
            x = -np.inf
        prior[b, i, a] = x
        top = max(top, x)
    if top == -np.inf:
        return 4
    total = 0.0
    for a in range(len(logits)):
        x = prior[b, i, a]
        if x > -np.inf:
            prior[b, i, a] = np.exp(x - top)
            total += prior[b, i, a]
        else:
            prior[b, i, a] = -1.0
    for a in range(len(logits)):
        if prior[b, i, a] >= 0.0:
            prior[b, i, a] /= total
    _lookout(nodes, prior, b, i)
    return -1


@_compiled
def _lookout(nodes, prior, b, i):
    """Note the best action without a node, and the prior of all those."""
    best, most, total = -1, -1.0, 0.0
    for a in range(prior.shape[2]):
        p = prior[b, i, a]
        if p >= 0.0:
            total += p
            if p > most:
                best, most = a, p
    nodes[b, i].best = best
    nodes[b, i].unvisited = total


@_compiled
def _descend(nodes, prior, b, simulation, rows, actions, leaves, bonus, considered, numbers, halving, max_depth):
    """Walk down to an action without a node, or to the depth that is allowed, and note where."""
    i, depth = 0, 0
    while True:
        if not halving:
            action, child = _puct(nodes, prior, b, i, numbers)
        elif i == 0:
            action, child = _halve(nodes, prior, b, considered[b, simulation], bonus, numbers)
        else:
            action, child = _improve(nodes, prior, b, i, numbers)
        depth += 1
        if child < 0 or depth >= max_depth:
            break
        i = child
    rows[b] = i * len(rows) + b
    actions[b] = action
    leaves[b] = child


@_compiled
def _puct(nodes, prior, b, i, explore):
    """(action, child or -1) of MuZero's pUCT; of equals the first action."""
    low = high = nodes[b, i].value
    c = nodes[b, i].first
    while c >= 0:
        q = nodes[b, c].reward + nodes[b, c].discount * nodes[b, c].value
        nodes[b, c].weight = q
        low, high = min(low, q), max(high, q)
        c = nodes[b, c].next
    scale = max(high - low, EPSILON)
    factor = explore[nodes[b, i].visits]
    action, child, score = nodes[b, i].best, -1, -np.inf
    if action >= 0:
        score = factor * prior[b, i, action]
    c = nodes[b, i].first
    while c >= 0:
        node = nodes[b, c]
        s = (node.weight - low) / scale + factor * node.prior / (node.visits + 1)
        if s > score or (s == score and node.action < action):
            action, child, score = node.action, c, s
        c = node.next
    return action, child


@_compiled
def _complete(nodes, b, i, actions, numbers):
    """(slope, zero, largest completed Q, v_mix, visits of all children), where sigma(q) = slope * (q - zero)."""
    low, high, mass, weighted = np.inf, -np.inf, 0.0, 0.0
    seen, total, most = 0, 0, 0
    c = nodes[b, i].first
    while c >= 0:
        mass += max(nodes[b, c].prior, TINY)
        c = nodes[b, c].next
    c = nodes[b, i].first
    while c >= 0:
        node = nodes[b, c]
        q = node.reward + node.discount * node.value
        node.weight = q
        low, high = min(low, q), max(high, q)
        weighted += max(node.prior, TINY) * q / mass
        seen += 1
        total += node.visits
        most = max(most, node.visits)
        c = node.next
    mix = (nodes[b, i].raw_value + total * weighted) / (total + 1)
    if seen < actions:
        low, high = min(low, mix), max(high, mix)
    slope = (numbers[0] + most) * numbers[1]
    if numbers[2] == 0.0:
        return slope, 0.0, high, mix, total
    return slope / max(high - low, EPSILON), low, high, mix, total


@_compiled
def _halve(nodes, prior, b, considered, bonus, numbers):
    """(action, child or -1) of sequential halving at the root; of equals the first action."""
    slope, zero, _, mix, _ = _complete(nodes, b, 0, prior.shape[2], numbers)
    action, child, score = -1, -1, -np.inf
    if considered == 0:
        sigma = slope * (mix - zero)
        for a in range(prior.shape[2]):
            if prior[b, 0, a] >= 0.0:
                s = max(bonus[b, a] + sigma, -1e9)
                if s > score:
                    action, score = a, s
        return action, child
    c = nodes[b, 0].first
    while c >= 0:
        node = nodes[b, c]
        if node.visits == considered:
            s = max(bonus[b, node.action] + slope * (node.weight - zero), -1e9)
            if s > score or (s == score and node.action < action):
                action, child, score = node.action, c, s
        c = node.next
    return action, child


@_compiled
def _improve(nodes, prior, b, i, numbers):
    """(action, child or -1) with the largest pi'(a) - N(a) / (1 + sum N); of equals the first action."""
    slope, _, high, mix, total = _complete(nodes, b, i, prior.shape[2], numbers)
    rest = np.exp(slope * (mix - high)) if nodes[b, i].best >= 0 else 0.0
    mass = nodes[b, i].unvisited * rest
    c = nodes[b, i].first
    while c >= 0:
        node = nodes[b, c]
        node.weight = node.prior * np.exp(slope * (node.weight - high))
        mass += node.weight
        c = node.next
    action, child, score = nodes[b, i].best, -1, -np.inf
    if action >= 0:
        score = prior[b, i, action] * rest / mass
    c = nodes[b, i].first
    while c >= 0:
        node = nodes[b, c]
        s = node.weight / mass - node.visits / (1 + total)
        if s > score or (s == score and node.action < action):
            action, child, score = node.action, c, s
        c = node.next
    return action, child

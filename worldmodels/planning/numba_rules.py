"""The compiled functions of the trees on the CPU, and the records that they work on.

The children of a node are a linked list of edges. Unvisited actions are never walked over: within one node they share
their completed Q, so the best of them is the one of the largest prior, found once after a child was added. All sums
are in float64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

EPSILON = 1e-8
"""The least range that Q is divided by."""
TINY = float(np.finfo(np.float64).tiny)
NODE = np.dtype(
    [
        *((name, np.float64) for name in ("value", "raw_value", "reward", "discount")),
        ("taken", np.float64),  # sum of the priors of actions with a node
        ("unvisited", np.float64),  # sum of the priors of actions without one
        ("parent", np.uint32),
        ("first", np.uint32),  # the child that was added last, 0 for none
        ("best", np.int32),  # action without a node that has the largest prior, -1 for none, -2 for not yet looked up
        ("unused", np.int32),
    ]
)
EDGE = np.dtype(
    [
        ("q", np.float64),
        ("prior", np.float64),
        ("visits", np.int32),
        ("action", np.int32),
        ("next", np.uint32),  # the sibling that was added before, 0 for none
        ("unused", np.int32),
    ]
)
"""The edge into a node, apart from the node itself: half a cache line, for a selection reads all edges of a node."""


class Forest(NamedTuple):
    """All that the compiled functions share.

    Args:
        nodes: (B, N) NODE.
        edges: (B, N) EDGE.
        told: (3, B) reward, discount and value of the model's last answer.
        prior: (N, B, A) of actions without a node; -1 of those with one.
        rows: (B,) selected parent * B + row, as the gathering of states wants it.
        actions: (B,) selected action.
        parents: (B,) selected parent.
        leaves: (B,) node that the selection leads to, 0 for a new one.
        root: (3, B, A) Q, visits and prior of the roots' children.
        children: (B, A) nodes of the roots' children, 0 for none.
        scratch: (A,).
        bonus: (B, A) of `Halving`.
        considered: (B, n) of `Halving`.
        numbers: settings of `Halving`, or pUCT's factor of exploration by the visits of a node.
        halving: the rule is `Halving`.
        max_depth: of `Plot`.
        ties: (B, A) of `Plot`, or empty.
        slack: what equal scores may differ by.
    """

    nodes: np.ndarray
    edges: np.ndarray
    told: np.ndarray
    prior: np.ndarray
    rows: np.ndarray
    actions: np.ndarray
    parents: np.ndarray
    leaves: np.ndarray
    root: np.ndarray
    children: np.ndarray
    scratch: np.ndarray
    bonus: np.ndarray
    considered: np.ndarray
    numbers: np.ndarray
    halving: bool
    max_depth: int
    ties: np.ndarray
    slack: float


def _compiled(**settings: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile on the first call, and keep the result on disk where a folder for it can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, error_model="numpy", **settings)(function)
        except RuntimeError:  # numba finds no such folder
            return numba.njit(nogil=True, error_model="numpy", **settings)(function)

    return decorate


@_compiled()
def plant(f):
    """Make the roots and select for the first simulation."""
    for b in range(len(f.rows)):
        for i in range(f.nodes.shape[1]):
            node, edge = f.nodes[b, i], f.edges[b, i]
            node.value = node.raw_value = node.reward = node.discount = node.taken = 0.0
            node.parent = node.first = edge.next = 0
            node.best = -2
            edge.action = -1
            edge.visits = 0
        f.edges[b, 0].visits = 1
        f.nodes[b, 0].value = f.nodes[b, 0].raw_value = f.told[2, b]
        _descend(f, b, 0)


@_compiled()
def step(f, simulation, last):
    """One simulation of all trees; returns a row for which the model gave what is no number, or -1."""
    for b in range(len(f.rows)):
        reward, discount, value = f.told[0, b], f.told[1, b], f.told[2, b]
        if not np.isfinite(reward + discount + value + f.prior[simulation, b, 0]):
            return b
        i = f.leaves[b]
        if i == 0:
            i = np.uint32(simulation)
            _attach(f, b, i, f.parents[b], f.actions[b])
        node = f.nodes[b, i]
        node.reward = reward
        node.discount = discount
        node.value = node.raw_value = value
        back = node.value
        while i > 0:
            node, edge = f.nodes[b, i], f.edges[b, i]
            edge.q = node.reward + node.discount * node.value
            edge.visits += 1
            back = node.reward + node.discount * back
            i = node.parent
            if i == 0:
                f.root[0, b, edge.action] = edge.q
                f.root[1, b, edge.action] = edge.visits
            above, visits = f.nodes[b, i], f.edges[b, i].visits
            above.value = (above.value * visits + back) / (visits + 1)
        f.edges[b, 0].visits += 1
        if not last:
            _descend(f, b, simulation)
    return -1


@_compiled()
def _attach(f, b, i, parent, action):
    """Make `i` a child of `parent`."""
    node, edge, above = f.nodes[b, i], f.edges[b, i], f.nodes[b, parent]
    node.parent = parent
    edge.action = action
    edge.prior = max(np.float64(f.prior[parent, b, action]), TINY)
    edge.next = above.first
    above.first = i
    above.taken += edge.prior
    above.best = -2
    f.prior[parent, b, action] = -1.0
    if parent == 0:
        f.root[2, b, action] = edge.prior
        f.children[b, action] = i


@_compiled()
def _descend(f, b, simulation):
    """Walk down to an action without a node, or to the depth that is allowed, and note where."""
    i, depth = np.uint32(0), 0
    while True:
        if f.halving and i == 0:
            action = _halve(f, b, simulation)
            child = f.children[b, action]
        else:
            if f.nodes[b, i].best == -2:
                _look(f, b, i)
            action, child = _improve(f, b, i) if f.halving else _puct(f, b, i)
        depth += 1
        if child == 0 or depth >= f.max_depth:
            break
        i = child
    f.rows[b] = i * len(f.rows) + b
    f.actions[b] = action
    f.parents[b] = i
    f.leaves[b] = child


@_compiled()
def _look(f, b, i):
    """Note the best action without a node, and the prior of all those."""
    best, most, total = -1, 0.0, 0.0
    for a in range(f.prior.shape[2]):
        p = np.float64(f.prior[i, b, a])
        total += max(p, 0.0)
        if p > most:
            best, most = a, p
    f.nodes[b, i].best = best
    f.nodes[b, i].unvisited = total


@_compiled()
def _puct(f, b, i):
    """(action, child or 0) of MuZero's pUCT."""
    low = high = f.nodes[b, i].value
    c = f.nodes[b, i].first
    while c > 0:
        q = f.edges[b, c].q
        low, high = min(low, q), max(high, q)
        c = f.edges[b, c].next
    scale = max(high - low, EPSILON)
    factor = f.numbers[f.edges[b, i].visits]
    action, child, score = f.nodes[b, i].best, np.uint32(0), -np.inf
    if action >= 0:
        score = factor * f.prior[i, b, action]
    c, k = f.nodes[b, i].first, 0
    while c > 0:
        edge = f.edges[b, c]
        f.scratch[k] = s = (edge.q - low) / scale + factor * edge.prior / (edge.visits + 1)
        if s > score or (s == score and edge.action < action):
            action, child, score = edge.action, c, s
        c, k = edge.next, k + 1
    return _untie(f, b, i, action, child, score, factor) if len(f.ties) else (action, child)


@_compiled()
def _untie(f, b, i, action, child, score, factor):
    """(action, child or 0) of those with the largest score, but for rounding, the one with the largest draw.

    The scores of children are in `scratch`; `factor` times its prior is that of an action without a node.
    """
    least, most = score - f.slack, -np.inf
    for a in range(f.prior.shape[2]):
        p = np.float64(f.prior[i, b, a])
        if p > 0.0 and factor * p >= least and f.ties[b, a] > most:
            action, child, most = a, np.uint32(0), f.ties[b, a]
    c, k = f.nodes[b, i].first, 0
    while c > 0:
        a = f.edges[b, c].action
        if f.scratch[k] >= least and f.ties[b, a] > most:
            action, child, most = a, c, f.ties[b, a]
        c, k = f.edges[b, c].next, k + 1
    return action, child


@_compiled(fastmath={"reassoc", "nnan", "nsz"})
def _halve(f, b, simulation):
    """The action of sequential halving at the root. `simulation` is the sum of the visits.

    Over all actions, without branches and with sums in any order, so that a core takes several at once.
    """
    q, visits, prior, bonus, scratch = f.root[0, b], f.root[1, b], f.root[2, b], f.bonus[b], f.scratch
    considered = f.considered[b, simulation]
    weighted, most = 0.0, 0.0
    for a in range(len(q)):
        weighted += prior[a] * q[a]
        most = max(most, visits[a])
    mix = f.nodes[b, 0].raw_value
    if simulation > 0:
        mix = (mix + simulation * (weighted / f.nodes[b, 0].taken)) / (simulation + 1)
    low, high = np.inf, -np.inf
    for a in range(len(q)):
        completed = q[a] if visits[a] > 0.0 else mix
        low, high = min(low, completed), max(high, completed)
        scratch[a] = completed
    slope, zero = (f.numbers[0] + most) * f.numbers[1], 0.0
    if f.numbers[2] > 0.0:
        slope, zero = slope / max(high - low, EPSILON), low
    best = -np.inf
    for a in range(len(q)):
        score = max(bonus[a] + slope * (scratch[a] - zero), -1e9)
        scratch[a] = score if visits[a] == considered and bonus[a] > -np.inf else -np.inf
        best = max(best, scratch[a])
    if len(f.ties):
        action, most = 0, -np.inf
        for a in range(len(q)):
            if scratch[a] >= best - f.slack and f.ties[b, a] > most:
                action, most = a, f.ties[b, a]
        return action
    for a in range(len(q)):
        if scratch[a] == best:
            return a
    return 0


@_compiled()
def _improve(f, b, i):
    """(action, child or 0) with the largest pi'(a) - N(a) / (1 + sum N).

    sigma(q) is slope * q but for a constant, which the softmax of pi' does not see.
    """
    action, child, score = f.nodes[b, i].best, np.uint32(0), -np.inf
    if f.nodes[b, i].first == 0:
        if len(f.ties):
            factor = 1.0 / f.nodes[b, i].unvisited
            return _untie(f, b, i, action, child, factor * f.prior[i, b, action], factor)
        return action, child
    low, high, weighted = np.inf, -np.inf, 0.0
    seen, total, most = 0, 0, 0
    c = f.nodes[b, i].first
    while c > 0:
        edge = f.edges[b, c]
        low, high = min(low, edge.q), max(high, edge.q)
        weighted += edge.prior * edge.q
        seen += 1
        total += edge.visits
        most = max(most, edge.visits)
        c = edge.next
    mix = (f.nodes[b, i].raw_value + total * (weighted / f.nodes[b, i].taken)) / (total + 1)
    if seen < f.prior.shape[2]:
        low, high = min(low, mix), max(high, mix)
    slope = (f.numbers[0] + most) * f.numbers[1]
    if f.numbers[2] > 0.0:
        slope /= max(high - low, EPSILON)
    rest, mass = 0.0, 0.0
    if action >= 0:
        rest = np.exp(slope * (mix - high))
        mass = f.nodes[b, i].unvisited * rest
    c, k = f.nodes[b, i].first, 0
    while c > 0:
        f.scratch[k] = f.edges[b, c].prior * np.exp(slope * (f.edges[b, c].q - high))
        mass += f.scratch[k]
        c, k = f.edges[b, c].next, k + 1
    if action >= 0:
        score = f.prior[i, b, action] * rest / mass
    c, k = f.nodes[b, i].first, 0
    while c > 0:
        edge = f.edges[b, c]
        f.scratch[k] = s = f.scratch[k] / mass - edge.visits / (1 + total)
        if s > score or (s == score and edge.action < action):
            action, child, score = edge.action, c, s
        c, k = edge.next, k + 1
    return _untie(f, b, i, action, child, score, rest / mass) if len(f.ties) else (action, child)

"""Trees as plain torch tensors: the readable reference, and what runs where the model is on a GPU.

Every operation is over the whole batch, one level of all trees at a time.
"""

import torch
from torch import Tensor

from worldmodels.planning.tree import (
    OUTPUTS,
    Halving,
    Plot,
    Puct,
    Tree,
    bad_number,
    best_of,
    nowhere_to_go,
    wrong,
)
from worldmodels.types import RecurrentOutput, UserError

EPSILON = 1e-8
"""The least range that Q is divided by."""


class TorchTree:
    """See `planning.tree.Backend`."""

    def __init__(self, plot: Plot) -> None:
        (batch, actions), nodes = plot.logits.shape, plot.simulations + 1
        real, device = plot.value.dtype, plot.value.device

        def table(*shape: int, fill: float = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((batch, *shape), fill, dtype=dtype, device=device)

        self.plot, self.simulation, self.row = plot, 0, torch.arange(batch, device=device)
        self.tree = Tree(
            parent=table(nodes, fill=-1),
            action=table(nodes, fill=-1),
            visits=table(nodes),
            **{k: table(nodes, dtype=real) for k in ("value", "raw_value", "reward", "discount")},
        )
        self.children, self.logits = table(nodes, actions, fill=-1), table(nodes, actions, dtype=real)
        self.leaf = self.action = table()
        self.tree.visits[:, 0] = 1
        self.tree.value[:, 0] = self.tree.raw_value[:, 0] = plot.value
        self.logits[:, 0] = plot.logits
        # looked at only at the end: asking in each simulation would hold up a GPU
        self.bad = table(plot.simulations, len(OUTPUTS) + 1, dtype=torch.bool)

    def select(self) -> tuple[Tensor, Tensor]:
        """Walk down all trees until each has met an action without a node, or the depth that is allowed."""
        node = leaf = action = torch.zeros_like(self.row)
        going = torch.ones_like(self.row, dtype=torch.bool)
        for depth in range(1, self.plot.max_depth + 1):
            best = best_of(self.scores(node, at_root=depth == 1), self.plot.ties)
            leaf, action = torch.where(going, node, leaf), torch.where(going, best, action)
            child = self.children[self.row, node, best]
            going &= child >= 0
            if not going.any():
                break
            node = torch.where(going, child, node)
        self.leaf, self.action = leaf, action
        return leaf * len(leaf) + self.row, action

    def expand(self, output: RecurrentOutput) -> None:
        """Write the new nodes and move their values up, level by level."""
        tree, row, parent = self.tree, self.row, self.leaf
        self.simulation += 1
        node = self.children[row, parent, self.action]
        node = torch.where(node < 0, self.simulation, node)  # at max_depth a node is visited again
        logits = output.prior_logits.to(self.logits.dtype)
        if self.plot.illegal is not None:
            logits = logits.masked_fill(self.plot.illegal, -torch.inf)
        bad = [wrong(name, getattr(output, name)) for name in OUTPUTS]
        self.bad[:, self.simulation - 1] = torch.stack([*bad, logits.isneginf().all(-1)], 1)
        self.children[row, parent, self.action] = node
        self.logits[row, node] = logits
        tree.parent[row, node], tree.action[row, node] = parent, self.action
        tree.visits[row, node] += 1
        for name in ("reward", "discount"):
            getattr(tree, name)[row, node] = getattr(output, name).to(tree.value.dtype)
        value = output.value.to(tree.value.dtype)
        tree.value[row, node] = tree.raw_value[row, node] = value
        while len(row := row[node > 0]):
            value, node = value[node > 0], node[node > 0]
            parent = tree.parent[row, node]
            value = tree.reward[row, node] + tree.discount[row, node] * value
            visits = tree.visits[row, parent]
            tree.value[row, parent] = (tree.value[row, parent] * visits + value) / (visits + 1)
            tree.visits[row, parent] += 1
            node = parent

    def finish(self) -> tuple[Tree, Tensor, Tensor]:
        """See `planning.tree.Backend`."""
        if self.bad.any():
            simulation, row, which = self.bad.transpose(0, 1).nonzero()[0].tolist()
            names = [*OUTPUTS, None]
            if (name := names[which]) is None:
                raise UserError(nowhere_to_go(row, simulation))
            raise UserError(bad_number(name, row, simulation))
        q, visits = self._q(torch.zeros_like(self.row))
        return self.tree, visits.long(), q

    def _q(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A) Q and visits of a node's actions, of one dtype; both 0 where there was no visit."""
        child = self.children[self.row, node]
        at, seen = (self.row[:, None], child.clamp(min=0)), child >= 0
        tree = self.tree
        q = tree.reward[at] + tree.discount[at] * tree.value[at]
        return torch.where(seen, q, 0), torch.where(seen, tree.visits[at], 0).to(q.dtype)

    def scores(self, node: Tensor, at_root: bool) -> Tensor:
        """(B, A) of the actions of `node`, of which the rule takes the largest."""
        (q, visits), at, rule = self._q(node), (self.row, node), self.plot.rule
        logits = self.logits[at]
        if isinstance(rule, Puct):
            score = puct_score(logits, q, visits, self.tree.value[at], self.tree.visits[at], rule)
            return torch.where(logits.isneginf(), -torch.inf, score)
        completed = completed_q(logits, q, visits, self.tree.raw_value[at])
        sigma = scaled(completed, visits, rule)
        if at_root:
            considered = rule.considered[:, self.simulation, None]
            return halving_score(rule.bonus, sigma, visits, considered)
        share = visits / (1 + visits.sum(-1, keepdim=True))
        return torch.softmax(logits + sigma, -1) - share


def puct_score(logits: Tensor, q: Tensor, visits: Tensor, value: Tensor, parent_visits: Tensor, rule: Puct) -> Tensor:
    """(B, A) of MuZero's pUCT: Qn + P sqrt(N) / (1 + n) (c1 + log((N + c2 + 1) / c2)).

    Qn is Q moved to [0, 1] by the least and largest of the node's value and its visited actions, 0 without a visit.
    """
    total = parent_visits.to(q.dtype)
    explore = (total.sqrt() * (rule.init + ((total + rule.base + 1) / rule.base).log()))[:, None]
    value, seen = value[:, None], visits > 0
    known = torch.where(seen, q, value)
    low, high = known.amin(-1, keepdim=True).minimum(value), known.amax(-1, keepdim=True).maximum(value)
    normalised = (torch.where(seen, q, low) - low) / (high - low).clamp(min=EPSILON)
    return normalised + explore * torch.softmax(logits, -1) / (visits + 1)


def completed_q(logits: Tensor, q: Tensor, visits: Tensor, raw_value: Tensor) -> Tensor:
    """(B, A) Q, and where there was no visit v_mix (Danihelka et al. 2022, appendix D)."""
    seen, total = visits > 0, visits.sum(-1)
    prior = torch.softmax(logits, -1).clamp(min=torch.finfo(logits.dtype).tiny)
    prior = torch.where(seen, prior, 0)
    weighted = (prior * q / torch.where(total > 0, prior.sum(-1), 1)[:, None]).sum(-1)
    mix = (raw_value + total * weighted) / (total + 1)
    return torch.where(seen, q, mix[:, None])


def scaled(completed: Tensor, visits: Tensor, rule: Halving) -> Tensor:
    """(B, A) sigma(q) = (c_visit + max N) c_scale q, of q or of q moved to [0, 1]."""
    if rule.rescale:
        low, high = completed.amin(-1, keepdim=True), completed.amax(-1, keepdim=True)
        completed = (completed - low) / (high - low).clamp(min=EPSILON)
    return (rule.visit_offset + visits.amax(-1, keepdim=True).to(completed.dtype)) * rule.value_scale * completed


def halving_score(bonus: Tensor, sigma: Tensor, visits: Tensor, considered: Tensor) -> Tensor:
    """(B, A) g + logits + sigma(q), -inf for illegal actions and those without just `considered` (B, 1) visits."""
    score = (bonus + sigma).clamp(min=-1e9)  # a legal action stays above an illegal one, whatever its logit
    return torch.where((visits == considered) & ~bonus.isneginf(), score, -torch.inf)

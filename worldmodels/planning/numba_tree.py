"""Trees on the CPU: one compiled call a simulation, which expands, backs up and selects, root after root.

One thread, and no OpenMP: pools that spin while torch's pool works were seen to make a search ten times slower.
"""

import numpy as np
import torch
from torch import Tensor

from worldmodels.planning.numba_rules import EDGE, NODE, Forest, plant, step
from worldmodels.planning.tree import OUTPUTS, Halving, Plot, Tree, bad_number, nowhere_to_go, slack, wrong
from worldmodels.types import RecurrentOutput, UserError


class NumbaTree:
    """See `planning.tree.Backend`."""

    def __init__(self, plot: Plot) -> None:
        (batch, actions), n = plot.logits.shape, plot.simulations
        self.plot, self.simulation = plot, 0
        self.rows, self.action = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
        told = torch.empty(3, batch, dtype=torch.float64)
        self.told = told.unbind()
        prior = torch.empty(n + 1, batch, actions, dtype=plot.logits.dtype)
        self.prior = prior.unbind()
        torch.softmax(plot.logits, -1, out=self.prior[0])
        if isinstance(rule := plot.rule, Halving):
            bonus, considered = rule.bonus.double(), rule.considered
            numbers = np.array([rule.visit_offset, rule.value_scale, rule.rescale], dtype=np.float64)
        else:
            bonus, considered = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.int64)
            total = np.arange(n + 2.0)
            numbers = np.sqrt(total) * (rule.init + np.log((total + rule.base + 1) / rule.base))
        self.forest = Forest(
            nodes=np.empty((batch, n + 1), NODE),
            edges=np.empty((batch, n + 1), EDGE),
            told=told.numpy(),
            prior=prior.numpy(),
            rows=self.rows.numpy(),
            actions=self.action.numpy(),
            parents=np.empty(batch, np.uint32),
            leaves=np.empty(batch, np.uint32),
            root=np.zeros((3, batch, actions)),
            children=np.zeros((batch, actions), np.uint32),
            scratch=np.empty(actions),
            bonus=bonus.numpy(),
            considered=considered.numpy(),
            numbers=numbers,
            halving=isinstance(rule, Halving),
            max_depth=plot.max_depth,
            ties=(torch.zeros(0, 0) if plot.ties is None else plot.ties).double().numpy(),
            slack=slack(plot.value.dtype),
        )
        self.told[2].copy_(plot.value)
        plant(self.forest)

    def select(self) -> tuple[Tensor, Tensor]:
        """What the last call has selected."""
        return self.rows, self.action

    def expand(self, output: RecurrentOutput) -> None:
        """Expand, back up, and select for the next simulation."""
        self.simulation += 1
        reward, discount, logits, value = output
        if self.plot.illegal is not None:
            logits = logits.masked_fill(self.plot.illegal, -torch.inf)
        torch.softmax(logits.to(self.plot.logits.dtype), -1, out=self.prior[self.simulation])
        for told, tensor in zip(self.told, (reward, discount, value), strict=True):
            told.copy_(tensor)
        row = step(self.forest, self.simulation, self.simulation == self.plot.simulations)
        if row >= 0:
            self._refuse(output._replace(prior_logits=logits), row)

    def _refuse(self, output: RecurrentOutput, row: int) -> None:
        for name, tensor in zip(OUTPUTS, output, strict=True):
            if wrong(name, tensor)[row]:
                raise UserError(bad_number(name, row, self.simulation - 1))
        raise UserError(nowhere_to_go(row, self.simulation - 1))

    def finish(self) -> tuple[Tree, Tensor, Tensor]:
        """See `planning.tree.Backend`; the tree is float64 and shares the records' memory."""
        nodes, edges = self.forest.nodes, self.forest.edges
        parent = np.where(edges["action"] < 0, -1, nodes["parent"].astype(np.int64))
        columns = [edges[name] for name in ("action", "visits")]
        columns += [nodes[name] for name in ("value", "raw_value", "reward", "discount")]
        q, visits = self.forest.root[:2]
        tree = Tree(*map(torch.from_numpy, (parent, *columns)))
        return tree, torch.from_numpy(visits).long(), torch.from_numpy(q).to(self.plot.value.dtype)

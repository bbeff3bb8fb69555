"""Both backends' trees beside those of mctx: golden ones, and fresh ones where the extra `oracle` is installed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from tests.search_cases import KINDS, SHAPES, Case, cases, in_torch
from worldmodels.planning.gumbel import gumbel_search
from worldmodels.planning.puct import puct_search
from worldmodels.planning.torch_tree import TorchTree
from worldmodels.planning.tree import SearchResult
from worldmodels.types import Recurrent, RecurrentOutput, State

GOLDEN = ROOT / "tests" / "fixtures" / "search_trees.npz"
SEARCHES = {"gumbel": gumbel_search, "puct": puct_search}
REALS = {torch.float64: ("64", 1e-9), torch.float32: ("32", 1e-5)}
Expected = dict[str, Tensor]


def search(case: Case, dtype: torch.dtype, backend: str, **more: Any) -> SearchResult:
    recurrent, root = in_torch(case, dtype)
    given = {"noise": torch.from_numpy(case.noise).to(dtype), "invalid": torch.from_numpy(case.invalid)}
    given |= case.settings | more
    return SEARCHES[case.search](recurrent, root, case.simulations, backend=backend, **given)


def golden(dtype: torch.dtype) -> Iterator[tuple[Case, Expected]]:
    suffix, _ = REALS[dtype]
    with np.load(GOLDEN) as file:
        columns = {k.removesuffix(suffix): torch.from_numpy(file[k]) for k in file.files if k.endswith(suffix)}
    done = dict.fromkeys(columns, 0)
    for case in cases():
        nodes = case.simulations + 1
        shapes = dict.fromkeys(("parent", "action", "visits", "value"), (case.batch, nodes))
        shapes |= {"weights": (case.batch, case.actions), "chosen": (case.batch,)}
        expected = {}
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            expected[name] = columns[name][done[name] : done[name] + size].view(shape)
            done[name] += size
        yield case, expected
    assert all(done[k] == len(v) for k, v in columns.items())


def same_rows(result: SearchResult, expected: Expected) -> Tensor:
    """(B,) bool: the whole tree, its visits and the action are the expected ones."""
    tree = result.tree
    same = (tree.parent == expected["parent"]) & (tree.action == expected["action"])
    return (same & (tree.visits == expected["visits"])).all(1) & (result.action == expected["chosen"])


def apart(result: SearchResult, expected: Expected, rows: Tensor) -> float:
    """The largest difference of node values and action weights; relative to the tree's largest value above 1."""
    value = expected["value"].double()
    scale = value.abs().amax(1, keepdim=True).clamp(min=1)
    of_values = ((result.tree.value.double() - value) / scale)[rows].abs()
    of_weights = (result.action_weights - expected["weights"])[rows].abs()
    return max(float(x.max()) if x.numel() else 0.0 for x in (of_values, of_weights))


EVERY = [
    pytest.param("numba", 1),
    pytest.param("torch", 4),  # one shape in four
    pytest.param("torch", 1, marks=pytest.mark.exhaustive),
]


def test_backends_break_ties_alike() -> None:
    differs = 0
    for number, case in enumerate(cases(SHAPES[:20])):
        if case.kind == "ties":
            ties = torch.from_numpy(np.random.Generator(np.random.PCG64(number)).random(case.noise.shape))
            a, b = (search(case, torch.float64, backend, ties=ties) for backend in ("numba", "torch"))
            assert torch.equal(a.tree.parent, b.tree.parent) and torch.equal(a.tree.action, b.tree.action), case
            assert torch.equal(a.visits, b.visits) and torch.equal(a.action, b.action), case
            differs += not torch.equal(a.tree.action, search(case, torch.float64, "numba").tree.action)
    assert differs > 10


@pytest.mark.parametrize(("backend", "every"), EVERY)
def test_float64_trees_are_those_of_mctx(backend: str, every: int) -> None:
    searches = 0
    for number, (case, expected) in enumerate(golden(torch.float64)):
        if number // len(KINDS) % every == 0:
            result = search(case, torch.float64, backend)
            assert same_rows(result, expected).all(), case
            assert apart(result, expected, torch.ones(case.batch, dtype=torch.bool)) < 1e-9, case
            searches += 1
    assert searches >= 200 // every


@pytest.mark.parametrize(("backend", "every"), EVERY)
def test_float32_trees_are_those_of_mctx_but_for_near_ties(backend: str, every: int) -> None:
    same, roots = 0, 0
    for number, (case, expected) in enumerate(golden(torch.float32)):
        if number // len(KINDS) % every == every // 2:
            result = search(case, torch.float32, backend)
            rows = same_rows(result, expected)
            assert apart(result, expected, rows) < 1e-5, case
            for row in (~rows).nonzero()[:, 0].tolist():
                assert nearest_tie(case, result, expected, row) < 1e-4, (case, row)
            same, roots = same + int(rows.sum()), roots + case.batch
    assert same >= 0.99 * roots, (same, roots)


def test_a_near_tie_is_told_from_a_clear_choice() -> None:
    for case in cases(SHAPES[5:6]):
        if case.search == "puct" and case.kind in ("smooth", "ties"):
            result = search(case, torch.float64, "torch")
            other = {"parent": result.tree.parent.clone(), "action": result.tree.action.clone()}
            other["action"][:, 1] += 1
            gap = nearest_tie(case, result, other, row=0)
            assert (gap < 1e-12) == (case.kind == "ties")


def nearest_tie(case: Case, result: SearchResult, expected: Expected, row: int) -> float:
    """How close the two best scores came, in float64, in the simulation in which two trees part."""
    tree = result.tree
    differ = (tree.parent[row] != expected["parent"][row]) | (tree.action[row] != expected["action"][row])
    simulation = int(differ.nonzero()[0, 0]) - 1 if differ.any() else case.simulations - 1
    gaps: list[list[Tensor]] = []

    class Watched(TorchTree):
        def select(self) -> tuple[Tensor, Tensor]:
            gaps.append([])
            return super().select()

        def scores(self, node: Tensor, at_root: bool) -> Tensor:
            scores = super().scores(node, at_root)
            best = scores.topk(min(2, scores.shape[-1])).values
            gaps[-1].append((best[:, 0] - best[:, -1])[row])
            return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worldmodels.planning.torch_tree.TorchTree", Watched)
        search(case, torch.float64, "torch")
    return float(min(gaps[simulation]))


@pytest.mark.oracle
@pytest.mark.timeout(3600)
@pytest.mark.slow
def test_the_golden_trees_are_what_mctx_grows() -> None:
    pytest.importorskip("mctx", reason="the extra `oracle` is not installed")
    import jax

    from tests.fixtures.make_search_trees import grown

    jax.config.update("jax_enable_x64", True)
    for dtype, real in ((torch.float64, np.float64), (torch.float32, np.float32)):
        for number, (case, expected) in enumerate(golden(dtype)):
            if number // len(KINDS) % 4 == 0:  # one shape in four: compiling is what takes the time
                fresh = grown(case, real)
                for name, array in fresh.items():
                    kept = expected[name].numpy().ravel()
                    np.testing.assert_allclose(array, kept, atol=REALS[dtype][1], rtol=REALS[dtype][1])


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_inside_masks_are_as_logits_of_minus_infinity(backend: str) -> None:
    for case in cases(SHAPES[4:8]):
        if case.kind not in ("smooth", "table"):
            continue
        recurrent, root = in_torch(case)
        mask = torch.zeros(case.batch, case.actions, dtype=torch.bool)
        mask[:, 0] = True

        def forbidding(state: State, action: Tensor, recurrent: Recurrent = recurrent) -> tuple[RecurrentOutput, State]:
            output, state = recurrent(state, action)
            return output._replace(prior_logits=output.prior_logits.index_fill(1, torch.tensor(0), -torch.inf)), state

        run = SEARCHES[case.search]
        told = run(recurrent, root, case.simulations, invalid_inside=mask, backend=backend)
        seen = run(forbidding, root, case.simulations, backend=backend)
        assert torch.equal(told.tree.parent, seen.tree.parent)
        assert torch.equal(told.tree.action, seen.tree.action)
        assert torch.equal(told.value, seen.value)
        assert ((told.tree.action != 0) | (told.tree.parent <= 0)).all()

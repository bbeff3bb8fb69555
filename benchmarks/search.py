"""Simulations a second of the batched search beside mctx's, with the same network, noise and machine, in one run.

`ours` is a search with its network, so small that it runs on one thread while mctx takes all cores; `tree` is the same
without the network: what selecting, expanding and backing up cost. 18 actions, 50 simulations, a small network
(82-128-64 dynamics, 64-128-(18, 1, 1) heads), float32. With the extra `oracle` installed mctx runs in turn with ours,
and the ratios are of the fastest run of each, or of the medians where they are named so; without it only our own times
are printed and no ratio is claimed. A larger network takes the same time in both and draws the ratios to 1.
`outlier_ratio` is the slowest run of our search over the median one, the greatest of all searches and batches: pools of
threads that fight, or other work on the machine, make it 10 and more.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import publish
from worldmodels.planning.gumbel import gumbel_search
from worldmodels.planning.puct import puct_search
from worldmodels.planning.tree import Root, SearchResult
from worldmodels.types import Recurrent, RecurrentOutput, State

ACTIONS, SIMULATIONS, LATENT, HIDDEN, DISCOUNT = 18, 50, 64, 128, 0.997
BATCHES = (64, 256)
LIMITS = {  # figure: (limit, goal beyond)
    "gumbel_ratio_to_mctx_256": (2.5, 4),
    "puct_ratio_to_mctx_256": (5, 8),
    "tree_us_per_root_simulation": (0.7, 0.7),
    "outlier_ratio": (10, 10),
}
Run = Callable[[], Any]


def weights() -> dict[str, np.ndarray]:
    """The network's: `act` are the rows of the first layer that a one-hot action would pick."""
    rng = np.random.default_rng(0)
    shapes = {"move": (LATENT, HIDDEN), "act": (ACTIONS, HIDDEN), "latent": (HIDDEN, LATENT)}
    shapes |= {"body": (LATENT, HIDDEN), "heads": (HIDDEN, ACTIONS + 2)}
    return {k: (rng.uniform(-1, 1, v) / np.sqrt(v[0])).astype(np.float32) for k, v in shapes.items()}


class Network:
    """The model in torch, the three heads in one product."""

    def __init__(self, batch: int) -> None:
        self.w = {k: torch.from_numpy(v) for k, v in weights().items()}
        self.discount = torch.full((batch,), DISCOUNT)

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.mm(torch.mm(h, self.w["body"]).relu_(), self.w["heads"])
        return out[:, :ACTIONS], out[:, ACTIONS], out[:, ACTIONS + 1]

    def root(self, h: Tensor) -> Root:
        logits, value, _ = self.heads(h)
        return Root(logits, value, {"h": h})

    def step(self, state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        hidden = torch.addmm(self.w["act"].index_select(0, action), state["h"], self.w["move"]).relu_()
        h = torch.mm(hidden, self.w["latent"]).relu_()
        logits, value, reward = self.heads(h)
        return RecurrentOutput(reward, self.discount, logits, value), {"h": h}


def ours(search: str, h: np.ndarray, noise: np.ndarray) -> tuple[Recurrent, Root, Callable[..., SearchResult]]:
    """The model, the root and the search of them, with the noise bound."""
    network = Network(len(h))
    root = network.root(torch.from_numpy(h))
    given = torch.from_numpy(noise)

    def run(recurrent: Recurrent, root: Root) -> SearchResult:
        if search == "gumbel":
            return gumbel_search(recurrent, root, SIMULATIONS, noise=given)
        return puct_search(recurrent, root, SIMULATIONS, noise=given)

    return network.step, root, run


def theirs(search: str, h: np.ndarray, noise: np.ndarray) -> Callable[[], Any] | None:
    """The same by mctx, compiled, or None where it is not installed."""
    try:
        import jax  # pyrefly: ignore
        import jax.numpy as jnp  # pyrefly: ignore
        import mctx  # pyrefly: ignore
    except ModuleNotFoundError:
        return None
    from unittest import mock

    w = {k: jnp.asarray(v) for k, v in weights().items()}

    def heads(w: Any, h: Any) -> Any:
        out = jax.nn.relu(h @ w["body"]) @ w["heads"]
        return out[:, :ACTIONS], out[:, ACTIONS], out[:, ACTIONS + 1]

    def step(w: Any, _: Any, action: Any, h: Any) -> Any:
        h = jax.nn.relu(jax.nn.relu(h @ w["move"] + w["act"][action]) @ w["latent"])
        logits, value, reward = heads(w, h)
        discount = jnp.full_like(value, DISCOUNT)
        return mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=logits, value=value), h

    def policy(w: Any, h: Any, noise: Any, key: Any) -> Any:
        logits, value, _ = heads(w, h)
        root = mctx.RootFnOutput(prior_logits=logits, value=value, embedding=h)
        kind = mctx.gumbel_muzero_policy if search == "gumbel" else mctx.muzero_policy
        with (
            mock.patch.object(jax.random, "gumbel", lambda *a, **k: noise),
            mock.patch.object(jax.random, "dirichlet", lambda *a, **k: noise),
        ):
            out = kind(w, key, root, step, SIMULATIONS)
        return out.action, out.action_weights, out.search_tree.node_values[:, 0]

    compiled = jax.jit(policy)
    arrays = (w, jnp.asarray(h), jnp.asarray(noise), jax.random.PRNGKey(0))
    return lambda: [np.asarray(x) for x in jax.block_until_ready(compiled(*arrays))]


def replayed(recurrent: Recurrent, root: Root, run: Callable[..., SearchResult]) -> Run:
    """The same search without its network and its latents: what is left is the trees' own work."""
    outputs: list[RecurrentOutput] = []

    def record(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        output, state = recurrent(state, action)
        outputs.append(RecurrentOutput(*(x.clone() for x in output)))
        return output, state

    run(record, root)

    def again() -> SearchResult:
        told = iter(outputs)
        return run(lambda state, action: (next(told), state), root._replace(state={}))

    return again


def in_turn(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, run in turn so that a busy moment of the machine meets them all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Print a line for each search and batch, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="40 repeats in place of 200")
    parser.add_argument("--out", type=Path, help="folder for search.json")
    options = parser.parse_args()
    figures: dict[str, float | None] = {}
    trees, outliers, anchor = [], [], "mctx in the same run"
    for batch in BATCHES:
        for search in ("gumbel", "puct"):
            times, alike = measured(search, batch, 40 if options.quick else 200)
            if "mctx" not in times:
                anchor = "none: mctx is not installed (pip install 'worldmodels[oracle]'), so no ratio is claimed"
            print(f"{search}, batch {batch}" + ("" if alike is None else f"; {alike:.1%} of roots end as mctx's"))
            for name, each in times.items():
                rate = batch * SIMULATIONS / min(each)
                spread = f"{statistics.median(each):7.2f} ({min(each):.2f} to {max(each):.2f}) ms"
                print(f"  {name:<5} {spread}  {rate:6.0f} thousand simulations/s")
            for name, middle in (("ratio", min), ("ratio_of_medians", statistics.median)):
                ratio = middle(times["mctx"]) / middle(times["ours"]) if "mctx" in times else None
                figures[f"{search}_{name}_to_mctx_{batch}"] = ratio and round(ratio, 2)
            outliers.append(max(times["ours"]) / statistics.median(times["ours"]))
            trees.append(1e3 * min(times["tree"]) / batch / SIMULATIONS)
            print(f"  tree  {trees[-1]:.3f} us a root and simulation")
    figures["tree_us_per_root_simulation"] = round(max(trees[-2:]), 3)
    figures["outlier_ratio"] = round(max(outliers), 2)
    print(f"anchor: {anchor}")
    for name, (limit, goal) in LIMITS.items():
        print(f"{name:<30} {figures[name]}  limit {limit}, goal {goal}")
    publish("search", figures, options.out, anchor=anchor)


def measured(search: str, batch: int, repeats: int) -> tuple[dict[str, list[float]], float | None]:
    """Milliseconds of our search, of its trees alone and of mctx's, and the share of roots with mctx's weights."""
    rng = np.random.default_rng(1)
    h, shape = rng.standard_normal((batch, LATENT)).astype(np.float32), (batch, ACTIONS)
    noise = rng.gumbel(size=shape) if search == "gumbel" else rng.dirichlet(np.full(ACTIONS, 0.3), batch)
    noise = noise.astype(np.float32)
    step, root, run = ours(search, h, noise)
    runs: dict[str, Run] = {"ours": lambda: run(step, root), "tree": replayed(step, root, run)}
    alike = None
    if (mctx := theirs(search, h, noise)) is not None:
        runs["mctx"] = mctx
        alike = float(np.mean(np.abs(mctx()[1] - run(step, root).action_weights.numpy()).max(1) < 1e-4))
    in_turn(runs, 3)
    return in_turn(runs, repeats), alike


if __name__ == "__main__":
    main()

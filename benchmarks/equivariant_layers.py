"""What a group convolution costs beside a plain one: `python -m benchmarks.equivariant_layers [--quick] [--out DIR]`.

`group_conv_cost_ratio_c4` and `_d4` are (time / time of the plain convolution) / (arithmetic / its arithmetic), the
arithmetic as torch counts it, of a training step: the weight is expanded, one call, its gradients. Of two shapes the
worse one is told. Beside it: the same at equal parameters, where the arithmetic is about G times as much; the forward
pass alone, its weight expanded each time; and an unroll of 5 calls for a single row, where all is overhead, with the
weight expanded once or at each call. One thread; all take turns, and the least time of each counts.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import publish
from worldmodels.nn.equivariant import GroupConv2d, expand_once, matched_width
from worldmodels.ops.groups import group

CHANNELS = 64
SHAPES = {"128x16x16": (128, 16), "256x6x6": (256, 6)}  # rows, height and width
SYMMETRIES = ("c4", "d4")
LIMIT = 1.3
Run = Callable[[], Any]


def least_times(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """The least milliseconds of each, in `rounds` turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds + 1):  # the first one warms up, and seldom is the least
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def arithmetic(network: nn.Module, x: Tensor) -> int:
    """Floating-point operations of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops()


def fields(name: str, channels: int) -> int:
    """How many of the group's fields have about as many parameters as a plain convolution of so many channels."""
    wished = sum(p.numel() for p in nn.Conv2d(channels, channels, 3).parameters())
    return matched_width(lambda width: GroupConv2d(group(name), width, width), wished)


def networks(rows: int, side: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """The plain convolution and each group's, of equal channels and of equal parameters, with an input of each."""
    made: dict[str, tuple[nn.Module, Tensor]] = {
        "plain": (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), torch.randn(rows, CHANNELS, side, side))
    }
    for name in SYMMETRIES:
        size = len(group(name))
        for kind, width in (("", CHANNELS // size), ("_matched", fields(name, CHANNELS))):
            conv = GroupConv2d(group(name), width, width)
            made[f"{name}{kind}"] = conv, torch.randn(rows, width, size, side, side)
    return made


def forward(network: nn.Module, x: Tensor) -> None:
    """Without gradient."""
    with torch.no_grad():
        network(x)


def step(network: nn.Module, x: Tensor) -> None:
    """Forward and back, with respect to weights and input."""
    network.zero_grad()
    network(x.detach().requires_grad_()).sum().backward()


def unroll(network: nn.Module, x: Tensor, once: bool) -> None:
    """Five calls, back to back."""
    with expand_once(network if once else nn.Identity()):
        for _ in range(5):
            forward(network, x)


def main() -> None:
    """Print the times and ratios of each shape, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 turns in place of 40")
    parser.add_argument("--out", type=Path, help="folder for equivariant_layers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = 10 if options.quick else 40
    figures: dict[str, float] = {}
    print(f"{'shape':<12}{'layer':<14}{'arithmetic':>11}{'forward ms':>12}{'ratio':>7}{'step ms':>10}{'ratio':>7}")
    for shape, (rows, side) in SHAPES.items():
        made = networks(rows, side)
        counts = {name: arithmetic(*pair) for name, pair in made.items()}
        forwards = least_times({n: lambda pair=pair: forward(*pair) for n, pair in made.items()}, rounds)
        steps = least_times({n: lambda pair=pair: step(*pair) for n, pair in made.items()}, rounds)
        for name in made:
            theory = counts[name] / counts["plain"]
            ahead = forwards[name] / forwards["plain"] / theory
            whole = steps[name] / steps["plain"] / theory
            print(
                f"{shape:<12}{name:<14}{theory:>11.2f}{forwards[name]:>12.2f}{ahead:>7.2f}{steps[name]:>10.2f}{whole:>7.2f}"
            )
            if name != "plain":
                symmetry, _, kind = name.partition("_")
                for key, ratio in (("cost_ratio", whole), ("forward_ratio", ahead)):
                    key = f"group_conv_{key}_{symmetry}{'_' if kind else ''}{kind}"
                    figures[key] = max(figures.get(key, 0.0), round(ratio, 3))
    alone = networks(1, 6)
    calls: dict[str, Run] = {"plain": lambda: unroll(*alone["plain"], once=False)}
    for name in SYMMETRIES:
        for once in (True, False):
            calls[f"{name}_{'once' if once else 'each_call'}"] = lambda n=name, o=once: unroll(*alone[n], once=o)
    times = least_times(calls, 25 * rounds)
    for name in list(times)[1:]:
        figures[f"single_row_ratio_{name}"] = round(times[name] / times["plain"], 3)
        print(f"5 calls, 1 row of 6x6: {name} {figures[f'single_row_ratio_{name}']} times the plain one's time")
    for name in SYMMETRIES:
        print(f"group_conv_cost_ratio_{name}: {figures[f'group_conv_cost_ratio_{name}']} (limit {LIMIT})")
    publish("equivariant_layers", figures, options.out)


if __name__ == "__main__":
    main()

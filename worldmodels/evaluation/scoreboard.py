"""Figures of one evaluation, and tables of scores beside those of published agents."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from worldmodels.evaluation.protocols import Rules
from worldmodels.evaluation.scores import Line, game_facts, normalised, published
from worldmodels.evaluation.stats import episode_weights, interval, weighted_mean

AGGREGATES = {"mean": "mean", "median": "median", "iqm": "IQM", "optimality_gap": "optimality gap"}


def figures_of(game: str, lines: Sequence[Line]) -> dict[str, Any]:
    """Figures of the episodes of one evaluation, with 95 % intervals of the means by bootstrap over episodes.

    `hns` is the human-normalised mean return, None where the game has no human score.
    """
    returns = [line["return"] for line in lines]
    columns = torch.tensor([returns, [line["length"] for line in lines]], dtype=torch.float64).T
    means = weighted_mean(episode_weights(np.arange(len(lines))), columns)
    (low, high), length = interval(means)
    return {
        "return_mean": float(means[0, 0]),
        "return_interval": [low, high],
        "return_median": float(np.median(returns)),
        "return_min": min(returns),
        "return_max": max(returns),
        "hns": normalised(game, float(means[0, 0])),
        "hns_interval": [normalised(game, low), normalised(game, high)],
        "length_mean": float(means[0, 1]),
        "length_interval": length,
        "truncated": sum(line["truncated"] for line in lines),
        "steps": sum(line["length"] for line in lines),
        "returns": returns,
    }


def game_table(agent: str, game: str, rules: Rules, figures: Mapping[str, Any], compare: bool) -> str:
    """The figures in words; with `compare`, under them what random play, a human and published agents reach."""
    low, high = figures["return_interval"]
    hns = "no human score" if figures["hns"] is None else "HNS {:.3f} [{:.3f}, {:.3f}]".format(
        figures["hns"], *figures["hns_interval"]
    )  # fmt: skip
    lines = [
        f"{agent} in {game}, {len(figures['returns'])} episodes by {rules.name} ({rules.hash})",
        f"return   {figures['return_mean']:.2f} [{low:.2f}, {high:.2f}], median {figures['return_median']:g}, "
        f"{figures['return_min']:g} to {figures['return_max']:g}",
        f"         {hns}",
        f"length   {figures['length_mean']:.0f} steps, {figures['truncated']} cut by the time limit",
    ]
    if compare:
        anchors, known = game_facts(game)["score"], published()
        rows = {"random play": anchors["random"], "human": anchors["human"]}
        rows |= {f"{a} ({known['benchmark']})": np.mean(s[game]) for a, s in known["per_seed"].items() if game in s}
        lines += [f"{name}: {score:.1f}" for name, score in rows.items() if score is not None]
    return "\n".join(lines)


def agents_table(figures: Mapping[str, Any], compare: bool) -> str:
    """The aggregates of `scores.summary`, an agent a row; with `compare`, published ones under them."""
    known = published()
    rows = [(agent, f"{f['games']} games x {f['runs']} runs", f) for agent, f in figures["agents"].items()]
    if compare:
        rows += [(f["agent"], f"{f['games']} games; {f['note']}", f) for f in known["agents"]]
    width = max(len(agent) for agent, _, _ in rows)
    lines = [f"{'agent':<{width}}  " + "  ".join(f"{title:<21}" for title in AGGREGATES.values())]
    for agent, note, f in rows:
        cells = [_cell(f[name], f.get(f"{name}_interval")) for name in AGGREGATES]
        lines.append(f"{agent:<{width}}  " + "  ".join(f"{cell:<21}" for cell in cells) + f"  {note}")
    for pair, f in figures["improvement"].items():
        lines.append(
            f"{pair}: probability of improvement "
            + _cell(f["probability_of_improvement"], f["probability_of_improvement_interval"])
        )
    if compare:
        lines.append(f"published: {known['benchmark']}; their rules of play differ, see the notes")
    return "\n".join(lines)


def _cell(value: float, ends: Sequence[float] | None) -> str:
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")

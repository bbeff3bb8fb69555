"""What a start from another game is worth: fine-tuning and training from scratch at equal steps and equal seconds.

A run is judged on test episodes after every so many steps, and known by the point that its validation episodes, which
are taken out of its own budget, would have chosen so far.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worldmodels.evaluation.pictures import Curve, plot
from worldmodels.evaluation.report import best_static

Run = Mapping[str, Any]
SHOWN = ("psnr_db", "psnr_changed_db", "psnr_gain_changed_db")
ROWS = {"finetuned": "fine-tuned", "scratch_equal_steps": "from scratch, as many steps"}
ROWS |= {"scratch_equal_seconds": "from scratch, as many seconds"}


def chosen(run: Run, most: float) -> dict[str, Any] | None:
    """Figures of the point that validation chooses among those of at most so many steps; None before the first."""
    points = [(int(step), point) for step, point in run["points"].items() if int(step) <= most]
    if not points:
        return None
    step, point = max(points, key=lambda one: one[1]["validation"])
    return {name: point[name] for name in SHOWN} | {"step": step}


def steps_to_reach(run: Run, wanted: float, place: int) -> int | None:
    """Steps after which the chosen point has such a PSNR on changed pixels at the horizon in this place."""
    for step in sorted(map(int, run["points"])):
        point = chosen(run, step)
        assert point is not None
        value = point["psnr_changed_db"][place]
        if value is not None and value >= wanted:
            return step
    return None


def compare(runs: Mapping[str, Run], begun: Mapping[str, Any], kept: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What fine-tuning gave within a budget, and what it cost.

    Args:
        runs: `finetuned` and `scratch`: `points` by step, `seconds_a_step` and number of weights `trained`.
        begun: figures of the model that both would improve on, of the new game and of the `old`.
        kept: figures of the fine-tuned model of the old games; none where there are none.
        steps: of the fine-tuned run.
    """
    tuned, scratch = runs["finetuned"], runs["scratch"]
    # the judged step that is nearest to where the same seconds lead
    as_many = steps * tuned["seconds_a_step"] / scratch["seconds_a_step"] + min(map(int, scratch["points"])) / 2
    found: dict[str, Any] = {
        "finetuned": chosen(tuned, steps),
        "scratch_equal_steps": chosen(scratch, steps),
        "scratch_equal_seconds": chosen(scratch, as_many),
        "seconds_a_step": {name: round(run["seconds_a_step"], 4) for name, run in runs.items()},
        "trained_share": round(tuned["trained"] / scratch["trained"], 4),
        "scratch_steps": max(map(int, scratch["points"])),
        "curves": {"finetuned": {"0": begun["new"]["psnr_changed_db"]}, "scratch": {}},
    }
    for name, run in runs.items():
        found["curves"][name] |= {k: run["points"][k]["psnr_changed_db"] for k in sorted(run["points"], key=int)}
    reached = found["finetuned"]["psnr_changed_db"]
    needed = [None if v is None else steps_to_reach(scratch, v, k) for k, v in enumerate(reached)]
    found["scratch_steps_to_reach"] = needed
    found["steps_ratio"] = [None if n is None else round(n / steps, 2) for n in needed]
    if kept:
        found["old"] = {name: kept[name] for name in SHOWN}
        found["forgotten"] = forgotten(begun["old"]["psnr_gain_changed_db"], kept["psnr_gain_changed_db"])
    return found


def forgotten(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    """Share of the gain over the best static baseline that is gone, by horizon; None where there was no gain."""
    return [
        None if b is None or a is None or b <= 0 else round((b - a) / b, 4) for b, a in zip(before, after, strict=True)
    ]


def write_report(out: Path, figures: Mapping[str, Any]) -> None:
    """Write report.md, few_shot, curves and, of old games, forgetting, each as .svg and .png, and show the table."""
    out.mkdir(parents=True, exist_ok=True)
    lines = table(figures)
    print("\n".join(lines))
    pictures = {"few_shot": "By transitions of the new game.", "curves": "By optimizer steps."}
    pictures |= {"forgetting": "What is left of the old games."} if figures["before"]["old"] else {}
    shown = [line for name, caption in pictures.items() for line in (f"![{caption}]({name}.svg)", "", caption, "")]
    (out / "report.md").write_text("\n".join([*lines, "", *shown]), encoding="utf-8")
    budgets, horizons = figures["budgets"], figures["horizons"]
    x = [int(budget) for budget in budgets]
    few: dict[str, dict[str, Curve]] = {}
    for k, h in enumerate(horizons):
        few[f"t+{h}"] = {
            label: (x, _known([found[row]["psnr_changed_db"][k] if found[row] else None for found in budgets.values()]))
            for row, label in ROWS.items()
        }
        new = figures["before"]["new"]
        few[f"t+{h}"]["before fine-tuning"] = (x, _known([new["psnr_changed_db"][k]] * len(x)))
        few[f"t+{h}"]["best static frame"] = (x, _known([best_static(new["psnr_changed_static_db"])[k]] * len(x)))
    curves: dict[str, dict[str, Curve]] = {
        f"{int(budget):,} transitions, t+{horizons[-1]}": {
            {"finetuned": "fine-tuned", "scratch": "from scratch"}[name]: (
                [int(step) for step in curve],
                _known([values[-1] for values in curve.values()]),
            )
            for name, curve in found["curves"].items()
        }
        for budget, found in budgets.items()
    }
    for suffix in ("svg", "png"):
        plot(out / f"few_shot.{suffix}", few, "transitions", "PSNR on changed pixels, dB", log="x")
        plot(out / f"curves.{suffix}", curves, "optimizer step", "PSNR on changed pixels, dB")
        if old := figures["before"]["old"]:
            kept: dict[str, dict[str, Curve]] = {
                f"old games, t+{h}": {
                    "fine-tuned": (x, _known([found["old"]["psnr_changed_db"][k] for found in budgets.values()])),
                    "before": (x, _known([old["psnr_changed_db"][k]] * len(x))),
                    "best static frame": (x, _known([best_static(old["psnr_changed_static_db"])[k]] * len(x))),
                }
                for k, h in enumerate(horizons)
            }
            plot(out / f"forgetting.{suffix}", kept, "transitions", "PSNR on changed pixels, dB", log="x")


def _known(values: Sequence[float | None]) -> list[float]:
    """Numbers to draw; what is not known is a gap."""
    return [float("nan") if value is None else value for value in values]


def table(figures: Mapping[str, Any]) -> list[str]:
    """The comparison as Markdown, a row for each budget and run."""
    horizons = [f"t+{h}" for h in figures["horizons"]]
    lines = [
        f"PSNR on changed pixels in dB, on test episodes that no run has seen; method={figures['method']}, "
        f"{figures['steps']} steps. A run is known by the step that its own validation episodes choose.",
        "",
        "| transitions | run | step | " + " | ".join(horizons) + " |",
        "|---|---|---|" + "---|" * len(horizons),
    ]
    lines.append(_row("0", "before fine-tuning", "", figures["before"]["new"]["psnr_changed_db"]))
    lines.append(_row("", "best static frame", "", best_static(figures["before"]["new"]["psnr_changed_static_db"])))
    for budget, found in figures["budgets"].items():
        for row, label in ROWS.items():
            if found[row]:
                lines.append(_row(f"{int(budget):,}", label, found[row]["step"], found[row]["psnr_changed_db"]))
        ratios = [
            f"x{r:.2f}" if r else f"> x{found['scratch_steps'] / figures['steps']:g}" for r in found["steps_ratio"]
        ]
        lines.append(f"| {int(budget):,} | steps from scratch to the fine-tuned PSNR | | {' | '.join(ratios)} |")
        if "forgotten" in found:
            lines.append(_row(f"{int(budget):,}", "old games, fine-tuned", "", found["old"]["psnr_changed_db"]))
            shares = ["none" if f is None else f"{f:.1%}" for f in found["forgotten"]]
            lines.append(f"| {int(budget):,} | of the gain on them forgotten | | {' | '.join(shares)} |")
    if old := figures["before"]["old"]:
        lines.append(_row("", "old games, before", "", old["psnr_changed_db"]))
    return lines + [f"\nLeft out: {why}" for why in figures["left_out"].values()]


def _row(budget: str, label: str, step: Any, values: Sequence[float | None]) -> str:
    return f"| {budget} | {label} | {step} | " + " | ".join("none" if v is None else f"{v:.2f}" for v in values) + " |"

"""One page that shows what a run made, and the same figures as JSON: index.html needs no other file and no network."""

import base64
import csv
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldmodels.evaluation.pictures import Curve, plot

STAGES = {"train": "pong", "quality": "quality", "imagine": "imagine", "finetune": "breakout"}
"""Folder of each stage's results within the run."""
FILMS = {
    "logged.mp4": "Above: real play from held-out episodes. Below: the model, which saw the first frames only and then "
    "took the same actions on its own frames.",
    "random.mp4": "Dreams under random actions.",
}
STRIPS = {
    "strip_logged.png": "Logged actions: what happened, what the model imagined, and the absolute difference.",
    "strip_random.png": "Random actions: a dream that has no counterpart to be compared with.",
}
TRANSFER = {"curves.svg": "Fine-tuned from the Pong model, and trained from scratch: same settings, same steps."}
_TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of the table of figures.

    Args:
        key: dotted name in report.json.
        name: in words.
        stage: the stage whose metrics hold the last part of the key.
        bar: what must be reached, in words; "" where there is none.
        met: judges the value; None where there is no bar.
    """

    key: str
    name: str
    stage: str
    bar: str = ""
    met: Callable[[Any], bool] | None = None


# fmt: off
BARS = (
    Bar("pong.psnr_gain_changed_db", "PSNR on changed pixels, above the best static baseline", "quality",
        "above 0 at every horizon", lambda v: min(v) > 0),
    Bar("pong.psnr_gain_db", "PSNR on all pixels, above copying the last frame", "quality",
        "above 0 up to 8 (16 is the goal)", lambda v: min(v[:4]) > 0),
    Bar("pong.paddle_hit_rate_8", "Own paddle within 3 pixels of its place, 8 steps on", "quality",
        "at least 0.8", lambda v: v >= 0.8),
    Bar("pong.ball_hit_rate_8", "Ball within 4 pixels of its place, 8 steps on, where there is one", "quality",
        "at least 0.5", lambda v: v >= 0.5),
    Bar("pong.reward_macro_f1", "Reward F1 one step ahead, mean of the classes -1 and +1", "quality",
        "at least 0.6", lambda v: v >= 0.6),
    Bar("pong.reward_f1_events", "Rewards that the F1 was measured on", "quality"),
    Bar("breakout.finetune_psnr_changed_db", "Breakout, fine-tuned: PSNR on changed pixels at 1 and 8", "finetune"),
    Bar("breakout.scratch_psnr_changed_db", "Breakout, from scratch: the same", "finetune"),
)
# fmt: on


def write_report(run: str | Path, stores: Mapping[str, str | Path], out: str | Path | None = None) -> tuple[Path, Path]:
    """Write index.html and report.json from whatever stages of a run have finished; what is missing is said.

    Args:
        run: folder with a subfolder for each of `STAGES`.
        stores: game to store of logged play.
        out: where the two files go; `run` by default.

    Returns:
        Their paths.
    """
    from jinja2 import Environment, StrictUndefined

    run, out = Path(run), Path(out or run)
    metrics = {stage: _json(run / folder / "metrics.json") for stage, folder in STAGES.items()}
    collected = {f"collect {game}": _json(Path(store) / "metrics.json") for game, store in stores.items()}
    seconds = {name: m["seconds"] for name, m in (collected | metrics).items() if m.get("seconds") is not None}
    report = figures(metrics, seconds)
    quality, finetuned = metrics["quality"], metrics["finetune"]
    dreams, baselines = run / STAGES["imagine"], _baselines(quality, {"model": ""})
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    html = page.render(
        title="A world model of Pong, and its move to Breakout",
        summary=_summary(report, quality),
        commands=_commands(run, stores),
        heroes=_embedded(dreams, FILMS),
        figures=[_row(bar, report, quality) for bar in BARS],
        horizons=quality.get("horizons", []),
        baselines=baselines,
        psnr_plot=data_uri(psnr_plot(out / "psnr.svg", quality)) if baselines else None,
        strips=_embedded(dreams, STRIPS),
        training=_training(run / STAGES["train"], out),
        transfer=_embedded(run / STAGES["finetune"], TRANSFER),
        transfer_horizons=finetuned.get("horizons", []),
        transfer_baselines=_baselines(finetuned, {"fine-tuned": "finetune_", "from scratch": "scratch_"}),
        cards=[(f"{game}: {store}", card) for game, store in stores.items() if (card := _card(Path(store)))],
        seconds=[(name, f"{s:,.0f} s") for name, s in [*seconds.items(), ("together", sum(seconds.values()))]],
        environment=_environment(),
    )
    paths = out / "index.html", out / "report.json"
    for path, text in zip(paths, (html, json.dumps(report, indent=2) + "\n"), strict=True):
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return paths


def figures(metrics: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The content of report.json: nested by the dots of `BARS`, null where a stage has not run."""
    report: dict[str, Any] = {}
    for bar in BARS:
        game, name = bar.key.split(".")
        report.setdefault(game, {})[name] = metrics.get(bar.stage, {}).get(name)
    return {**report, "seconds": dict(seconds)}


def psnr_plot(path: str | Path, quality: Mapping[str, Any]) -> Path:
    """PSNR over the horizon of the models and of static baselines, all and changed pixels (figures of quality.py)."""
    x, panels = quality["horizons"], {}
    for title, name in (("all pixels", "psnr"), ("changed pixels", "psnr_changed")):
        static = quality[f"{name}_static_db"]
        panels[title] = model_curves(quality, f"{name}_db", f"{name}_interval_db") | {
            "copy the last frame": (x, static["1.0"]),
            "median frame": (x, static["0.0"]),
            "best blend of both": (x, best_static(static)),
        }
    return plot(path, panels, "steps after the last real frame", "PSNR, dB", log="x")


def model_curves(quality: Mapping[str, Any], name: str, intervals: str) -> dict[str, Curve]:
    """The figure `name` over the horizons, with its intervals where there are any: the model's and the baseline's."""
    models = {"model": quality, "baseline checkpoint": quality.get("baseline", {})}
    return {
        label: (quality["horizons"], m[name], m.get(intervals) or [(v, v) for v in m[name]])
        for label, m in models.items()
        if name in m
    }


def training_curves(path: str | Path) -> dict[str, Curve]:
    """Column to (steps, values) of a metrics.csv as Lightning's CSVLogger writes it."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    with open(path, newline="") as f:
        for row in csv.DictReader(f):
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    x, y = curves.setdefault(name, ([], []))
                    x.append(float(row["step"]))
                    y.append(float(value))
    return dict(curves)


def data_uri(path: Path) -> str:
    """The file as a data: URI."""
    return f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def best_static(static: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    """The PSNR of the blend that does best at each horizon, from `psnr*_static_db` of quality.py."""
    return [max((v for v in values if v is not None), default=None) for values in zip(*static.values(), strict=True)]


def _number(value: Any) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _row(bar: Bar, report: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    game, name = bar.key.split(".")
    value = report[game][name]
    lines: list[str] = []
    if isinstance(value, list):
        steps = quality.get("horizons", []) if bar.stage == "quality" else (1, 8)
        around = quality.get(name.replace("_db", "_interval_db")) or [None] * len(value)
        for step, v, pair in zip(steps, value, around, strict=False):
            lines.append(f"t+{step}: {_number(v)}" + (f" [{_number(pair[0])}, {_number(pair[1])}]" if pair else ""))
    elif value is not None:
        lines.append(_number(value))
    complete = value is not None and (not isinstance(value, list) or None not in value)
    return {
        "key": bar.key,
        "name": bar.name,
        "lines": lines,
        "bar": bar.bar,
        "met": bool(bar.met(value)) if bar.met and complete else None,
    }


def _baselines(judged: Mapping[str, Any], models: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Rows of PSNR: of each model, by label and what its figures' names begin with, and of the static baselines."""
    rows: dict[str, Sequence[float | None]] = {}
    for title, name in (("all pixels", "psnr"), ("changed", "psnr_changed")):
        if static := judged.get(f"{name}_static_db"):
            found = {label: judged.get(f"{start}{name}_db") for label, start in models.items()}
            rows |= {f"{title}: {label}": values for label, values in found.items() if values}
            rows[f"{title}: copy the last frame"], rows[f"{title}: median frame"] = static["1.0"], static["0.0"]
            rows[f"{title}: best blend of both"] = best_static(static)
    return [(name, [_number(v) for v in values]) for name, values in rows.items()]


def _embedded(folder: Path, captions: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"uri": data_uri(p), "caption": c} for name, c in captions.items() if (p := folder / name).is_file()]


def _training(folder: Path, out: Path) -> list[dict[str, str]]:
    log_file = folder / "metrics.csv"
    curves = training_curves(log_file) if log_file.is_file() else {}
    losses = {k: v for k, v in curves.items() if "loss" in k and len(v[0]) > 1}
    rollouts = {k: curves[k] for k in sorted(curves, reverse=True) if "psnr" in k and len(curves[k][0]) > 1}
    chosen = "Rollouts on validation episodes, by which the best checkpoint is chosen."
    found = []
    for name, some, y_label, log, caption in (
        ("losses", losses, "loss", "y", "Losses over the optimizer's steps."),
        ("rollouts", rollouts, "PSNR, dB", "", chosen),
    ):
        if some:
            path = plot(out / f"{name}.svg", {"": dict(list(some.items())[:5])}, "optimizer step", y_label, log)
            found.append({"uri": data_uri(path), "caption": caption})
    return found


def _card(store: Path) -> str:
    cards = sorted((store / "sources").glob("*.json"))
    return json.dumps(_json(cards[0]), indent=2) if cards else ""


def _commands(run: Path, stores: Mapping[str, str | Path]) -> dict[str, str]:
    pong, breakout = (stores.get(game, f"data/{game}") for game in ("pong", "breakout"))
    best = run / STAGES["train"] / "best.ckpt"
    return {
        "collect": f"worldmodels collect game=pong steps=30000 store={pong}",
        "collect_breakout": f"worldmodels collect game=breakout steps=20000 store={breakout}",
        "train": f"worldmodels train experiment=pong_tiny out={run / STAGES['train']}",
        "quality": f"worldmodels quality checkpoint={best} store={pong} out={run / STAGES['quality']}",
        "imagine": f"worldmodels imagine checkpoint={best} store={pong} out={run / STAGES['imagine']}",
        "finetune": f"worldmodels finetune checkpoint={best} store={breakout} out={run / STAGES['finetune']}",
        "report": f"worldmodels report run={run}",
    }


def _summary(report: Mapping[str, Any], quality: Mapping[str, Any]) -> str:
    judged = [row["met"] for bar in BARS if (row := _row(bar, report, quality))["met"] is not None]
    if not judged:
        return "No figures have been measured yet."
    return (
        f"{sum(judged)} of {len(judged)} bars are met, on {quality['windows']} rollouts from {quality['episodes']} "
        f"episodes that training never saw."
    )


def _environment() -> str:
    import torch

    python, cores = platform.python_version(), os.cpu_count()
    return f"{cores} CPU cores, {platform.machine()}, Python {python}, torch {torch.__version__}."

"""Move a trained world model, or a MuZero, to another game, beside one trained from scratch for as many steps."""

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.commands._bases import base_of, judge
from worldmodels.commands._moving import begin_move
from worldmodels.commands._results import open_data, write_metrics
from worldmodels.config import command

RUNS = {"finetuned": "finetune", "scratch": "scratch"}
"""Folder of each run to the beginning of its figures' names."""
_FRAMES = ("val/rollout_psnr_changed", "validation rollouts, changed pixels", "PSNR, dB")
_LOSSES = ("val/held_out", "validation, of a MuZero", "negative loss")
_JUDGED = ("psnr_db", "psnr_changed_db", "psnr_static_db", "psnr_changed_static_db")


@command("finetune", base_of)
def main(cfg: DictConfig) -> None:
    """Train twice with the same settings, steps and data; compare on the test split; draw both curves."""
    began, out = time.monotonic(), Path(cfg.out).absolute()
    from worldmodels.data.disk import read_json
    from worldmodels.data.mixing import Mixture
    from worldmodels.evaluation.averages import mean_figures
    from worldmodels.evaluation.report import best_static

    store = open_data(cfg)
    move = begin_move(cfg, store, cfg.budget)
    runs: dict[str, Any] = {}
    for name in RUNS if cfg.scratch else ["finetuned"]:
        print(f"{name} on {' and '.join(store.card.get('games', [store.card['game']]))}:")
        runs[name] = move.run(name, out / name)
    if not all(runs.values()):  # a rank that only helps
        return
    work = {"settings": move.settings, "model": move.model, "runs": runs}
    if (out / "metrics.json").exists() and read_json(out / "metrics.json").get("work") == work:
        print(out)
        return
    figures: dict[str, Any] = {}
    several = isinstance(store, Mixture) and len(store.stores) > 1
    parts = store.parts() if several else {"": store}
    by_store: dict[str, dict[str, Any]] = {path: {} for path in parts}
    for name in runs:
        judged = {path: judge(out / name / "best.ckpt", part, cfg) for path, part in parts.items()}
        for path, part in judged.items():
            by_store[path] |= _named(name, part)
            where = f" on {path}" if several else ""
            print(f"{name}{where}: {_told(part)}")
        figures |= _named(name, mean_figures(list(judged.values())))
    if several:
        figures["stores"] = by_store
    if static := figures.get("psnr_changed_static_db"):
        figures["horizons"] = list(cfg.horizons)
        print(f"best static blend: {best_static(static)} dB")
    _draw(out, list(runs))
    # training is counted by the runs themselves, whatever came between; the rest is what this command did now
    seconds = max(sum(run["seconds"] for run in runs.values()), time.monotonic() - began)
    write_metrics(out, {**figures, "seconds": round(seconds, 1), "work": work})


def _named(run: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The model's own figures under its name; those of the static baselines are the same for both."""
    judged = [k for k in figures if k in _JUDGED or k.startswith("loss")]
    return {k if "static" in k else f"{RUNS[run]}_{k}": figures[k] for k in judged}


def _told(figures: dict[str, Any]) -> str:
    if "loss" not in figures:
        return f"test PSNR on changed pixels at {figures['horizons']}: {figures['psnr_changed_db']} dB"
    return "on the test split " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items() if k.startswith("loss"))


def _draw(out: Path, names: list[str]) -> None:
    from worldmodels.evaluation.pictures import plot
    from worldmodels.evaluation.report import training_curves

    labels = {"finetuned": "fine-tuned", "scratch": "from scratch"}
    logged = {labels[n]: training_curves(out / n / "metrics.csv") for n in names}
    frames = all("val/rollout_psnr_changed" in curves for curves in logged.values())
    column, title, unit = _FRAMES if frames else _LOSSES
    for suffix in ("svg", "png"):
        shown = {title: {label: curves[column] for label, curves in logged.items()}}
        plot(out / f"curves.{suffix}", shown, "optimizer step", unit)


if __name__ == "__main__":
    main()

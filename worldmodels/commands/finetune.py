"""Move a trained world model to another game, beside one trained from scratch for as many steps."""

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.commands._moving import begin_move, judge
from worldmodels.commands._results import open_data, write_metrics
from worldmodels.config import command

RUNS = {"finetuned": "finetune", "scratch": "scratch"}
"""Folder of each run to the beginning of its figures' names."""
_JUDGED = ("psnr_db", "psnr_changed_db", "psnr_static_db", "psnr_changed_static_db")


@command("finetune")
def main(cfg: DictConfig) -> None:
    """Train twice with the same settings, steps and data; compare on the test split; draw both curves."""
    began, out = time.monotonic(), Path(cfg.out).absolute()
    from worldmodels.data.disk import read_json
    from worldmodels.data.mixing import Mixture
    from worldmodels.evaluation.averages import mean_figures
    from worldmodels.evaluation.report import best_static

    store = open_data(cfg)
    move = begin_move(cfg, store)
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
    figures: dict[str, Any] = {"horizons": list(cfg.horizons)}
    several = isinstance(store, Mixture) and len(store.stores) > 1
    parts = store.parts() if several else {"": store}
    by_store: dict[str, dict[str, Any]] = {path: {} for path in parts}
    for name in runs:
        judged = {path: judge(out / name / "best.ckpt", part, cfg) for path, part in parts.items()}
        for path, part in judged.items():
            by_store[path] |= _named(name, part)
            where = f" on {path}" if several else ""
            print(f"{name}{where}: test PSNR on changed pixels at {cfg.horizons}: {part['psnr_changed_db']} dB")
        mean = mean_figures(list(judged.values()))
        figures |= _named(name, {k: mean[k] for k in _JUDGED})
    if several:
        figures["stores"] = by_store
    print(f"best static blend: {best_static(figures['psnr_changed_static_db'])} dB")
    _draw(out, list(runs))
    # training is counted by the runs themselves, whatever came between; the rest is what this command did now
    seconds = max(sum(run["seconds"] for run in runs.values()), time.monotonic() - began)
    write_metrics(out, {**figures, "seconds": round(seconds, 1), "work": work})


def _named(run: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The model's own figures under its name; those of the static baselines are the same for both."""
    return {k if "static" in k else f"{RUNS[run]}_{k}": figures[k] for k in _JUDGED}


def _draw(out: Path, names: list[str]) -> None:
    from worldmodels.evaluation.pictures import plot
    from worldmodels.evaluation.report import training_curves

    labels = {"finetuned": "fine-tuned", "scratch": "from scratch"}
    curves = {labels[n]: training_curves(out / n / "metrics.csv")["val/rollout_psnr_changed"] for n in names}
    for suffix in ("svg", "png"):
        plot(out / f"curves.{suffix}", {"validation rollouts, changed pixels": curves}, "optimizer step", "PSNR, dB")


if __name__ == "__main__":
    main()

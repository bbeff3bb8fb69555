"""Move a trained world model to another game, beside one trained from scratch for as many steps."""

import json
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from worldmodels.config import command, load_learner, plain


@command("finetune")
def main(cfg: DictConfig) -> None:
    """Train twice with the same settings, steps and data; compare on the test split; draw both curves."""
    began, out = time.monotonic(), Path(cfg.out).absolute()
    from worldmodels.data.card import check_compatible
    from worldmodels.data.store import Store

    store = Store.open(cfg.store)
    learner = load_learner(cfg.checkpoint)
    what = f"the checkpoint {cfg.checkpoint}"
    check_compatible(store.card, learner.hparams["card"], what, same_game=False)
    model = dict(learner.hparams["model"])
    names = ["finetuned", "scratch"] if cfg.scratch else ["finetuned"]
    metrics, done = _metrics(out), {}
    for name in names:
        print(f"{name} on {store.card['game']}:")
        done[name] = _train(cfg, model, out / name, learner.model.state_dict() if name == "finetuned" else None)
    work = {"settings": plain(cfg), "model": model, "runs": done}
    if metrics.get("work") == json.loads(json.dumps(work)):
        print(out)
        return
    figures: dict[str, Any] = {"horizons": list(cfg.horizons)}
    for name in names:
        short = {"finetuned": "finetune"}.get(name, name)
        figures[f"{short}_psnr_changed_db"] = _judge(out / name / "best.ckpt", store, cfg)
        print(f"{name}: test PSNR on changed pixels at {cfg.horizons}: {figures[f'{short}_psnr_changed_db']} dB")
    _draw(out, names)
    # training is counted by the runs themselves, whatever came between; the rest is what this command did now
    trained = sum(run["seconds"] for run in done.values())
    figures["seconds"] = round(max(trained, time.monotonic() - began), 1)
    (out / "metrics.json").write_text(json.dumps(figures | {"work": work}, indent=2) + "\n", encoding="utf-8")
    print(out)


def _metrics(out: Path) -> dict[str, Any]:
    path = out / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _train(cfg: DictConfig, model: dict[str, Any], out: Path, weights: Any) -> dict[str, Any]:
    from worldmodels.learners.fit import fit

    settings = plain(
        OmegaConf.merge(cfg, {"out": str(out)})
    )  # its paths are relative to `out`, here one of two folders
    return fit({**settings, "model": model}, out, weights)


def _judge(checkpoint: Path, store: Any, cfg: DictConfig) -> list[float]:
    from worldmodels.evaluation.quality import rollout_quality

    model = load_learner(checkpoint).model
    options = {"windows": cfg.windows, "horizons": list(cfg.horizons), "burn_in": cfg.burn_in}
    figures = rollout_quality(model, store, reward_rows=0, progress=False, **options)
    return figures["psnr_changed_db"]


def _draw(out: Path, names: list[str]) -> None:
    from worldmodels.evaluation.pictures import plot
    from worldmodels.evaluation.report import training_curves

    curves = {name: training_curves(out / name / "metrics.csv")["val/rollout_psnr_changed"] for name in names}
    labels = {"finetuned": "fine-tuned", "scratch": "from scratch"}
    for suffix in ("svg", "png"):
        title = "validation rollouts, changed pixels"
        plot(out / f"curves.{suffix}", {title: {labels[n]: c for n, c in curves.items()}}, "optimizer step", "PSNR, dB")


if __name__ == "__main__":
    main()

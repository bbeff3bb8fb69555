"""Measure a checkpoint on held-out play: error over horizon, objects, rewards, beside static baselines."""

import time
from pathlib import Path

from omegaconf import DictConfig

from worldmodels.commands._results import finished, load_model, settings_of, write_metrics
from worldmodels.config import command, plain


@command("quality")
def main(cfg: DictConfig) -> None:
    """Write metrics.json and psnr.svg to `cfg.out` and print the figures."""
    from worldmodels.data.store import Store
    from worldmodels.evaluation.quality import rollout_quality, summary
    from worldmodels.evaluation.report import psnr_plot

    began, out = time.monotonic(), Path(cfg.out).absolute()
    store = Store.open(cfg.store)
    settings = settings_of(cfg, store)
    if finished(out, settings):
        return
    model, device = load_model(cfg, store)
    out.mkdir(parents=True, exist_ok=True)
    names = ("split", "windows", "horizons", "burn_in", "reward_rows", "batch_size", "seed")
    figures = rollout_quality(model, store, device=device, **{k: plain(cfg)[k] for k in names})
    psnr_plot(out / "psnr.svg", figures)
    write_metrics(out, {**figures, "seconds": round(time.monotonic() - began, 1), "settings": settings})
    print("\n".join(summary(figures)))
    print(out)


if __name__ == "__main__":
    main()

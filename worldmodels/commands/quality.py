"""Measure a checkpoint on held-out play: error over horizon, objects, rewards, beside static baselines."""

import time
from pathlib import Path

from omegaconf import DictConfig

from worldmodels.commands._results import prepare, write_metrics
from worldmodels.config import command, plain


@command("quality")
def main(cfg: DictConfig) -> None:
    """Write metrics.json and psnr.svg to `cfg.out` and print the figures."""
    from worldmodels.data.disk import make_folder
    from worldmodels.evaluation.quality import rollout_quality, summary
    from worldmodels.evaluation.report import psnr_plot

    began, out = time.monotonic(), Path(cfg.out).absolute()
    if (prepared := prepare(cfg, out)) is None:
        return
    store, settings, model, device = prepared
    make_folder(out)
    names = ("split", "windows", "horizons", "burn_in", "reward_rows", "batch_size", "seed")
    figures = rollout_quality(model, store, device=device, **{k: plain(cfg)[k] for k in names})
    psnr_plot(out / "psnr.svg", figures)
    print("\n".join(summary(figures)))
    write_metrics(out, {**figures, "seconds": round(time.monotonic() - began, 1), "settings": settings})


if __name__ == "__main__":
    main()

"""Measure a checkpoint on held-out play: error over horizon, objects, rewards, beside static baselines."""

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.commands._results import prepare, write_metrics
from worldmodels.config import command, plain


@command("quality")
def main(cfg: DictConfig) -> None:
    """Write metrics.json and psnr.svg to `cfg.out` and print the figures; of several stores each is judged alone."""
    from worldmodels.data.disk import make_folder
    from worldmodels.data.mixing import Mixture
    from worldmodels.evaluation.averages import mean_figures
    from worldmodels.evaluation.quality import rollout_quality, summary
    from worldmodels.evaluation.report import psnr_plot

    began, out = time.monotonic(), Path(cfg.out).absolute()
    if (prepared := prepare(cfg, out)) is None:
        return
    store, settings, model, device = prepared
    make_folder(out)
    names = ("split", "windows", "horizons", "burn_in", "reward_rows", "batch_size", "seed")
    options: dict[str, Any] = {"device": device, **{k: plain(cfg)[k] for k in names}}
    if not isinstance(store, Mixture) or len(store.stores) == 1:
        figures = rollout_quality(model, store, **options)
        psnr_plot(out / "psnr.svg", figures)
        print("\n".join(summary(figures)))
    else:
        by_store = {path: rollout_quality(model, part, **options) for path, part in store.parts().items()}
        for k, (path, judged) in enumerate(by_store.items(), 1):
            psnr_plot(out / f"psnr_{k}.svg", judged)
            print("\n".join([f"{path} ({judged['game']})", *summary(judged), ""]))
        figures = {"mean": mean_figures(list(by_store.values())), "stores": by_store}
        print("\n".join([f"mean over {len(by_store)} stores, each of which counts alike", *summary(figures["mean"])]))
    write_metrics(out, {**figures, "seconds": round(time.monotonic() - began, 1), "settings": settings})


if __name__ == "__main__":
    main()

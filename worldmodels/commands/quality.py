"""Measure a checkpoint on held-out play: frames, objects, rewards, other actions, spread, beside baselines."""

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.commands._results import load_fitting, prepare, write_metrics
from worldmodels.config import command, plain


@command("quality")
def main(cfg: DictConfig) -> None:
    """Write metrics.json, plots, strips and films to `cfg.out` and print the figures; of a list each store is alone."""
    from worldmodels.data.disk import make_folder
    from worldmodels.data.mixing import Mixture
    from worldmodels.evaluation.averages import mean_figures
    from worldmodels.evaluation.quality import summary

    began, out = time.monotonic(), Path(cfg.out).absolute()
    if (prepared := prepare(cfg, out)) is None:
        return
    store, settings, model, device = prepared
    models = {"model": model, "baseline": None}
    if cfg.baseline:
        models["baseline"] = load_fitting(cfg.baseline, store).model.to(device)
    make_folder(out)
    given = plain(cfg) | {"device": device}
    if not isinstance(store, Mixture) or len(store.stores) == 1:
        figures = _judge(given, store, out, "", **models)
        print("\n".join(summary(figures)))
    else:
        by_store = {}
        for k, (path, part) in enumerate(store.parts().items(), 1):
            by_store[path] = _judge(given, part, out, f"_{k}", **models)
            print("\n".join([f"{path} ({by_store[path]['game']})", *summary(by_store[path]), ""]))
        figures = {"mean": mean_figures(list(by_store.values())), "stores": by_store}
        if len(games := store.card["games"]) > 1:
            of = {game: [part for part in by_store.values() if part["game"] == game] for game in games}
            figures["games"] = {game: mean_figures(parts) for game, parts in of.items()}
            for game, parts in of.items():
                if len(parts) > 1:
                    told = [f"mean over the {len(parts)} stores of {game}", *summary(figures["games"][game]), ""]
                    print("\n".join(told))
        print("\n".join([f"mean over {len(by_store)} stores, each of which counts alike", *summary(figures["mean"])]))
    write_metrics(out, {**figures, "seconds": round(time.monotonic() - began, 1), "settings": settings})


def _judge(given: dict[str, Any], store: Any, out: Path, tail: str, model: Any, baseline: Any) -> dict[str, Any]:
    """All figures of one store; its pictures are written to `out`, `tail` at the end of their names."""
    from worldmodels.evaluation.curves import quality_plots
    from worldmodels.evaluation.dreams import write_pictures
    from worldmodels.evaluation.other_actions import other_actions
    from worldmodels.evaluation.quality import example_films, rollout_quality
    from worldmodels.evaluation.spread import sample_spread

    shared = {k: given[k] for k in ("split", "burn_in", "batch_size", "seed", "device")}
    horizons = {"horizons": given["horizons"]}
    own = {k: given[k] for k in ("windows", "reward_rows", "lpips", "fvd")}
    figures = rollout_quality(model, store, baseline=baseline, **shared, **horizons, **own)
    write_pictures(out, f"logged{tail}", *example_films(model, store, **shared, **horizons))
    if given["other_actions"]["windows"]:
        figures["other_actions"], films = other_actions(model, store, **given["other_actions"], **shared, **horizons)
        if films:
            write_pictures(out, f"other_actions{tail}", films["imagined"], films.get("real"))
    if given["spread"]["windows"]:
        steps = max(given["horizons"])
        figures["sample_spread"] = sample_spread(model, store, **given["spread"], **shared, steps=steps)
    quality_plots(out, figures, tail)
    return figures


if __name__ == "__main__":
    main()

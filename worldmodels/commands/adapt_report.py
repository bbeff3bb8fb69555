"""Few-shot curves: a model moved to another game with more and less of it, beside training from scratch."""

import signal
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.commands._bases import is_muzero, judge
from worldmodels.commands._moving import Move, begin_move
from worldmodels.commands._results import finished, open_data, settings_of, write_metrics
from worldmodels.config import command, plain

RUNS, CURVE = ("finetuned", "scratch"), "curve.json"


@command("adapt-report")
def main(cfg: DictConfig) -> None:
    """Train and judge what is missing; every run has a folder of its own, which is gone on with."""
    out = Path(cfg.out).absolute()
    from worldmodels.data.few_shot import few_shot
    from worldmodels.data.mixing import check_fits, open_stores
    from worldmodels.data.transforms import Transform
    from worldmodels.evaluation.adaptation import compare, write_report
    from worldmodels.learners.run_folder import refuse_other_labels
    from worldmodels.types import UserError

    if is_muzero(cfg.checkpoint):
        raise UserError(
            f"{cfg.checkpoint} holds a MuZero, which draws no frames to be judged by; move it with `worldmodels "
            "finetune`, and score it in the real game with `worldmodels evaluate`"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    if not cfg.callbacks.steps:
        raise UserError("callbacks.steps=null would leave no points of a curve to judge; leave it out")
    store = open_data(cfg)
    old = {}
    if cfg.old:
        opened = open_stores(plain(cfg.old), Transform(**plain(cfg.data.transform)))
        check_fits(opened.card, store.card, f"{store.path}, which old={opened.path} is judged beside,", same_game=False)
        old = _parts(opened)
    budgets, skipped = {}, {}
    for budget in cfg.budgets:
        try:
            split = few_shot(store, budget, cfg.data.validation_share, cfg.data.seed, cfg.data.validation.length)
            budgets[budget] = {name: len(split[name]) for name in ("train", "validation")}
        except UserError as error:
            skipped[budget] = str(error)
            print(f"left out: {error}")
    if not budgets:
        raise UserError(skipped[min(skipped)])
    moves = {budget: begin_move(cfg, store, budget) for budget in budgets}
    if cfg.resume != "never":  # before any run is gone on with
        for budget, move in moves.items():
            for name in RUNS:
                folder = out / str(budget) / name
                _kept(folder, _how(cfg, store))
                refuse_other_labels(folder, move.asked(name, folder, _changes(cfg, name, budget)))
    settings = settings_of(cfg, store) | {"old_uuids": [part.uuid for part in old.values()]}
    if finished(out, settings):
        return
    begun = {"new": _judged(cfg.checkpoint, _parts(store), cfg), "old": _judged(cfg.checkpoint, old, cfg)}
    found: dict[str, Any] = {}
    for budget, episodes in budgets.items():
        runs = {name: _curve(moves[budget], name, budget, out, store) for name in RUNS}
        best = out / str(budget) / "finetuned" / "best.ckpt"
        kept = _judged(best, old, cfg)
        found[str(budget)] = {"episodes": episodes, **compare(runs, begun, kept, cfg.steps)}
    figures = {"horizons": list(cfg.horizons), "method": cfg.method, "steps": cfg.steps, "before": begun}
    figures |= {"budgets": found, "left_out": {str(budget): why for budget, why in skipped.items()}}
    write_report(out, figures)
    write_metrics(out, {**figures, "settings": settings})


def _parts(store: Any) -> dict[str, Any]:
    from worldmodels.data.mixing import Mixture

    return store.parts() if isinstance(store, Mixture) else {str(store.path): store}


def _judged(checkpoint: str | Path, parts: dict[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """Means over stores; nothing of none."""
    from worldmodels.evaluation.averages import mean_figures

    return mean_figures([judge(checkpoint, part, cfg) for part in parts.values()]) if parts else {}


def _how(cfg: DictConfig, store: Any) -> dict[str, Any]:
    """What decides the figures of a checkpoint, beside itself."""
    return {name: plain(cfg[name]) for name in ("windows", "horizons", "burn_in")} | {"store_uuid": store.uuid}


def _kept(folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """The points that a run in `folder` was judged at; their checkpoints are gone.

    Raises:
        UserError: they were judged otherwise.
    """
    from worldmodels.data.disk import read_json
    from worldmodels.types import UserError

    kept = read_json(folder / CURVE) if (folder / CURVE).exists() else {"how": how, "points": {}}
    if kept.get("how") != how:
        differ = [f"{name}={value}" for name, value in (kept.get("how") or {}).items() if value != how[name]]
        raise UserError(
            f"{folder} was judged with {' and '.join(differ) or 'other settings'}, and the checkpoints that were are "
            "gone; give the same, resume=never to begin again, or another out=DIR"
        )
    return kept["points"]


def _changes(cfg: DictConfig, name: str, budget: int) -> dict[str, Any]:
    """The settings of a run that are not those of all."""
    every = -(-cfg.steps // cfg.points)
    trainer = {"max_steps": cfg.steps * (cfg.scratch_times if name == "scratch" else 1), "val_check_interval": every}
    return {"budget": budget, "trainer": trainer, "callbacks": {"steps": {"every": every}}}


def _curve(move: Move, name: str, budget: int, out: Path, store: Any) -> dict[str, Any]:
    """Train a run, and judge it after every so many steps: `points` by step, and `seconds` a step."""
    from worldmodels.data.disk import write_json
    from worldmodels.evaluation.report import training_curves

    cfg, folder = move.cfg, out / str(budget) / name
    changes = _changes(cfg, name, budget)
    every = changes["trainer"]["val_check_interval"]
    print(f"{name} with {budget:,} transitions:")
    done = move.run(name, folder, changes)
    scores = training_curves(folder / "metrics.csv")["val/rollout_psnr_changed"]
    chosen_by = {round((step + 1) / every) * every: score for step, score in zip(*scores, strict=True)}  # from 0 there
    how = _how(cfg, store)
    points = _kept(folder, how)
    for path in sorted((folder / "steps").glob("*.ckpt")):
        if (step := int(path.stem)) in chosen_by:
            points[str(step)] = _judged(path, _parts(store), cfg) | {"validation": chosen_by[step]}
            write_json(folder / CURVE, {"how": how, "points": points})
        path.unlink()
    return {"points": points, "seconds_a_step": done["seconds"] / done["steps"], "trained": done["trained_parameters"]}


if __name__ == "__main__":
    main()

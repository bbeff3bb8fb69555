"""The folder of a training run: whether it is the run that is asked for, where it goes on, and its log."""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from worldmodels.config import dotted
from worldmodels.data.disk import read_json, remove
from worldmodels.learners.building import SYMMETRIES
from worldmodels.types import UserError

MAY_DIFFER = ("out", "resume", "compile", "logger", "trainer.max_steps", "learner.max_steps", "callbacks")
"""Settings that a resumed run may change without a word."""
KEPT = ("store_uuid", "replay_uuid", "learner.adapt.", "data.replay.")
"""Beginnings of settings with which alone a run that moves a model goes on,"""
DECIDE = (*KEPT, "rows", "seed", "data.", "learner.", "trainer.")
"""those that decide what it has learned when it has ended,"""
HARMLESS = (*MAY_DIFFER, "data.store", "data.replay.store", "data.workers", "data.prefetch")
HARMLESS += ("trainer.accelerator", "trainer.strategy", "trainer.log_every_n_steps")
"""and what of them decides nothing: stores are known by what is in them, wherever they lie."""


def refuse_another(out: Path, model: Mapping[str, Any], settings: Mapping[str, Any], weighed: bool) -> None:
    """Refuse to go on with a run that was begun as another one.

    Args:
        out: folder of the run.
        model: settings of the model that it has trained so far.
        settings: what is asked for now.
        weighed: whether the model is to begin with given weights.

    Raises:
        UserError: another model, learner, method or budget, or other weights to begin with.
    """
    asked = settings["learner"].get("_target_")
    if (begun := _begun_with(out, "learner._target_")) not in (None, asked):
        raise UserError(
            f"{out} holds a run of {begun} and not of {asked}; give another out=DIR, or resume=never to begin again"
        )
    was = _trained(_begun_with(out, "learner.adapt"), _begun_with(out, "data.budget"))
    now = _trained(settings["learner"].get("adapt"), settings["data"].get("budget"))
    if was != now:
        raise UserError(
            f"{out} holds a run with {was} and not with {now}; give another out=DIR, or resume=never to begin again"
        )
    source = _begun_with(out, "checkpoint_sha256")
    if weighed and source not in (None, settings.get("checkpoint_sha256")):
        raise UserError(
            f"{out} holds a run that began with other weights than checkpoint={settings['checkpoint']} has now; "
            "give another out=DIR, or resume=never to begin again"
        )
    if "checkpoint_sha256" in settings:
        refuse_other_labels(out, settings)
    asked = settings["model"]
    same_model(out, model, asked | {name: model.get(name) for name in SYMMETRIES if asked.get(name) == "game"})


def refuse_other_labels(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to judge a run that moved a model by settings other than those that it was trained with.

    Raises:
        UserError: naming them, as the run has them and as they are asked for.
    """
    old, new = _begun(out), dotted(settings)
    decide = DECIDE if ended(out, settings["trainer"]["max_steps"]) else KEPT
    differ = [k for k, v in old.items() if k.startswith(decide) and not isinstance(v, Mapping) and v != new.get(k)]
    names = [_spoken(k, old, new) for k in differ if not k.startswith(HARMLESS)]
    if not names:
        return
    if "store_uuid" in differ and "rows" in names:
        names.remove("rows")
    was, now = (", ".join(f"{k}={given.get(k)}" for k in dict.fromkeys(names)) for given in (old, new))
    raise UserError(
        f"{out} holds a run with {was} and not with {now}; give another out=DIR, or resume=never to begin again"
    )


def _spoken(setting: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The shortest name of a setting that was changed: that by which it was given, as others follow it."""
    path = {"store_uuid": "store", "replay_uuid": "replay.store"}.get(setting, setting)
    if path != setting:
        return setting if old.get(path) == new.get(path) else path
    last, change = setting.rpartition(".")[2], (old[setting], new.get(setting))
    return min((k for k in old if k.rpartition(".")[2] == last and (old[k], new.get(k)) == change), key=len)


def ended(out: Path, max_steps: int) -> dict[str, Any] | None:
    """The figures of a run that has come to its end, at so many steps or early; None of any other."""
    done = read_json(out / "metrics.json") if (out / "metrics.json").exists() else {}
    whole = done.get("steps", 0) >= max_steps or done.get("stopped_early")
    return done if whole and (out / "best.ckpt").exists() else None


def same_model(out: Path, begun: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of another model.

    Raises:
        UserError: the settings of the model that it has trained differ from those that are asked for.
    """
    before = {"games": None, "symmetry": "none", "turned": "none"}  # which checkpoints of earlier versions lack
    if {**before, **begun} != {**before, **asked}:
        raise UserError(f"{out} holds a run of another model; give another out=DIR, or resume=never to begin again")


def _trained(adapt: Any, budget: int | None) -> str:
    """What of a model is trained, as far as it decides the names and shapes of the weights, and on how much play."""
    method = (adapt or {}).get("method", "full")
    rank = f", lora.rank={adapt['rank']}" if method == "lora" else ""
    return f"method={method}{rank}" + (f", budget={budget}" if budget is not None else "")


def _begun_with(out: Path, setting: str) -> Any:
    """What the run in `out` was begun with, None where it is not told."""
    return _begun(out).get(setting)


def _begun(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`, as `dotted`; none where they are not told."""
    config = out / "config.yaml"
    return dotted(OmegaConf.load(config)) if config.exists() else {}


def warn_of_differences(out: Path, settings: Mapping[str, Any], changing: Sequence[str]) -> None:
    """Say which settings of the run are not those that are asked for now, but for those of `MAY_DIFFER`."""
    if not (old := _begun(out)):
        return
    new = dotted(settings)
    may = (*MAY_DIFFER, *changing)
    keys = [k for k in sorted(old | new) if not isinstance((old | new)[k], Mapping) and not k.startswith(may)]
    differ = [f"{k} was {old.get(k)} and is {new.get(k)}" for k in keys if old.get(k) != new.get(k)]
    if differ:
        print(
            f"warning: settings differ from those that {out} was begun with: {'; '.join(differ)}. "
            "The optimiser goes on with the stored ones; resume=never begins again with the new ones.",
            file=sys.stderr,
        )


def resume_point(out: Path) -> Path | None:
    """The newest of last.ckpt and what Lightning wrote for a SLURM requeue; the latter is done with after this."""
    requeued = list(out.glob("hpc_ckpt_*.ckpt"))
    found = [path for path in [out / "last.ckpt", *requeued] if path.exists()]
    if rank() != 0:  # rank 0 tidies up; the others load what it leaves, once training has begun
        return out / "last.ckpt" if found else None
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None and newest.name != "last.ckpt":
        newest = newest.replace(out / "last.ckpt")
    for path in requeued:
        path.unlink(missing_ok=True)
    return newest


def clear(out: Path) -> None:
    """Begin again: drop the earlier run, now that nothing is left that could refuse the new one."""
    names = ("last.ckpt", "best.ckpt", "metrics.json", "wandb_id", "hpc_ckpt_*.ckpt", "logs/version_*/metrics.csv")
    names += ("steps/*.ckpt", "curve.json")  # of a few-shot curve: its points would be judged as the new run's
    for path in [path for name in names for path in out.glob(name)]:
        path.unlink()
    remove(out / "adapter")  # of another method, it would be taken for what the new run left


def merge_logs(out: Path) -> None:
    """Put the CSV of each start together: what came after the step where a later start took over was lost."""
    rows: list[dict[str, str]] = []
    for path in sorted(out.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.partition("_")[2])):
        with path.open(newline="") as file:
            more = list(csv.DictReader(file))
        first = min((int(row["step"]) for row in more), default=0)
        rows = [row for row in rows if int(row["step"]) < first] + more
    names = dict.fromkeys(["step", *(name for row in rows for name in row if name != "epoch")])
    with (out / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def rank() -> int:
    """Of this process among those that train together."""
    return getattr(rank_zero_only, "rank", 0)

"""One training run in one folder: begun, resumed, or found to be finished."""

import hashlib
import io
import logging
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from worldmodels import hardware
from worldmodels.callbacks import AtomicCheckpointIO, Progress
from worldmodels.config import build
from worldmodels.data.card import check_compatible
from worldmodels.data.disk import make_folder, write_json
from worldmodels.learners.base import Learner, Score
from worldmodels.learners.building import build_learner, check_frames, check_learner, legal_actions, told_games
from worldmodels.learners.run_folder import (
    clear,
    ended,
    merge_logs,
    rank,
    refuse_another,
    resume_point,
    same_model,
    warn_of_differences,
)
from worldmodels.portable.checkpoints import read_checkpoint
from worldmodels.types import UserError


def fit(
    settings: Mapping[str, Any],
    out: str | Path,
    weights: Mapping[str, Any] | None = None,
    changing: Sequence[str] = (),
) -> dict[str, Any]:
    """Train what `settings` describe until `trainer.max_steps`, in the folder `out`.

    The folder holds config.yaml, last.ckpt, best.ckpt (the best score in validation), logs/, metrics.csv,
    metrics.json. A run that was cut short goes on, bit for bit on a CPU; a finished one is left as it is.

    Args:
        settings: plain data: model (its sizes resolved), data, learner, trainer, callbacks, logger, seed, resume.
        out: folder of the run.
        weights: state_dict that the model begins with; by default it begins at random.
        changing: settings that a resumed run changes without a word, beside those of `MAY_DIFFER`.

    Returns:
        The figures of metrics.json.

    Raises:
        UserError: a store or checkpoint that does not fit, or an accelerator that is not there.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, with the state saved.
    """
    out = Path(out).absolute()
    make_folder(out)
    if settings["resume"] not in ("auto", "never"):
        raise UserError(f"resume={settings['resume']} is unknown; choose auto or never")
    check_learner(settings)
    max_steps = settings["trainer"]["max_steps"]
    checkpoint = resume_point(out) if settings["resume"] == "auto" else None
    stored = read_checkpoint(checkpoint)["hyper_parameters"] if checkpoint is not None and rank() == 0 else None
    known = ((stored or {}).get("model", {}).get("games") or {}).get("actions")
    settings = {**settings, "model": told_games(settings["model"], known)}
    if stored is not None:
        refuse_another(out, stored["model"], settings, weighed=weights is not None)
        if done := ended(out, max_steps):
            warn_of_differences(out, settings, changing)
            print(f"finished before, at step {done['steps']}; resume=never begins again")
            return done

    quiet()
    hardware.tune_allocator()
    device = hardware.accelerator(settings["trainer"]["accelerator"])
    L.seed_everything(settings["seed"], workers=True, verbose=False)
    data = build(settings["data"])
    if "actions" not in settings["learner"]:
        settings["model"] = told_games(settings["model"], legal_actions(data.store))
    learner = build_learner(settings, data)
    if stored is not None:
        same_model(out, stored["model"], learner.hparams["model"])
    check_frames(learner.model, data.card)
    if weights is not None:
        learner.begin(weights)
    learner.prepare(data, resumed=weights is not None or checkpoint is not None)
    if stored is not None:
        check_compatible(data.card, stored["card"], f"the run {out}")
        warn_of_differences(out, settings, changing)
    elif settings["resume"] == "never" and rank() == 0:
        clear(out)
    trainer = _trainer(settings, learner.score, out, device)
    if trainer.is_global_zero:
        OmegaConf.save(OmegaConf.create(dict(settings)), out / "config.yaml")
        print(f"{'resuming from ' + str(checkpoint) if checkpoint else 'training'} until step {max_steps} in {out}")
    # what is saved does not tell of it: networks are compiled in place
    hardware.compile_in_place(learner.networks(), settings["compile"], device)
    try:
        trainer.fit(learner, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to Ctrl-C and SIGTERM, once the callbacks have saved
        raise KeyboardInterrupt from stop
    # killed in the last validation, which resuming does not make up for
    if learner.score.key not in trainer.callback_metrics:
        trainer.validate(learner, data, verbose=False)
        _choose_last(trainer, learner.score, out)
    digests = _digests(trainer, learner)
    return _write_metrics(trainer, learner, out, digests) if trainer.is_global_zero else {}


def _digests(trainer: L.Trainer, learner: Any) -> list[str]:
    """SHA-256 of the final weights on each rank, which must be the same."""
    digest = hashlib.sha256()
    for value in learner.model.state_dict().values():
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    everywhere = [digest.hexdigest()] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(everywhere, digest.hexdigest())
    if len(set(everywhere)) > 1:
        raise RuntimeError(f"the ranks ended with different weights: {everywhere}")
    return everywhere


def _choose_last(trainer: L.Trainer, measured: Score, out: Path) -> None:
    checkpoint: Any = trainer.checkpoint_callback
    score = trainer.callback_metrics[measured.key]
    best = checkpoint.best_model_score
    if best is None or score > best or not (out / "best.ckpt").exists():
        checkpoint.best_model_score = score
        if trainer.is_global_zero:
            shutil.copyfile(out / "last.ckpt", out / "best.ckpt.tmp")
            os.replace(out / "best.ckpt.tmp", out / "best.ckpt")


def _trainer(settings: Mapping[str, Any], score: Score, out: Path, device: str) -> L.Trainer:
    options = dict(settings["trainer"]) | {"accelerator": device}
    options["precision"] = hardware.precision(options["precision"], device)
    # A run shorter than the interval is validated once, at its end, so that there is always a best.ckpt.
    batches = options["max_steps"] * options["accumulate_grad_batches"]
    options["val_check_interval"] = min(options["val_check_interval"], batches)
    extra = {
        "worldmodels.callbacks.EMA": {"device": device},
        "lightning.pytorch.callbacks.ModelCheckpoint": {"monitor": score.key, "mode": "max"},
        "lightning.pytorch.callbacks.EarlyStopping": {"monitor": score.key, "mode": "max"},
        "worldmodels.callbacks.Progress": {"score": score},
    }
    callbacks = [build(c, **extra.get(c["_target_"], {})) for c in settings["callbacks"].values() if c]
    loggers = [_logger(c, out) for c in settings["logger"].values() if c]
    return trainer_of(
        **options,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        default_root_dir=out,  # where Lightning saves when SLURM asks it to, the same after each requeue
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
    )


def trainer_of(**settings: Any) -> L.Trainer:
    """Lightning's trainer with these settings.

    Raises:
        UserError: Lightning refuses them.
    """
    try:
        return L.Trainer(**settings)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"Lightning refuses the settings of trainer: {error}") from error


def _logger(cfg: Mapping[str, Any], out: Path) -> Any:
    """A logger; W&B takes this run's id, the same after each resume, and is offline unless WANDB_MODE=online."""
    if not cfg["_target_"].endswith("WandbLogger") or rank() != 0:
        return build(cfg)
    os.environ.setdefault("WANDB_SILENT", "true")
    file = out / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8])
    offline = os.environ.get("WANDB_MODE", "offline") != "online"
    logger = build(cfg, id=file.read_text(), offline=offline)
    # W&B warns about an argument that Lightning gives it
    with redirect_stderr(io.StringIO() if offline else sys.stderr):
        _ = logger.experiment
    return logger


def _write_metrics(trainer: L.Trainer, learner: Learner, out: Path, digests: list[str]) -> dict[str, Any]:
    progress = [c for c in trainer.callbacks if isinstance(c, Progress)]  # pyrefly: ignore
    scores = {k.removeprefix("val/"): v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    best = getattr(trainer.checkpoint_callback, "best_model_score", None)
    figures = {
        "steps": trainer.global_step,
        "seconds": round(sum(p.spent[0] for p in progress), 1),
        "cpu_seconds": round(sum(p.spent[1] for p in progress), 1),
        learner.score.figure: None if best is None else best.item(),
        "final": scores,
        "parameters": sum(p.numel() for p in learner.parameters()),
        "trained_parameters": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "stopped_early": any(c.wait_count >= c.patience for c in trainer.early_stopping_callbacks),
        "precision": str(trainer.precision),
        "weights_sha256_by_rank": digests,
        "environment": hardware.summary(),
    }
    merge_logs(out)
    write_json(out / "metrics.json", figures)
    if best is not None:
        words, unit = learner.score.words, learner.score.unit
        print(f"best {words} {best.item():.2f}{unit}, after {figures['seconds']:.0f} s of training")
    return figures


def quiet() -> None:
    """Leave Lightning's warnings that do not concern this program out, and its advertisements."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    known = "does not have many workers|find any LR|save_hyperparameters|LeafSpec|sync_dist|exists and"
    known += "|infer the batch indices|called before the ``update``"
    warnings.filterwarnings("ignore", f".*({known}).*")

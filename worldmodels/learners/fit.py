"""One training run in one folder: begun, resumed, or found to be finished."""

import csv
import hashlib
import io
import logging
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from worldmodels import hardware
from worldmodels.callbacks import AtomicCheckpointIO, Progress
from worldmodels.config import build, dotted, read_checkpoint
from worldmodels.data.card import check_compatible
from worldmodels.data.disk import make_folder, read_json, write_json
from worldmodels.data.mixing import logged_actions
from worldmodels.evaluation.scores import game_facts
from worldmodels.learners.base import Learner, Score
from worldmodels.ops.groups import GROUPS
from worldmodels.types import UserError

MAY_DIFFER = ("out", "resume", "compile", "logger", "trainer.max_steps", "learner.max_steps", "callbacks")
"""Settings that a resumed run may change without a word."""
SYMMETRIES = ("symmetry", "turned")
"""Settings of a model that may be `game`."""


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
    checkpoint = _resume_point(out) if settings["resume"] == "auto" else None
    stored = read_checkpoint(checkpoint)["hyper_parameters"] if checkpoint is not None and _rank() == 0 else None
    known = ((stored or {}).get("model", {}).get("games") or {}).get("actions")
    settings = {**settings, "model": told_games(settings["model"], known)}
    if stored is not None:
        begun, asked = stored["model"], settings["model"]
        _same_model(out, begun, asked | {name: begun.get(name) for name in SYMMETRIES if asked.get(name) == "game"})
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
        if weights is not None and source not in (None, settings.get("checkpoint_sha256")):
            raise UserError(
                f"{out} holds a run that began with other weights than checkpoint={settings['checkpoint']} has now; "
                "give another out=DIR, or resume=never to begin again"
            )
        done = read_json(out / "metrics.json") if (out / "metrics.json").exists() else {}
        if (done.get("steps", 0) >= max_steps or done.get("stopped_early")) and (out / "best.ckpt").exists():
            _warn_of_differences(out, settings, changing)
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
        _same_model(out, stored["model"], learner.hparams["model"])
    _check_frames(learner.model, data.card)
    if weights is not None:
        learner.begin(weights)
    learner.prepare(data, resumed=weights is not None or checkpoint is not None)
    if stored is not None:
        check_compatible(data.card, stored["card"], f"the run {out}")
        _warn_of_differences(out, settings, changing)
    elif settings["resume"] == "never" and _rank() == 0:
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


def _same_model(out: Path, begun: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
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
    config = out / "config.yaml"
    return OmegaConf.select(OmegaConf.load(config), setting) if config.exists() else None


def _check_frames(model: Any, card: Mapping[str, Any]) -> None:
    """Refuse frames of another size or colour now, and not with the first batch."""
    obs = card["obs"]
    for name, wanted in (("image_size", {obs["height"], obs["width"]}), ("image_channels", {obs["channels"]})):
        if (size := getattr(model, name, None)) is not None and wanted != {size}:
            raise UserError(
                f"model.{name}={size} does not fit the store, whose frames are {obs['height']}x{obs['width']}x"
                f"{obs['channels']}; set model.image_size and model.image_channels, or data.transform"
            )


def legal_actions(store: Any) -> dict[str, list[int]]:
    """The actions of each game, by its name: those that it is known to heed, and those that are in its log."""
    actions = logged_actions(store)
    for game in actions:
        with suppress(UserError):  # nobody's table has a game of the user's own
            actions[game] = sorted({*actions[game], *game_facts(game)["actions"]})
    return actions


def told_games(model: Mapping[str, Any], actions: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a model with the `actions` of each game, where it is to know games and was not told them.

    They are kept with it, for what is called by which name must not change with the stores at hand.
    """
    games = model.get("games")
    if games is not None and not isinstance(games, Mapping):
        raise UserError(f"model.games={games} must be null or have settings, such as model.games={{unknown: 0.1}}")
    return {**model, "games": {"actions": actions, **games}} if games is not None and actions else dict(model)


def told_symmetries(model: Mapping[str, Any], store: Any) -> dict[str, Any]:
    """The settings of a model where those that are `game` are the symmetry that play of the store's games nearly has.

    Raises:
        UserError: nothing is known of such a symmetry of a game, or those of the games differ.
    """
    asked = [name for name in SYMMETRIES if model.get(name) == "game"]
    if not asked:
        return dict(model)
    known: dict[str, str | None] = dict.fromkeys(logged_actions(store))
    for game in known:
        with suppress(UserError):  # nobody's table has a game of the user's own
            known[game] = game_facts(game).get("approximate_symmetry")
    found = set(known.values())
    if None in found or len(found) > 1:
        told = ", ".join(f"{game} {symmetry or 'none'}" for game, symmetry in known.items())
        raise UserError(
            f"model.{asked[0]}=game is the approximate_symmetry that conf/game has of the store's games, which must be "
            f"one and the same ({told}): give model.{asked[0]}={', '.join(GROUPS)} in its place"
        )
    return {**model, **dict.fromkeys(asked, found.pop())}


def check_learner(settings: Mapping[str, Any]) -> None:
    """Refuse settings of what learners share for those of one."""
    if "_target_" not in settings["learner"]:
        raise UserError(
            "learner=policy is what the learners of policies share, muzero_base what those with a search do; choose "
            "learner=cloning, offline_q, actor_critic, muzero, rosmo or muzero_cloning"
        )


def build_learner(settings: Mapping[str, Any], data: Any) -> Any:
    """The learner, with what is for the data to give: a policy may take the actions that are in its log."""
    found: dict[str, Any] = {}
    if settings["learner"].get("actions", ()) is None:
        logged = logged_actions(data.store)
        told_apart = len(logged) > 1 or settings["model"].get("games") is not None
        found["actions"] = logged if told_apart else next(iter(logged.values()))
    model = told_symmetries(settings["model"], data.store)
    return build(settings["learner"], model=model, card=data.card, **found)


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


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)


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
    try:
        return L.Trainer(
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
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"Lightning refuses the settings of trainer: {error}") from error


def _logger(cfg: Mapping[str, Any], out: Path) -> Any:
    """A logger; W&B takes this run's id, the same after each resume, and is offline unless WANDB_MODE=online."""
    if not cfg["_target_"].endswith("WandbLogger") or _rank() != 0:
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


def _resume_point(out: Path) -> Path | None:
    """The newest of last.ckpt and what Lightning wrote for a SLURM requeue; the latter is done with after this."""
    requeued = list(out.glob("hpc_ckpt_*.ckpt"))
    found = [path for path in [out / "last.ckpt", *requeued] if path.exists()]
    if _rank() != 0:  # rank 0 tidies up; the others load what it leaves, once training has begun
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


def _warn_of_differences(out: Path, settings: Mapping[str, Any], changing: Sequence[str]) -> None:
    if not (out / "config.yaml").exists():
        return
    old, new = dotted(OmegaConf.load(out / "config.yaml")), dotted(settings)
    may = (*MAY_DIFFER, *changing)
    keys = [k for k in sorted(old | new) if not isinstance((old | new)[k], Mapping) and not k.startswith(may)]
    differ = [f"{k} was {old.get(k)} and is {new.get(k)}" for k in keys if old.get(k) != new.get(k)]
    if differ:
        print(
            f"warning: settings differ from those that {out} was begun with: {'; '.join(differ)}. "
            "The optimiser goes on with the stored ones; resume=never begins again with the new ones.",
            file=sys.stderr,
        )


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
    _merge_logs(out)
    write_json(out / "metrics.json", figures)
    if best is not None:
        words, unit = learner.score.words, learner.score.unit
        print(f"best {words} {best.item():.2f}{unit}, after {figures['seconds']:.0f} s of training")
    return figures


def _merge_logs(out: Path) -> None:
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


def quiet() -> None:
    """Leave Lightning's warnings that do not concern this program out, and its advertisements."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    known = "does not have many workers|find any LR|save_hyperparameters|LeafSpec|sync_dist|exists and"
    known += "|infer the batch indices|called before the ``update``"
    warnings.filterwarnings("ignore", f".*({known}).*")

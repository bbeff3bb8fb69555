"""From a checkpoint of a training, with what its run recorded beside it, to a folder that needs neither."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from worldmodels.config import plain
from worldmodels.data.disk import read_json
from worldmodels.data.mixing import check_fits, open_stores
from worldmodels.data.transforms import Transform
from worldmodels.evaluation.rollouts import window_starts
from worldmodels.portable.checkpoints import read_checkpoint, trained_transform
from worldmodels.portable.folder import describe, digest_of, rebuild, write_model
from worldmodels.types import Segment, UserError

TOLD = ("model", "card", "actions", "world_model", "policy", "adapt")
"""Settings of learners that are told elsewhere, or that name a place on the machine that trained."""


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    store: Any = None,
    starts: int = 0,
    burn_in: int = 32,
    licence: str | None = None,
) -> bool:
    """Write a checkpoint as a folder of `portable.folder`.

    Args:
        checkpoint: a best.ckpt or last.ckpt, or a folder that was exported before.
        out: a new or empty folder.
        store: path of logged play, or several, from whose test episodes the start frames are taken.
        starts: how many windows of it are added.
        burn_in: their length in transitions.
        licence: of the weights, by the hub's name for it.

    Returns:
        False where this very model lies there already.

    Raises:
        UserError: the checkpoint cannot be read or has no dataset card, the store does not fit it or is not given, or
            the folder holds something else.
    """
    path = Path(checkpoint)
    stored = read_checkpoint(path)
    given, transform = stored["hyper_parameters"], trained_transform(stored)
    if not given.get("card"):
        raise UserError(f"{path} does not say what play it learned from, without which it is of no use to others")
    if (starts > 0) != (store is not None):
        raise UserError("start frames need both: store=... to take them from, and starts=... to say how many")
    earlier, run = stored.get("about"), stored.get("adapter", {}).get("run")
    about = describe(
        given["model"],
        given["card"],
        given.get("actions"),
        earlier["run"] if earlier else run or recorded(stored, None if "adapter" in stored else path.parent),
        earlier["source"] if earlier else {"checkpoint": path.name, "sha256": digest_of(path)},
        transform,
        licence or (earlier or {}).get("licence"),
    )
    prefix = "model."
    weights = {k.removeprefix(prefix): v for k, v in stored["state_dict"].items() if k.startswith(prefix)}
    rebuild(about, weights, path)
    frames = _starts(store, Transform(**transform), given["card"], path, starts, burn_in) if starts else None
    return write_model(Path(out), about, weights, frames)


def recorded(stored: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """What a run tells of a checkpoint: its settings, how it was fine-tuned, and its figures.

    Args:
        stored: the checkpoint.
        folder: of the run, with metrics.json and config.yaml; None where it is not known.
    """
    given = stored["hyper_parameters"]
    run: dict[str, Any] = {"checkpoint_step": stored.get("global_step")}
    run["learner"] = {k: v for k, v in given.items() if k not in TOLD}
    if adapt := stored.get("adapt") or given.get("adapt"):
        unused = () if adapt.get("method") == "lora" else ("rank", "alpha")
        run["fine_tuning"] = {k: v for k, v in adapt.items() if k not in unused}
    if folder is None:
        return run
    if (config := folder / "config.yaml").is_file():
        settings = plain(OmegaConf.load(config))
        data = settings.get("data", {})
        run["data"] = {k: v for k, v in data.items() if k not in ("store", "_target_", "replay")}
        if (data.get("replay") or {}).get("store"):  # the card names the games, and paths are nobody's business
            run["data"]["replay"] = {"share": data["replay"]["share"]}
        if "seed" in settings:
            run["seed"] = settings["seed"]
        if adapt:
            run["fine_tuning"] |= {k: settings[k] for k in ("checkpoint_sha256", "base") if k in settings}
    if (file := folder / "metrics.json").is_file() and "final" in (figures := read_json(file)):
        run |= {"metrics": {k: v for k, v in figures.items() if k != "weights_sha256_by_rank"}}
    return run


def _starts(store: Any, transform: Transform, card: Any, path: Path, count: int, burn_in: int) -> Segment:
    opened = open_stores(store, transform)
    check_fits(opened.card, card, f"the checkpoint {path}")
    return opened.read(window_starts(opened, "test", burn_in, count), burn_in)

"""What the commands that judge a checkpoint share: opening it beside a store, not doing work twice, metrics.json."""

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.config import plain
from worldmodels.data.disk import make_folder, write_json
from worldmodels.learners.world_model import load_learner
from worldmodels.portable.checkpoints import read_checkpoint, trained_transform

FILES = ("checkpoint", "baseline", "lpips", "fvd")
"""Settings that name a file or a model's folder, of whatever command has them."""


def settings_of(cfg: DictConfig, store: Any) -> dict[str, Any]:
    """All that decides the result: the settings, and what is in the files and the store that they name."""
    from worldmodels.portable.folder import digest_of

    files = [(name, Path(str(cfg[name]))) for name in FILES if cfg.get(name)]
    digests = {f"{name}_sha256": digest_of(p) for name, p in files if p.exists()}
    return {**plain(cfg), **digests, "store_uuid": store.uuid, "rows": int(store.offsets[-1])}


def finished(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether metrics.json in `out` says that this very work is done; if so, says it."""
    path = out / "metrics.json"
    done = path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("settings") == settings
    if done:
        print(f"Already done with these settings; delete {path} to do it again.\n{out}")
    return done


def write_metrics(out: Path, figures: Mapping[str, Any]) -> None:
    """Write `out`/metrics.json whole or not at all, and say where."""
    make_folder(out)
    write_json(out / "metrics.json", figures)
    print(out)


def open_data(cfg: DictConfig) -> Any:
    """The store or stores of `cfg.store`; what `cfg.data.transform` leaves open is as the checkpoint was trained.

    Raises:
        UserError: the checkpoint cannot be read, there is no store, or stores do not fit together.
    """
    from worldmodels.data.mixing import open_stores
    from worldmodels.data.transforms import Transform

    trained = trained_transform(read_checkpoint(cfg.checkpoint))
    for name in ("size", "colour"):
        if cfg.data.transform[name] is None:
            cfg.data.transform[name] = trained.get(name)
    return open_stores(plain(cfg.store), Transform(**plain(cfg.data.transform)))


def prepare(
    cfg: DictConfig, out: Path, load: Callable[[str, Any], Any] | None = None
) -> tuple[Any, dict[str, Any], Any, str] | None:
    """Store, settings, world model and its device, once data and model are known to agree; None where `out` is done.

    Args:
        cfg: of the command.
        out: its folder.
        load: gives the model of a checkpoint that agrees with a store; by default a world model with frames.

    Raises:
        UserError: the checkpoint cannot be read, the store does not fit it, or the device is absent.
    """
    from worldmodels.hardware import accelerator, tune_allocator

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    store = open_data(cfg)
    settings = settings_of(cfg, store)
    if finished(out, settings):
        return None
    device = accelerator(cfg.device, "device")
    if device == "cpu":
        tune_allocator()
    model = load(cfg.checkpoint, store) if load else load_fitting(cfg.checkpoint, store).model
    return store, settings, model.to(device), device


def load_fitting(checkpoint: str, store: Any, same_game: bool = True) -> Any:
    """The learner of a checkpoint that is known to agree with the store, in its game too if `same_game`.

    Raises:
        UserError: the checkpoint cannot be read, or the store does not fit it.
    """
    from worldmodels.data.mixing import check_fits

    learner = load_learner(checkpoint)
    if card := learner.hparams["card"]:
        check_fits(store.card, card, f"the checkpoint {checkpoint}", same_game)
    return learner

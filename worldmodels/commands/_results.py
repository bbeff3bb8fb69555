"""What the commands that judge a checkpoint share: opening it beside a store, not doing work twice, metrics.json."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.config import load_learner, plain


def settings_of(cfg: DictConfig, store: Any) -> dict[str, Any]:
    """All that decides the result: the settings, and what is in the checkpoint and the store that they name."""
    path = Path(cfg.checkpoint)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {**plain(cfg), "checkpoint_sha256": digest, "store_uuid": store.uuid, "rows": int(store.offsets[-1])}


def finished(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether metrics.json in `out` says that this very work is done; if so, says it."""
    path = out / "metrics.json"
    done = path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("settings") == settings
    if done:
        print(f"Already done with these settings; delete {path} to do it again.\n{out}")
    return done


def write_metrics(out: Path, figures: Mapping[str, Any]) -> None:
    """Write `out`/metrics.json whole or not at all."""
    partial = out / "metrics.json.tmp"
    partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / "metrics.json")


def load_model(cfg: DictConfig, store: Any) -> tuple[Any, str]:
    """The world model of `cfg.checkpoint` on its device, once its data and the store's are known to agree.

    Raises:
        UserError: the checkpoint cannot be read, the store does not fit it, or the device is absent.
    """
    from worldmodels.data.card import check_compatible
    from worldmodels.hardware import accelerator, tune_allocator

    device = accelerator(cfg.device)
    if device == "cpu":
        tune_allocator()
    learner = load_learner(cfg.checkpoint)
    if card := learner.hparams["card"]:
        check_compatible(store.card, card, f"the checkpoint {cfg.checkpoint}")
    return learner.model.to(device), device

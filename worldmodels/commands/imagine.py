"""Dream open-loop rollouts with logged and random actions: films, strips, arrays, and a store to train on."""

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.commands._bases import is_muzero
from worldmodels.commands._results import load_fitting, prepare, write_metrics
from worldmodels.config import command


@command("imagine")
def main(cfg: DictConfig) -> None:
    """Write logged.* and random.* (mp4, gif, npz, a strip each), store/ and metrics.json to `cfg.out`."""
    import numpy as np
    import torch

    from worldmodels import hardware
    from worldmodels.data.disk import make_folder
    from worldmodels.evaluation.dreams import dream, write_files, write_store
    from worldmodels.evaluation.rollouts import window_starts
    from worldmodels.imagination import LoggedActions, RandomPolicy
    from worldmodels.types import UserError

    began, out = time.monotonic(), Path(cfg.out).absolute()
    if (prepared := prepare(cfg, out, _showing)) is None:
        return
    store, settings, model, device = prepared
    if len(games := store.card.get("games", ())) > 1:
        raise UserError(f"dreams are of one game, but the stores are of {' and '.join(games)}; give those of one game")
    if cfg.precision not in ("auto", "bf16-mixed", "32-true"):
        raise UserError(f"precision={cfg.precision} is none that dreams have; choose auto, bf16-mixed or 32-true")
    if hardware.precision(cfg.precision, device) == "bf16-mixed" and hasattr(model, "quicken"):
        model.quicken()
    starts = window_starts(store, cfg.split, cfg.burn_in + cfg.horizon, cfg.rollouts)
    windows = store.read(starts, cfg.burn_in + cfg.horizon)
    make_folder(out)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    seen = np.unique(store.column("action")).tolist()  # the model knows no others
    policies = {
        "logged": lambda batch: LoggedActions(batch.action[:, cfg.burn_in :]),
        "random": lambda batch: RandomPolicy(seen),
    }
    dreams = {
        name: dream(model, policy, windows, cfg.burn_in, generator, cfg.batch_size, f"{name} actions")
        for name, policy in policies.items()
    }
    real = windows.steps(cfg.burn_in, windows.length)
    write_files(out, "logged", dreams["logged"], real, starts, cfg.shown)
    write_files(out, "random", dreams["random"], None, starts, cfg.shown)
    write_store(out / "store", dreams, store, starts, settings["checkpoint_sha256"], getattr(model, "signs", False))
    figures = {"rollouts": len(starts), "steps": cfg.horizon, "frames": 2 * len(starts) * cfg.horizon}
    for name, d in dreams.items():
        figures[f"{name}_rewards"] = int((d["reward"] * d["mask"]).count_nonzero())
        figures[f"{name}_terminations"] = int((d["terminated"] & d["mask"]).sum())
    print(", ".join(f"{value} {key.replace('_', ' ')}" for key, value in figures.items()))
    write_metrics(out, {**figures, "seconds": round(time.monotonic() - began, 1), "settings": settings})


def _showing(checkpoint: str, store: Any) -> Any:
    """The model of a checkpoint that is known to agree with the store: a world model, or a MuZero with a probe.

    Raises:
        UserError: the checkpoint cannot be read, the store does not fit it, or it shows no frames.
    """
    from worldmodels.data.mixing import check_fits
    from worldmodels.learners.muzero import load_muzero
    from worldmodels.types import UserError

    if not is_muzero(checkpoint):
        return load_fitting(checkpoint, store).model
    model, given = load_muzero(checkpoint)
    if model.probe is None:
        raise UserError(
            f"{checkpoint} holds a MuZero without a probe, which has no frames to show: train it with "
            "model.probe={hidden: 64} to look at what it imagines, or play it by `worldmodels evaluate`"
        )
    check_fits(store.card, given["card"], f"the checkpoint {checkpoint}")
    model.signs = given["clip_rewards"]  # as other world models tell it
    return model


if __name__ == "__main__":
    main()

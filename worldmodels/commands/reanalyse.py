"""Search a whole store again with a trained MuZero: fresh targets for its policy and value, kept beside it."""

import hashlib
import time
from pathlib import Path

from omegaconf import DictConfig

from worldmodels.commands._results import write_metrics
from worldmodels.config import command, plain


@command("reanalyse")
def main(cfg: DictConfig) -> None:
    """Write a version of the side columns and say its name; interrupted, the same command goes on with the rest."""
    import signal

    from worldmodels.data.mixing import check_fits
    from worldmodels.data.store import Store
    from worldmodels.hardware import accelerator, tune_allocator
    from worldmodels.learners.muzero import load_muzero, searching
    from worldmodels.learners.reanalysing import reanalyse

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    began = time.monotonic()
    model, given = load_muzero(cfg.checkpoint)
    store = Store.open(cfg.store)
    check_fits(store.card, given["card"], f"the checkpoint {cfg.checkpoint}")
    search = plain(cfg.planner) or given["search"]
    digest = hashlib.sha256(Path(cfg.checkpoint).resolve().read_bytes())
    key = [search, cfg.seed if given["row_noise"] else None]
    digest.update(repr(key).encode())
    step = given["global_step"]
    version = cfg.version or f"{digest.hexdigest()[:12]}-{step}"
    out = Path(cfg.out).absolute()
    folder = out / "parts" / f"{store.uuid}-{digest.hexdigest()[:12]}-{store.offsets[-1]}"
    device = accelerator(cfg.trainer.accelerator)
    if device == "cpu":
        tune_allocator()
    trainer = {**plain(cfg.trainer), "accelerator": device}
    noise = (cfg.seed, step // given["target_every"]) if given["row_noise"] else None
    facts = {"step": step, "planner": search, "model_sha256": digest.hexdigest(), "seed": cfg.seed}
    rows = reanalyse(store, model, searching(search), version, folder, trainer, noise, cfg.windows, **facts)
    if rows:  # nothing on the ranks that only help
        print(f"{rows} rows of {store.path} have targets {version}; train on them with data.version={version}")
        seconds = round(time.monotonic() - began, 1)
        write_metrics(out, {"version": version, "rows": rows, "step": step, "seconds": seconds})


if __name__ == "__main__":
    main()

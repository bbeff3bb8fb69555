"""Search a whole store again with a trained MuZero: fresh targets for its policy and value, kept beside it."""

import hashlib
import time
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from worldmodels.commands._results import write_metrics
from worldmodels.config import command, plain


@command("reanalyse")
def main(cfg: DictConfig) -> None:
    """Write a version of the side columns and say its name; interrupted, the same command goes on with the rest."""
    import signal

    from worldmodels.data.disk import on_disk
    from worldmodels.data.mixing import check_fits
    from worldmodels.data.store import Store
    from worldmodels.data.targets import check_version
    from worldmodels.data.transforms import Transform
    from worldmodels.hardware import accelerator, tune_allocator
    from worldmodels.learners.muzero import load_muzero, refuse_more, searching, takes_gumbel
    from worldmodels.learners.reanalysing import reanalyse
    from worldmodels.portable.folder import digest_of

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    began = time.monotonic()
    model, given = load_muzero(cfg.checkpoint)
    store, transform = Store.open(on_disk(cfg.store)), Transform(**given["transform"])
    check_fits(transform.card(store.card), given["card"], f"the checkpoint {cfg.checkpoint}")
    refuse_more(plain(cfg.planner), len(model.actions))
    search, step = plain(cfg.planner) or given["search"], given["global_step"]
    noise = (cfg.seed, step // given["target_every"]) if given["row_noise"] and takes_gumbel(search) else None
    facts = {"model_sha256": digest_of(cfg.checkpoint), "step": step, "planner": search, "noise": noise}
    facts |= {"gamma": model.gamma, "clip_rewards": given["clip_rewards"]}
    made_by = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    version = f"{made_by}-{step}-{store.sealed_lengths.sum()}" if cfg.version is None else str(cfg.version)
    check_version(version)
    out = Path(cfg.out).absolute()
    device = accelerator(cfg.trainer.accelerator)
    if device == "cpu":
        tune_allocator()
    trainer = {**plain(cfg.trainer), "accelerator": device}
    place = (version, out / "parts" / made_by, trainer, noise, cfg.windows, transform)
    facts.pop("step")
    rows = reanalyse(store, model, searching(search), *place, step=step, **facts)
    if rows:  # nothing on the ranks that only help
        for folder in (out / "parts" / made_by, out / "parts"):
            with suppress(OSError):  # of another search that is not done
                folder.rmdir()
        print(f"{rows} rows of {store.path} have targets {version}; train on them with data.version={version}")
        seconds = round(time.monotonic() - began, 1)
        write_metrics(out, {"version": version, "rows": rows, "step": step, "seconds": seconds})


if __name__ == "__main__":
    main()

"""Say what a training run would cost on this machine in time, memory and disk, before it starts."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.commands._results import write_metrics
from worldmodels.config import build, command, plain, sized
from worldmodels.types import ACTIONS

CHECKPOINTS = 2  # best and last
GIF_BYTES = 400_000


@command("plan")
def main(cfg: DictConfig) -> None:
    """Time a few real steps on made-up segments of the right shape, and multiply."""
    settings = plain(cfg)
    figures = estimate(settings | {"model": sized(settings["model"])})
    for name, value in figures.items():
        print(f"{name:<24} {value:,}" if isinstance(value, int | float) else f"{name:<24} {value}")
    hours, minutes = divmod(round(figures["seconds"] / 60), 60)
    print(f"about {hours} h {minutes:02d} min" if hours else f"about {minutes} min")
    for need, have in (("disk_gib", "disk_free_gib"), ("memory_gib", "memory_free_gib")):
        if figures[need] > figures[have]:
            print(f"warning: {need} {figures[need]} is more than {have} {figures[have]}", file=sys.stderr)
    if settings["out"] is not None:
        write_metrics(Path(settings["out"]).absolute(), figures)


def estimate(settings: dict[str, Any], repeats: int = 3) -> dict[str, Any]:
    """Figures of `worldmodels train` with `settings`, the model's sizes resolved; sizes are in GiB."""
    import torch

    from worldmodels import hardware
    from worldmodels.learners.building import check_learner

    check_learner(settings)
    hardware.tune_allocator()
    options = settings["trainer"]
    device = hardware.accelerator(options["accelerator"])
    precision = hardware.precision(options["precision"], device)
    measure = _policy if "actions" in settings["learner"] else _world_model
    model, seconds_a_step, seconds_a_validation = measure(settings, device, precision, repeats)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else _peak()

    batches = options["max_steps"] * options["accumulate_grad_batches"]
    validations = max(1, batches // options["val_check_interval"])
    parameters = sum(p.numel() for p in model.parameters())
    averaged = bool(settings["callbacks"].get("ema"))
    # weights, the average, and AdamW's two moments, in float32; one checkpoint more while it is being written
    checkpoint = 4 * parameters * (3 + averaged)
    disk = (CHECKPOINTS + 1) * checkpoint + validations * GIF_BYTES * bool(settings["callbacks"].get("dream"))
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else hardware.memory()[0]
    return {
        "accelerator": device,
        "precision": precision,
        "parameters": parameters,
        "steps": options["max_steps"],
        "seconds_a_step": round(seconds_a_step, 4),
        "training_seconds": round(seconds_a_step * batches),
        "validation_seconds": round(seconds_a_validation * validations),
        "seconds": round(seconds_a_step * batches + seconds_a_validation * validations),
        "memory_gib": round(memory / hardware.GIB, 2),
        "memory_free_gib": round(free / hardware.GIB, 2),
        "disk_gib": round(disk / hardware.GIB, 3),
        "disk_free_gib": round(hardware.disk_free(settings["out"] or ".") / hardware.GIB, 1),
    }


def _world_model(settings: dict[str, Any], device: str, precision: str, repeats: int) -> tuple[Any, float, float]:
    """The model, seconds a step and seconds a validation, on made-up play.

    Raises:
        UserError: a symmetry that is that of the log's game, without a log.
    """
    import torch

    from worldmodels.learners.building import SYMMETRIES, told_games, told_symmetries
    from worldmodels.types import UserError

    known = told_games(settings["model"], {"any": range(len(ACTIONS))})
    if asked := [name for name in SYMMETRIES if known.get(name) == "game"]:
        if settings["store"] is None:
            raise UserError(f"what model.{asked[0]}=game means depends on the log: give store=...")
        known = told_symmetries(known, build(settings["data"]).store)
    data, model = settings["data"], build(known).to(device)
    shape = (settings["model"]["image_channels"], *[settings["model"]["image_size"]] * 2)
    optimizer = torch.optim.AdamW(model.parameters())
    segment = _segment(data["batch_size"], data["length"], shape).to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision.startswith("bf16")):
            loss, _ = model.loss(segment)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    seconds_a_step = _time(step, repeats)
    windows = data["validation"]
    horizon = max(settings["learner"]["horizons"])
    context = _segment(windows["batch_size"], windows["length"] - horizon, shape).to(device)
    state = model.start(context)
    seconds_a_dream = _time(lambda: model.step(state, context.action[:, 0])[1].reward.sum().item(), 1)
    return model, seconds_a_step, seconds_a_dream * horizon * -(-windows["windows"] // windows["batch_size"])


def _policy(settings: dict[str, Any], device: str, precision: Any, repeats: int) -> tuple[Any, float, float]:
    """The same of a policy, by the trainer on real play: its frames, actions and world model decide what it costs.

    Raises:
        UserError: there is no store.
    """
    from lightning import Trainer
    from lightning.pytorch.callbacks import LambdaCallback

    from worldmodels.learners.building import build_learner
    from worldmodels.learners.fit import quiet
    from worldmodels.types import UserError

    if settings["store"] is None:
        raise UserError("what training a policy costs depends on its log: give store=...")
    quiet()
    data = build(settings["data"])
    learner = build_learner(settings, data)
    learner.prepare(data, resumed=False)
    stops: list[float] = []

    def stop(*_: Any) -> None:
        stops.append(time.perf_counter())

    dream = settings["learner"].get("reuse", 1)  # steps on each, the first of which is slower
    steps = dream * (1 + repeats)
    trainer = Trainer(
        accelerator=device, devices=1, precision=precision, max_steps=steps, max_epochs=-1, val_check_interval=steps,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LambdaCallback(on_train_batch_end=stop, on_validation_start=stop, on_validation_end=stop)],
    )  # fmt: skip
    trainer.fit(learner, data)
    *steps_end, looks, looked = stops
    return learner.model, (steps_end[-1] - steps_end[dream - 1]) / (steps - dream), looked - looks


def _segment(batch: int, length: int, shape: tuple[int, ...]) -> Any:
    import torch

    from worldmodels.types import Segment

    obs = torch.randint(256, (batch, length + 1, *shape), dtype=torch.uint8)
    zeros = torch.zeros(batch, length)
    false, true = zeros.bool(), ~zeros.bool()
    return Segment(obs, zeros.long(), zeros, false, false, true, true)


def _time(work: Any, repeats: int) -> float:
    work()  # the first is slower
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def _peak() -> int:
    """Most bytes of memory that this process has held (the unit of ru_maxrss is bytes on macOS, KiB elsewhere)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()

"""Say what a training run would cost on this machine in time, memory and disk, before it starts."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.commands._results import write_metrics
from worldmodels.config import build, command, plain, sized

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
    from worldmodels.types import UserError

    if "actions" in settings["learner"]:
        raise UserError(
            f"only what training a world model costs can be told, not learner={settings['learner']['_target_']}"
        )
    hardware.tune_allocator()
    options, data = settings["trainer"], settings["data"]
    device = hardware.accelerator(options["accelerator"])
    precision = hardware.precision(options["precision"], device)
    model = build(settings["model"]).to(device)
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
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else _peak()

    batches = options["max_steps"] * options["accumulate_grad_batches"]
    validations = max(1, batches // options["val_check_interval"])
    dreams = validations * horizon * -(-windows["windows"] // windows["batch_size"])
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
        "validation_seconds": round(seconds_a_dream * dreams),
        "seconds": round(seconds_a_step * batches + seconds_a_dream * dreams),
        "memory_gib": round(memory / hardware.GIB, 2),
        "memory_free_gib": round(free / hardware.GIB, 2),
        "disk_gib": round(disk / hardware.GIB, 3),
        "disk_free_gib": round(hardware.disk_free(settings["out"] or ".") / hardware.GIB, 1),
    }


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

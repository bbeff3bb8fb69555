"""Say what this machine can do: cores, memory, GPU, precision, ROMs, versions, speed."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldmodels.commands._results import write_metrics
from worldmodels.config import command

PACKAGES = ("lightning", "torchmetrics", "diffusers", "zarr", "ale-py", "gymnasium", "hydra-core", "wandb", "numpy")


@command("doctor")
def main(cfg: DictConfig) -> None:
    """Print one line a fact, and what to do where something is missing."""
    start = time.perf_counter()
    facts = examine()
    for name, fact in facts.items():
        print(f"{name:<22} {'none' if fact is None else fact}")
    if cfg.out is not None:
        write_metrics(Path(cfg.out).absolute(), facts | {"seconds": round(time.perf_counter() - start, 1)})


def examine() -> dict[str, Any]:
    """All facts by name, in the order in which they are printed."""
    from importlib.metadata import PackageNotFoundError, version

    from worldmodels import __version__, hardware

    facts = {"worldmodels": __version__} | hardware.summary()
    device = hardware.accelerator()
    facts["accelerator (auto)"] = device
    facts["precision (auto)"] = hardware.precision("auto", device)
    facts["conv_gmac_per_s"] = round(hardware.conv_speed(device), 1)
    facts["allocator_tuned"] = hardware.tune_allocator()
    facts["disk_free_gib"] = round(hardware.disk_free(".") / hardware.GIB, 1)
    facts["writable"] = _writable(Path.cwd())
    facts["games"] = _games()
    facts["wandb mode"] = os.environ.get("WANDB_MODE", "offline (set WANDB_MODE=online to upload)")
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "missing: run `make setup`"
    return facts


def _writable(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return f"yes: {folder}"
    except OSError as error:
        return f"no: {folder} ({error.strerror}); give out=DIR and store=DIR elsewhere"


def _games() -> str:
    try:
        from ale_py import roms

        count = len(roms.get_all_rom_ids())
    except ImportError:
        return "none: run `make setup`"
    return f"{count} ROMs in ale-py" if count else "none: reinstall ale-py"


if __name__ == "__main__":
    main()

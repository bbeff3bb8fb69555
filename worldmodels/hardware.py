"""What this machine can do, and the settings that follow from it. Sizes are in bytes, times in seconds."""

import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from worldmodels.types import UserError

GIB = 2**30
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def cores() -> int:
    """Cores that this process may use (its affinity and its container's quota, not all that the machine has)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return count


def memory() -> tuple[int, int]:
    """Bytes of memory (free, total), within the container's limit where there is one."""
    import psutil

    machine = psutil.virtual_memory()
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit() and int(limit) < machine.total:
        return min(machine.available, int(limit) - int(used)), int(limit)
    return machine.available, machine.total


def disk_free(path: str | Path) -> int:
    """Free bytes where `path` is, or would be made."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def has_bf16(device: str = "cpu") -> bool:
    """True where the hardware itself multiplies bfloat16; where it is emulated it is slower than float32."""
    if device != "cpu":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    flags = _read("/proc/cpuinfo").partition("flags")[2].partition("\n")[0].split()
    arm = _read("/proc/cpuinfo").partition("Features")[2].partition("\n")[0].split()
    return bool({"avx512_bf16", "amx_bf16"} & set(flags) or "bf16" in arm)


def accelerator(name: str = "auto", setting: str = "trainer.accelerator") -> str:
    """Lightning's accelerator for `auto`, `cpu`, `cuda`, `gpu` or `mps`, once it is known to be there.

    Args:
        name: what is asked for.
        setting: by which the user asks for it.

    Raises:
        UserError: it is absent or unknown.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["gpu"] = there["cuda"]
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if name not in there:
        raise UserError(f"{setting}={name} is unknown; choose auto, {', '.join(there)}")
    if not there[name]:
        without = "" if torch.version.cuda or name == "mps" else f", and torch {torch.__version__} is built without it"
        raise UserError(
            f"accelerator '{name}' was asked for but this machine has none{without}; use {setting}=auto or cpu"
        )
    return {"gpu": "cuda"}.get(name, name)


def precision(name: str = "auto", device: str = "cpu") -> str:
    """Lightning's precision: `auto` is "bf16-mixed" where the hardware multiplies it, else "32-true".

    Raises:
        UserError: it is unknown, bfloat16 is asked for where it would be emulated, or float16 on a CPU.
    """
    if name not in PRECISIONS:
        raise UserError(f"precision '{name}' is unknown; choose one of {', '.join(PRECISIONS)}")
    if name.startswith("bf16") and not has_bf16(device):
        raise UserError(f"precision={name} needs bfloat16, which this machine's {device} lacks; use auto or 32-true")
    if name == "16-mixed" and device == "cpu":  # Lightning would take bfloat16 in its place
        raise UserError("precision=16-mixed is for GPUs alone; use auto or 32-true")
    if name != "auto":
        return name
    return "bf16-mixed" if has_bf16(device) else "32-true"


def tune_allocator() -> bool:
    """Let glibc keep freed memory instead of returning it: about 1.5 times as many training steps on a CPU.

    Without it every activation is unmapped and faulted in again, a fifth of the time of a step. It costs resident
    memory that stays at its peak. Call it before the big allocations. Returns whether it took effect.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    # mallopt takes a C int, so the threshold is the largest there is (2 GiB) and not the 16 GiB of the environment.
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 256 * 2**20))


def compile_in_place(networks: Sequence[torch.nn.Module], setting: bool | str = "auto", device: str = "cpu") -> bool:
    """Have torch.compile make `networks` faster, for shapes that do not change, once it has shown that it works here.

    In place, so that no key of a state dict changes. On a CPU it takes a minute or two, and steps were found a tenth
    faster or a twentieth slower, depending on the size of the model and the threads; so "auto" is for GPUs alone.

    Args:
        networks: modules with a `forward`.
        setting: true, false or "auto".
        device: torch's name of where they will be.

    Returns:
        Whether they are compiled: where the probe fails, they are left as they are, with one line of warning.

    Raises:
        UserError: another setting.
    """
    if setting not in (True, False, "auto"):
        raise UserError(f"compile={setting} is unknown; choose auto, true or false")
    if not networks or setting is False or (setting == "auto" and device != "cuda"):
        return False
    try:
        probe = torch.nn.Linear(8, 8).to(device)
        torch.compile(probe, dynamic=False)(torch.ones(4, 8, device=device)).sum().backward()
    except Exception as error:  # whatever a compiler may lack
        reason = str(error).strip().partition("\n")[0]
        print(f"warning: training goes on uncompiled, as torch.compile failed here: {reason}", file=sys.stderr)
        return False
    torch._dynamo.config.suppress_errors = True  # what passes the probe may still hold a part that does not compile
    for network in networks:
        network.compile(dynamic=False)
    return True


def conv_speed(device: str = "cpu", seconds: float = 0.5) -> float:
    """Billions of multiply-adds a second of a 3x3 convolution like the tiny model's: (8, 64, 16, 16), forward."""
    convolution = torch.nn.Conv2d(64, 64, 3, padding=1).to(device).requires_grad_(False)
    x = torch.zeros(8, 64, 16, 16, device=device)
    for _ in range(3):
        convolution(x)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        convolution(x).sum().item()
        count += 1
    return count * x.shape[0] * 16 * 16 * 64 * 64 * 9 / elapsed / 1e9


def summary() -> dict[str, Any]:
    """Plain facts of the machine, for `metrics.json` and the tables of benchmarks."""
    free, total = memory()
    name = _read("/proc/cpuinfo").partition("model name")[2].partition("\n")[0].strip(" \t:")
    return {
        "processor": name or platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(total / GIB, 1),
        "memory_free_gib": round(free / GIB, 1),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "bf16": has_bf16(accelerator()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""

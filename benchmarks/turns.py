"""Trainings that take turns, each a process of its own, until each has had its budget of CPU time.

Equal CPU time is equal wall-clock on cores that nothing else uses, and stays equal where others use them too. It is
that of the training process and all its threads, in its training loop (validation included, start-up of each turn left
out), as the process itself writes it into its checkpoint: whatever is killed goes on from there.
"""

import ctypes
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from worldmodels.data.disk import read_json, remove, write_json
from worldmodels.portable.checkpoints import read_checkpoint

PROBE = 45.0  # seconds of CPU time from which the cost of a step is taken
MARGIN = 0.95  # of a budget that steps are planned for: validation comes on top of what the probe measures


class Spent(NamedTuple):
    """What a training has had so far: CPU seconds, seconds by the clock, optimizer steps; and whether it is done."""

    cpu: float = 0.0
    clock: float = 0.0
    steps: int = 0
    done: bool = False


class Training(NamedTuple):
    """A command that trains in its own folder, goes on where it stopped, and on SIGTERM saves its state and ends."""

    command: list[str]
    log: Path
    spent: Callable[[], Spent]


def take_turns(trainings: Sequence[Training], turn: float) -> None:
    """Give turns of `turn` CPU seconds (start-up included) to the one that has had least, until all are done.

    Raises:
        RuntimeError: a training failed, or did no step in its turn.
    """
    while waiting := [(t.spent(), t) for t in trainings if not t.spent().done]:
        before, training = min(waiting, key=lambda pair: pair[0].cpu)
        for longer in (1, 10):  # a validation may take longer than a turn
            one_turn(training, longer * turn)
            after = training.spent()
            print(f"{training.log.parent.name}: {after.steps} steps in {after.cpu:.0f} s of CPU time", flush=True)
            if after.done or after.steps > before.steps:
                break
        else:
            raise RuntimeError(f"no step was done in {10 * turn} s of CPU time; {training.log} may say why")


def one_turn(training: Training, turn: float) -> None:
    """Run the command, ended by SIGTERM after `turn` seconds of CPU time.

    Raises:
        RuntimeError: it failed.
    """
    training.log.parent.mkdir(parents=True, exist_ok=True)
    with training.log.open("a") as log:
        child = psutil.Popen(training.command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent)
        try:
            while child.poll() is None:
                if _cpu(child) > turn:
                    child.terminate()
                time.sleep(0.1)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if child.returncode not in (0, 130, -signal.SIGTERM):
        raise RuntimeError(f"{training.command} ended with code {child.returncode}; see {training.log}")


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
        return times.user + times.system
    except psutil.Error:  # it has ended
        return 0.0


def _end_with_parent() -> None:
    """Let the child have SIGTERM when this process dies, even by SIGKILL: two trainings of one folder would clash."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def ours(experiment: str, store: Path, out: Path, budget: float, *settings: str) -> Training:
    """`worldmodels train experiment=...` with as many steps as fit into `budget` CPU seconds, its schedule over them.

    Args:
        experiment: of conf/experiment.
        store: what it learns from.
        out: its folder; the plan is kept in it.
        budget: CPU seconds.
        settings: further ones, as on the command line.
    """

    def training(folder: Path, steps: int) -> Training:
        command = [sys.executable, "-m", "worldmodels", "train", f"experiment={experiment}", f"store={store}"]
        command += [f"out={folder}", f"trainer.max_steps={steps}", "callbacks.last.every=100"]
        command += ["trainer.accelerator=cpu", "logger=csv", "callbacks.dream=null", *settings]
        return Training(command, folder / "log.txt", lambda: _spent(folder, steps))

    plan = out / "plan.json"
    if not plan.exists():
        probe, turn = out.with_name(f"{out.name}-probe"), min(PROBE, budget / 2)
        remove(probe)
        one_turn(training(probe, 10**6), turn)
        cost = _spent(probe, 10**6)
        if not cost.steps:
            raise RuntimeError(f"no step was done in {turn} s of CPU time; {probe / 'log.txt'} may say why")
        out.mkdir(parents=True, exist_ok=True)
        write_json(plan, {"budget": budget, "steps": max(1, int(MARGIN * budget * cost.steps / cost.cpu))})
        remove(probe)
    return training(out, read_json(plan)["steps"])


def _spent(folder: Path, steps: int) -> Spent:
    """What a run of `worldmodels train` has had, by its metrics where it is finished, else by its checkpoint."""
    if (folder / "metrics.json").exists():
        figures = read_json(folder / "metrics.json")
        return Spent(figures["cpu_seconds"], figures["seconds"], figures["steps"], figures["steps"] >= steps)
    if not (folder / "last.ckpt").exists():
        return Spent()
    checkpoint = read_checkpoint(folder / "last.ckpt")
    clock = checkpoint["callbacks"]["Progress"]
    return Spent(clock["cpu_seconds"], clock["seconds"], checkpoint["global_step"])

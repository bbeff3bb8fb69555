"""What happens beside training: averaged weights, checkpoints, random state, progress, and a look at the dreams."""

import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar, WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from worldmodels.types import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it, then renames it: a kill or a full disk spares the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides what the disk said
                raise error.__context__ from None
            raise
        finally:
            temporary.unlink(missing_ok=True)


class EMA(WeightAveraging):
    """Exponential moving average of the weights; validation and the `state_dict` of checkpoints use it.

    Args:
        decay: of the average, reached by min(decay, (1 + n) / (10 + n)) after n updates, so that a short run's average
            does not remember the initial weights.
        device: where the average lives; give the GPU, or it is kept on the CPU and copied at every step.
    """

    def __init__(self, decay: float = 0.999, device: str | None = None) -> None:
        @torch.no_grad()
        def update(average: list[Tensor], current: list[Tensor], n: Tensor) -> None:
            count = float(n)
            torch._foreach_lerp_(average, current, 1 - min(decay, (1 + count) / (10 + count)))

        super().__init__(device=device, use_buffers=False, multi_avg_fn=update)
        self._swapped = False

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo the swap of an interrupted validation, or the checkpoint on exception would hold the two exchanged."""
        if self._swapped:
            self._swap_models(pl_module)


class LastCheckpoint(Checkpoint):
    """Keeps the newest state in one file: every so many steps, after validation, at the end, and when interrupted.

    The first step is written, too: should anything break the weights before the next is due, there is a file to go on
    from.

    Args:
        path: the file.
        every: optimizer steps between two writes.
    """

    def __init__(self, path: str, every: int) -> None:
        self.path, self.every, self._saved = path, every, -1

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Write when due; with accumulated gradients a step spans many batches and is written once."""
        step = trainer.global_step
        if step != self._saved and (step % self.every == 0 or step in (1, trainer.max_steps)):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write again: the score that the best checkpoint has to beat has changed."""
        if trainer.state.fn == "fit":
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is, unless it is broken: then what was written before is all that can be gone on from.

        Where one rank alone has failed the others would be waited for in vain.
        """
        together = isinstance(exception, KeyboardInterrupt | SystemExit)
        whole = all(bool(p.isfinite().all()) for p in pl_module.parameters())
        if whole and trainer.global_step not in (0, self._saved) and (trainer.world_size == 1 or together):
            with suppress(UserError):  # a learner may know more that speaks against it
                self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = trainer.global_step


class StepCheckpoints(Checkpoint):
    """Keeps the state of every so many steps in a file of its own, for those who judge how training went.

    Args:
        folder: of the files, which are named by the step.
        every: optimizer steps between two of them.
    """

    def __init__(self, folder: str, every: int) -> None:
        self.folder, self.every, self._saved = Path(folder), every, -1

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Write when due, once a step."""
        step = trainer.global_step
        if step != self._saved and step % self.every == 0:
            trainer.save_checkpoint(self.folder / f"{step:06d}.ckpt")
            self._saved = step


class RandomState(Callback):
    """Puts the global random states of torch, CUDA and Python into the checkpoint, for models that use them (dropout).

    Under DDP the file holds the states of rank 0, and only rank 0 takes them back: ranks must not draw alike.
    """

    _restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts: what comes before it draws numbers too."""
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the states back."""
        if self._restored is None or not trainer.is_global_zero:
            return
        torch.set_rng_state(self._restored["torch"].cpu())
        if len(self._restored["cuda"]) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all([state.cpu() for state in self._restored["cuda"]])
        version, internal, gauss = self._restored["python"]
        random.setstate((version, tuple(internal), gauss))


class Progress(ProgressBar):
    """One line with step, loss, score, speed and ETA: rewritten on a terminal, printed now and then elsewhere.

    It also keeps the seconds spent in training, over all resumes, and the CPU time of this process in them, to which
    others on the same cores do not add.

    Args:
        every: seconds between two lines where stdout is no terminal.
        score: what is shown of validation: key, name of its figure, words and unit (learners/base.py).
    """

    def __init__(self, every: float = 10.0, score: Sequence[str] | None = None) -> None:
        super().__init__()
        self.every, self.score, self._earlier, self._enabled = every, score, (0.0, 0.0), True
        self._start: tuple[float, float] | None = None
        self._first_step, self._shown = 0, 0.0

    @property
    def spent(self) -> tuple[float, float]:
        """Seconds spent in training so far, by the clock and of CPU time."""
        if self._start is None:
            return self._earlier
        now = time.monotonic(), time.process_time()
        clock, cpu = (e + n - s for e, n, s in zip(self._earlier, now, self._start, strict=True))
        return clock, cpu

    def disable(self) -> None:
        """Say nothing (Lightning calls this on ranks other than 0)."""
        self._enabled = False

    def state_dict(self) -> dict[str, Any]:
        """The seconds."""
        seconds, cpu_seconds = self.spent
        return {"seconds": seconds, "cpu_seconds": cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The seconds of earlier runs."""
        # checkpoints of earlier versions do not tell the CPU time
        self._earlier = state_dict["seconds"], state_dict.get("cpu_seconds", 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic(), time.process_time()
        self._first_step, self._shown = trainer.global_step, self._start[0]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Show the line when it is time."""
        now, last = time.monotonic(), trainer.global_step == trainer.max_steps
        if self._enabled and (last or now - self._shown > (0.5 if sys.stdout.isatty() else self.every)):
            self._shown = now
            self._show(trainer, now)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the new score."""
        if self._enabled and self._start is not None:
            self._show(trainer, time.monotonic())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._earlier, self._start = self.spent, None
        if self._enabled and sys.stdout.isatty():
            print()

    def _show(self, trainer: Trainer, now: float) -> None:
        step, end = trainer.global_step, trainer.max_steps
        speed = (step - self._first_step) / max(now - (self._start[0] if self._start else now), 1e-9)
        metrics = trainer.callback_metrics
        parts = [f"step {step}/{end}"]
        parts += [f"{name} {metrics[key]:.4f}" for name, key in (("loss", "train/loss"),) if key in metrics]
        if self.score and self.score[0] in metrics:
            key, _, words, unit = self.score
            parts.append(f"{words} {metrics[key]:.2f}{unit}")
        if speed > 0:
            left = int((end - step) / speed)
            parts.append(f"{speed:.1f} steps/s  ETA {left // 60}:{left % 60:02d}")
        line = "  ".join(parts)
        print(f"\r{line}\033[K" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)


class DreamVideo(Callback):
    """Writes a short dream below what really happened, as a gif, at each validation, and hands it to W&B.

    Args:
        folder: where the gifs go.
        rows: number of windows, side by side.
    """

    def __init__(self, folder: str, rows: int = 4) -> None:
        self.folder, self.rows = Path(folder), rows

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Dream the first windows of the first batch; the averaged weights are in place here."""
        if batch_idx or not trainer.is_global_zero or trainer.sanity_checking:
            return
        from worldmodels.evaluation.pictures import montage, write_gif
        from worldmodels.imagination import LoggedActions, imagine

        segment = batch.rows(slice(self.rows))
        context = segment.length - max(pl_module.hparams["horizons"])
        generator = torch.Generator(pl_module.device).manual_seed(0)
        policy = LoggedActions(segment.action[:, context:])
        dream = imagine(pl_module.model, policy, segment.steps(0, context), segment.length - context, generator)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{trainer.global_step:06d}.gif"
        write_gif(path, montage([segment.obs[:, context:].cpu(), dream.obs.cpu()]))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_video("val/dream", [str(path)], step=trainer.global_step, format=["gif"])

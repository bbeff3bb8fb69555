"""DIAMOND's denoiser in a small size, trained on a store by DIAMOND's own code, and dreamed with as a world model.

`python -m benchmarks.reference_training --reference CHECKOUT --store STORE --out DIR --until SECONDS --every SECONDS`
trains until so much CPU time is spent, or SIGTERM comes, and goes on from DIR/state.pt. Data set, batches, network,
loss, optimiser groups, warm-up and the order of a step are those of a checkout of github.com/eloialonso/diamond, with
the settings of its config; what makes it as fast as a CPU allows without a change of its code is added: the
allocator's settings, channels-last, bfloat16 where the hardware has it, fused AdamW.
"""

import argparse
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from benchmarks import reference
from benchmarks.frames_only import FramesOnly
from benchmarks.turns import Spent
from worldmodels import hardware
from worldmodels.data.disk import atomic
from worldmodels.data.sources.reading import minimal_actions
from worldmodels.data.store import Store
from worldmodels.models.frames import to_float, to_uint8
from worldmodels.types import Metrics, Segment

SMALL = {"cond_channels": 128, "depths": [1] * 4, "channels": [32] * 4, "attn_depths": [0] * 4}
BATCH = 32
SAVE_EVERY = 30.0  # CPU seconds


class ReferenceModel(FramesOnly):
    """The reference's denoiser and sampler as a world model.

    Args:
        modules: of `reference.load`.
        actions: the game's own, as indices into the 18: the reference numbers them in this order.
        calls: network calls a frame (DIAMOND: 3).
        levels: channels, depths and so on of its U-Net.
        image_channels: C.
    """

    def __init__(
        self,
        modules: Any,
        actions: Sequence[int],
        calls: int = 3,
        levels: dict[str, Any] = SMALL,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.modules, self.actions, self.calls = modules, list(actions), calls
        m = modules.diffusion
        inner = m.InnerModelConfig(image_channels, self.context, num_actions=len(actions), **levels)
        self.denoiser = m.Denoiser(m.DenoiserConfig(inner, sigma_data=0.5, sigma_offset_noise=0.3))
        self.denoiser.setup_training(m.SigmaDistributionConfig(loc=-0.4, scale=1.2, sigma_min=2e-3, sigma_max=20.0))
        self.to(memory_format=torch.channels_last)  # pyrefly: ignore

    def numbered(self, action: Tensor) -> Tensor:
        """Indices into the 18 actions as the reference numbers them; those that the game does not heed as its first."""
        table = torch.zeros(18, dtype=torch.long)
        table[self.actions] = torch.arange(len(self.actions))
        return table[action]

    def loss(self, segment: Segment, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """The reference's own loss of the last L + 2 frames (its `num_autoregressive_steps` is 1)."""
        tail = segment.steps(segment.length - self.context - 1, segment.length)
        batch = reference.batch_of(self.modules, tail)
        batch.act = self.numbered(batch.act)
        with _seeded(generator):
            loss, logs = self.denoiser(batch)
        return loss, {"loss": logs["loss_denoising"]}

    def next_frame(self, frames: Tensor, action: Tensor, generator: torch.Generator | None) -> Tensor:
        """A frame by the reference's sampler."""
        settings = self.modules.diffusion.DiffusionSamplerConfig(num_steps_denoising=self.calls)
        sampler = self.modules.diffusion.DiffusionSampler(self.denoiser, settings)
        with _seeded(generator):
            image, _ = sampler.sample(to_float(frames), self.numbered(action))
        return to_uint8(image)


@contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Torch's global random numbers, the only ones that the reference's model draws, decided by the generator."""
    with torch.random.fork_rng(devices=[], enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def load_model(checkout: Path, checkpoint: Path, calls: int = 3) -> ReferenceModel:
    """The model of a file that `train` wrote, in evaluation mode."""
    state = torch.load(checkpoint, weights_only=True)
    model = ReferenceModel(reference.load(checkout), state["actions"], calls)
    model.denoiser.load_state_dict(state["denoiser"])
    return model.eval().requires_grad_(False)


def data_set(modules: Any, store: Store) -> Any:
    """The training episodes of a store in the reference's own data set, in memory."""
    data = modules.data.Dataset(Path("nowhere"), "train", cache_in_ram=True, save_on_disk=False)
    for number in store.splits["train"]:
        e = store.episode(int(number))
        obs = to_float(torch.from_numpy(e.obs)).permute(0, 3, 1, 2).contiguous()
        columns = (torch.from_numpy(x) for x in (e.action.astype(np.int64), e.reward, e.terminated, e.truncated))
        act, rew, end, trunc = columns
        data.add_episode(modules.data.Episode(obs, act, rew, end.byte(), trunc.byte(), {}))
    return data


def batches(modules: Any, data: Any, model: ReferenceModel) -> Iterator[Any]:
    """Endless batches of 32 segments of 6 frames, by the reference's sampler of static data sets."""
    Sampler.__init__ = lambda self, data_source=None: None  # newer torch takes no argument, which the reference gives
    sampler = modules.data.BatchSampler(data, 0, 1, BATCH, model.context + 2)
    collate, aside = modules.data.collate_segments_to_batch, torch.Generator()  # or a seed is drawn from torch's own
    for batch in DataLoader(data, batch_sampler=sampler, collate_fn=collate, generator=aside):
        batch.act = model.numbered(batch.act)
        yield batch


def train(checkout: Path, store: Path, out: Path, until: float, every: float, stop: Callable[[], bool]) -> None:
    """Train until `until` CPU seconds are spent in all, or `stop` says so.

    Args:
        checkout: of the reference.
        store: what it learns from.
        out: folder of state.pt, from which it goes on, and of the weights at every multiple of `every`.
        until: CPU seconds.
        every: CPU seconds between two kept states of the weights, weights_K.pt.
        stop: asked before each step.
    """
    hardware.tune_allocator()
    modules, opened = reference.load(checkout), Store.open(store)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (the reference draws its segments from it)
    model = ReferenceModel(modules, minimal_actions(opened.card["game"]))
    denoiser, utils = model.denoiser, modules.utils
    groups = utils.configure_opt(denoiser, lr=1e-4, weight_decay=1e-2, eps=1e-8).param_groups
    groups = [{k: group[k] for k in ("params", "weight_decay")} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, eps=1e-8, fused=True)
    schedule = utils.get_lr_sched(optimizer, num_warmup_steps=100)
    parts = {"denoiser": denoiser, "optimizer": optimizer, "schedule": schedule}
    bf16 = hardware.precision("auto") == "bf16-mixed"
    stream = batches(modules, data_set(modules, opened), model)
    steps, losses, earlier = 0, [], Spent()
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        steps, losses, earlier = state["steps"], state["losses"], Spent(state["cpu"], state["clock"])
        _set_random(state["random"])
    began, saved = (time.process_time(), time.monotonic()), earlier.cpu
    while True:
        cpu = earlier.cpu + time.process_time() - began[0]
        over = cpu >= until or stop()
        kept = out / f"weights_{int(cpu // every):02d}.pt"
        if over or cpu > saved + SAVE_EVERY or not kept.exists():
            state = {name: part.state_dict() for name, part in parts.items()} | {"random": _random()}
            state |= {"actions": model.actions, "steps": steps, "losses": losses, "cpu": cpu}
            _save(out / "state.pt", state | {"clock": earlier.clock + time.monotonic() - began[1]})
            saved = cpu
        if not kept.exists():
            _save(kept, {"denoiser": denoiser.state_dict(), "actions": model.actions, "steps": steps})
        if over:
            return
        batch = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = denoiser(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        steps += 1


def spent(out: Path, until: float) -> Spent:
    """What the training in `out` has had so far."""
    if not (out / "state.pt").exists():
        return Spent()
    state = torch.load(out / "state.pt", weights_only=True)
    return Spent(state["cpu"], state["clock"], state["steps"], state["cpu"] >= until)


def _random() -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    key = numpy["state"]["key"].tolist()
    return {"torch": torch.get_rng_state(), "numpy": numpy | {"state": {"key": key, "pos": numpy["state"]["pos"]}}}


def _set_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], np.uint32)
    np.random.set_state(numpy | {"state": {"key": key, "pos": numpy["state"]["pos"]}})  # noqa: NPY002


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        torch.save(state, temporary)


def main() -> None:
    """Train, until the budget is spent or SIGTERM or Ctrl-C comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in {"reference": Path, "store": Path, "out": Path, "until": float, "every": float}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    options, told = parser.parse_args(), []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: told.append(True))
    train(options.reference, options.store, options.out, options.until, options.every, lambda: bool(told))


if __name__ == "__main__":
    main()

"""How fast the diffusion world model trains and dreams, and what memory it takes, beside DIAMOND's public code.

`python -m benchmarks.world_model --reference PATH [--quick] [--out DIR]`, PATH being a checkout of
github.com/eloialonso/diamond (measured against commit 5bcd159). Both are run on the same batch of real play of Pong
with the same weights, in turn, each in a process of its own for each figure, ours as `worldmodels train` runs it, the
reference as its trainer does, in eager mode. Without --reference there is nothing to compare with: "anchor": "self".

`--loss` is a run of its own: 200 equal training steps of both (same weights, batches and noise), and their losses.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.results import publish
from worldmodels import hardware
from worldmodels.data.sources.atari_play import atari_play
from worldmodels.learners.base import decay_groups
from worldmodels.models.diffusion import DiffusionWorldModel
from worldmodels.models.frames import to_float
from worldmodels.types import Segment

ACTIONS = 6  # Pong's own are among them as fire, up, down, ...; what is drawn does not matter to the speed
BATCH, DENOISER_ROWS, REWARD_ROWS = 32, 5, 18  # transitions; frames are one more: 6 and 19
LOSS_BATCH, LOSS_STEPS, LOSS_TAIL = 4, 200, 50
TRAIN = {"train_step_speedup": "paper", "train_step_speedup_small": "small"}
LIMITS = {
    "train_step_speedup": "at least 4",
    "train_step_speedup_small": "at least 2.5",
    "reward_step_speedup": "at least 4",
    "imagine_speedup_batch1": "at least 1.5",
    "imagine_speedup_batch32": "at least 4",
    "imagine_speedup_batch1_few_step": "at least 4",
    "imagine_speedup_batch32_few_step": "at least 10",
    "memory_ratio": "at most 0.65 (paper)",
    "memory_ratio_small": "at most 0.60",
    "frames_per_s_tiny_batch1": "at least 40",
    "loss_ratio_200": "within 0.02 of 1",
}
Step = Callable[[], Any]


def small(sampler: dict[str, Any] | None = None, **denoiser: Any) -> DiffusionWorldModel:
    """DIAMOND's networks in the size that the reference was measured in: 32 channels, one block a level."""
    network = {"context": 4, "cond_channels": 128, "channels": [32] * 4, "depths": [1] * 4, "normed_skip": True}
    changes = {"denoiser": {"network": network, **denoiser}, "sampler": sampler or {}}
    return reference.model_of("paper", ACTIONS, sizes={"paper": changes})


def few_step() -> DiffusionWorldModel:
    """The same with a denoiser that makes a frame by one call; benchmarks.few_step tells what such frames are worth."""
    return small({"steps": 1, "start": "sigma"}, few_step={"doublings": 1})


def model_of(size: str) -> DiffusionWorldModel:
    """`paper` and `tiny` as they are, `small` as the reference's SMALL, `few_step` as that with one call a frame."""
    own = {"small": small, "few_step": few_step}
    return own[size]() if size in own else reference.model_of(size, ACTIONS)


def play(steps: int) -> list[Any]:
    """Episodes of Pong, cut after 500 steps."""
    return list(atari_play(steps, seed=0, game="pong", size=64, colour="rgb", time_limit=500))


def batch(episodes: list[Any], size: int, length: int, rng: np.random.Generator) -> Segment:
    """Random windows of `length` transitions, all of them real."""
    which = rng.integers(len(episodes), size=size)
    starts = [int(rng.integers(len(episodes[e]) - length)) for e in which]

    def column(name: str, extra: int = 0) -> Tensor:
        rows = (getattr(episodes[e], name)[t : t + length + extra] for e, t in zip(which, starts, strict=True))
        return torch.from_numpy(np.stack(list(rows)))

    real = torch.ones(size, length, dtype=torch.bool)
    return Segment(
        obs=column("obs", 1).permute(0, 1, 4, 2, 3).contiguous(),
        action=column("action").long() % ACTIONS,
        reward=column("reward"),
        terminated=column("terminated"),
        truncated=column("truncated"),
        mask=real,
        next_mask=real,
    )


def our_step(part: str, size: str) -> Step:
    """A training step of the denoiser or of the reward model, as the learner takes it."""
    hardware.tune_allocator()
    model = model_of(size)
    segment = batch(play(600), BATCH, DENOISER_ROWS if part == "denoiser" else REWARD_ROWS, np.random.default_rng(0))
    return our_update(model, part, lambda: segment)


def our_update(model: DiffusionWorldModel, part: str, next_batch: Callable[[], Segment]) -> Callable[..., float]:
    """Loss, gradients, clip, update."""
    component = model.components()[part]
    optimizer = torch.optim.AdamW(decay_groups(component, 1e-2), lr=1e-4, eps=1e-8, fused=True)
    bf16 = hardware.precision("auto") == "bf16-mixed"

    def step(generator: torch.Generator | None = None) -> float:
        segment = next_batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if part == "denoiser":
                loss, *_ = model.denoiser.loss(segment, generator)
            else:
                frames = to_float(segment.obs)
                loss, _ = model.reward_model.loss(segment, frames[:, :-1], frames[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(component.parameters(), 1.0 if part == "denoiser" else 100.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_step(path: Path, part: str, size: str) -> Step:
    """The same by the reference's modules and its optimiser."""
    modules = reference.load(path)
    model = model_of(size)
    networks = dict(zip(("denoiser", "reward_model"), reference.theirs(modules, model), strict=True))
    segment = batch(play(600), BATCH, DENOISER_ROWS if part == "denoiser" else REWARD_ROWS, np.random.default_rng(0))
    ready = reference.batch_of(modules, segment)
    return their_update(modules, networks[part], part, lambda: ready)


def their_update(modules: Any, network: Any, part: str, next_batch: Callable[[], Any]) -> Callable[[], float]:
    """Loss, gradients, clip, update."""
    optimizer = modules.utils.configure_opt(network, lr=1e-4, weight_decay=1e-2, eps=1e-8)

    def step() -> float:
        loss, _ = network(next_batch())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0 if part == "denoiser" else 100.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_dream(size: str, rows: int) -> Step:
    """An imagined step with reward and termination, at three network calls (tiny and few_step: at one)."""
    hardware.tune_allocator()
    model = model_of(size)
    if hardware.precision("auto") == "bf16-mixed":
        model.quicken()
    context = batch(play(600), rows, 4, np.random.default_rng(0))
    state, action = model.start(context), context.action[:, -1]

    def step() -> None:
        nonlocal state
        state, _ = model.step(state, action)

    return step


def their_dream(path: Path, size: str, rows: int) -> Step:
    """Frame, reward and termination by the reference's sampler, at three network calls, and networks."""
    modules = reference.load(path)
    denoiser, reward = reference.theirs(modules, small())
    settings = modules.diffusion.DiffusionSamplerConfig(num_steps_denoising=3)
    sampler = modules.diffusion.DiffusionSampler(denoiser, settings)
    context = batch(play(600), rows, 4, np.random.default_rng(0))
    frames, action = to_float(context.obs)[:, -4:], context.action
    memory = None

    @torch.no_grad()
    def step() -> None:
        nonlocal frames, memory
        image, _ = sampler.sample(frames, action)
        logits = reward.predict_rew_end(frames[:, -1:], action[:, -1:], image[:, None], memory)
        memory = logits[2]
        for p in logits[:2]:
            p.softmax(-1)[:, 0].multinomial(1)
        frames = torch.cat([frames[:, 1:], image[:, None]], 1)

    return step


def worker(pipe: Any, make: Callable[[], Step]) -> None:
    """Set a step up, take one, then one whenever asked; at the end tell the peak of this process's memory in MB."""
    step = make()
    step()
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    pipe.send(int(status["VmHWM"].split()[0]) / 1024)


def in_turn(makers: dict[str, Callable[[], Step]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds a step (median) and peak memory of each, a step of each in turn, so that both meet each load."""
    context, pipes, seconds = get_context("spawn"), {}, {name: [] for name in makers}
    for name, make in makers.items():
        pipes[name], end = context.Pipe()
        context.Process(target=worker, args=(end, make), daemon=True).start()
        pipes[name].recv()
    for _ in range(repeats):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    result = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        result[name] = {"seconds": statistics.median(seconds[name]), "memory_mb": pipe.recv()}
    return result


def speeds(path: Path | None, quick: bool) -> Iterator[tuple[str, float]]:
    """Every figure but the losses, by name."""

    def both(ours: Callable[..., Step], theirs: Callable[..., Step], *arguments: Any, repeats: int) -> dict[str, Any]:
        makers: dict[str, Callable[[], Step]] = {"ours": partial(ours, *arguments)}
        if path is not None:
            makers["reference"] = partial(theirs, path, *arguments)
        return in_turn(makers, repeats)

    for key, part, size, repeats in (
        ("train_step", "denoiser", "paper", 3),
        ("train_step_small", "denoiser", "small", 8),
        ("reward_step", "reward_model", "paper", 3),
    ):
        found = both(our_step, their_step, part, size, repeats=repeats if quick else 3 * repeats)
        yield from _told(key.replace("step", "step_speedup"), key, found)
        memory = {name: f["memory_mb"] for name, f in found.items()}
        yield from ((f"{key}_memory_mb_{name}", value) for name, value in memory.items())
        if path is not None and part == "denoiser":
            yield key.replace("train_step", "memory_ratio"), memory["ours"] / memory["reference"]
    for rows, repeats in ((1, 30), (32, 5)):
        for size, name in (("small", ""), ("few_step", "_few_step")):
            found = both(our_dream, their_dream, size, rows, repeats=repeats if quick else 3 * repeats)
            yield from _told(f"imagine_speedup_batch{rows}{name}", f"imagine_batch{rows}{name}", found)
    found = in_turn({"ours": partial(our_dream, "tiny", 1)}, 100)
    yield "frames_per_s_tiny_batch1", 1 / found["ours"]["seconds"]


def _told(ratio: str, key: str, found: dict[str, dict[str, float]]) -> Iterator[tuple[str, float]]:
    if "reference" in found:
        yield ratio, found["reference"]["seconds"] / found["ours"]["seconds"]
    yield from ((f"{key}_seconds_{name}", f["seconds"]) for name, f in found.items())


def losses(path: Path | None, steps: int) -> dict[str, list[float]]:
    """The denoising loss of equal steps: ours as it is trained, and the reference's from the same weights and draws."""
    hardware.tune_allocator()
    model, episodes, draws = small(), play(3000), torch.Generator().manual_seed(0)

    def batches() -> Callable[[], Segment]:
        rng = np.random.default_rng(1)
        return lambda: batch(episodes, LOSS_BATCH, DENOISER_ROWS, rng)

    curves: dict[str, list[float]] = {}
    theirs = None
    if path is not None:
        modules = reference.load(path)
        network, _ = reference.theirs(modules, model)
        reference.share_noise(network, model.denoiser, draws)
        segments = batches()
        theirs = their_update(modules, network, "denoiser", lambda: reference.batch_of(modules, segments()))
    ours = our_update(model, "denoiser", batches())
    curves["ours"] = [ours(draws) for _ in range(steps)]
    if theirs is not None:
        draws.manual_seed(0)
        curves["reference"] = []
        for _ in range(steps):
            torch.rand((), generator=draws)  # ours asks whether there is a second target
            curves["reference"].append(theirs())
    return curves


def main() -> None:
    """Print the figures and their limits, and the same as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of github.com/eloialonso/diamond")
    parser.add_argument("--quick", action="store_true", help="a third of the repeats")
    parser.add_argument("--loss", action="store_true", help="the run of its own: losses of 200 equal steps")
    parser.add_argument("--out", type=Path, help="folder for world_model.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if options.loss:
        curves = losses(options.reference, LOSS_STEPS)
        for t in range(0, LOSS_STEPS, 10):
            print(f"step {t:>4}  " + "  ".join(f"{n} {statistics.mean(c[t : t + 10]):.4f}" for n, c in curves.items()))
        tails = {name: statistics.mean(curve[-LOSS_TAIL:]) for name, curve in curves.items()}
        figures = {f"loss_{name}": value for name, value in tails.items()} | {"curves": curves}
        if "reference" in tails:
            figures["loss_ratio_200"] = tails["ours"] / tails["reference"]
            print(f"loss_ratio_200 {figures['loss_ratio_200']:.4f}  {LIMITS['loss_ratio_200']}")
    else:
        for name, value in speeds(options.reference, options.quick):
            figures[name] = round(value, 4)
            print(f"{name:<40} {figures[name]:>10,.4g}  {LIMITS.get(name, '')}", flush=True)
    anchor = "self" if options.reference is None else "reference"
    publish("world_model", figures, options.out, anchor=anchor)


if __name__ == "__main__":
    main()

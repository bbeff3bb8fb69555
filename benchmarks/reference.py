"""Does size=paper compute what DIAMOND's public code computes? Same weights and inputs into both; largest differences.

`python -m benchmarks.reference --reference PATH [--quick] [--out DIR]`, PATH being a checkout of
github.com/eloialonso/diamond (measured against commit 5bcd159). Without it nothing is compared and nothing claimed.
"""

import argparse
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import publish
from tests.conformance import random_segment
from worldmodels.config import build, conf_dir, plain, sized
from worldmodels.models.diffusion import DiffusionWorldModel
from worldmodels.models.frames import to_float
from worldmodels.ops.edm import add_noise, training_sigmas
from worldmodels.portable.diamond import our_name, world_names
from worldmodels.types import Segment, UserError

LIMIT = 1e-5
NAMES = world_names(levels=4)


def load(path: Path) -> SimpleNamespace:
    """The modules of a checkout. What it needs of torcheval, a count for its logs, is put in its place.

    Raises:
        UserError: there is no checkout at `path`.
    """
    source = path.expanduser().absolute() / "src"
    if not (source / "models" / "diffusion" / "denoiser.py").exists():
        raise UserError(f"--reference {path} is no checkout of github.com/eloialonso/diamond: it has no src/models")
    sys.path.insert(0, str(source))
    functional: Any = ModuleType("torcheval.metrics.functional")
    functional.multiclass_confusion_matrix = _confusion
    for name in ("torcheval", "torcheval.metrics"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules.setdefault(functional.__name__, functional)
    names = {"diffusion": "models.diffusion", "reward": "models.rew_end_model", "data": "data", "utils": "utils"}
    return SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})


def _confusion(logits: Tensor, target: Tensor, num_classes: int) -> Tensor:
    index = target * num_classes + logits.argmax(1)
    return index.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def theirs(modules: SimpleNamespace, ours: DiffusionWorldModel) -> tuple[Any, Any]:
    """The reference's denoiser and reward model in our model's size, with our model's weights."""
    network, encoder = ours.denoiser.network, ours.reward_model.encoder
    shape = {"img_channels": ours.image_channels, "num_actions": ours.num_actions}
    inner = modules.diffusion.InnerModelConfig(
        **shape, num_steps_conditioning=ours.context, **_levels(network.unet.encoder), cond_channels=_width(network)
    )
    denoiser = modules.diffusion.Denoiser(
        modules.diffusion.DenoiserConfig(inner, ours.denoiser.sigma_data, ours.denoiser.sigma_offset)
    )
    denoiser.setup_training(modules.diffusion.SigmaDistributionConfig(**ours.denoiser.noise))
    reward = modules.reward.RewEndModel(
        modules.reward.RewEndModelConfig(
            **shape, lstm_dim=ours.reward_model.lstm.hidden_size, img_size=ours.image_size, **_levels(encoder),
            cond_channels=ours.reward_model.action_embedding.embedding_dim,
        )
    )  # fmt: skip
    copy_weights(ours.denoiser.network, denoiser)
    copy_weights(ours.reward_model, reward)
    return denoiser, reward


def _width(network: Any) -> int:
    return network.condition[0].in_features


def _levels(encoder: Any) -> dict[str, list[int]]:
    channels = [level[-1].conv2.out_channels for level in encoder.levels]
    return {
        "channels": channels,
        "depths": [len(level) for level in encoder.levels],
        "attn_depths": [0] * len(channels),
    }


def copy_weights(ours: nn.Module, other: nn.Module) -> None:
    """Put our weights into the reference's module, by name; every one must find its place and have its shape."""
    weights, left = dict(other.state_dict()), dict(ours.state_dict())
    for name, value in weights.items():
        weights[name] = left.pop(our_name(name, NAMES)).reshape(value.shape)
    if left:
        raise AssertionError(f"the reference has no place for {sorted(left)}")
    other.load_state_dict(weights)


def model_of(size: str, num_actions: int = 4, **changes: Any) -> DiffusionWorldModel:
    """Our model in one of its sizes, with weights that are nowhere zero."""
    from omegaconf import OmegaConf

    cfg = OmegaConf.merge(OmegaConf.load(conf_dir() / "model" / "diffusion.yaml"), {"size": size}, changes)
    torch.manual_seed(0)
    model = build(sized(plain(OmegaConf.merge(cfg, {"num_actions": num_actions}))))
    for weight in model.parameters():  # else what comes before a layer that starts at zero would not be seen
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    return model


def batch_of(modules: SimpleNamespace, segment: Segment) -> Any:
    """A segment as the reference's batch: its last row is the one after our last transition."""
    obs = to_float(segment.obs)

    def column(x: Tensor) -> Tensor:
        return torch.cat([x, x[:, -1:]], dim=1)

    return modules.data.Batch(
        obs=obs,
        act=column(segment.action),
        rew=column(segment.reward),
        end=torch.zeros_like(column(segment.action)),
        trunc=torch.zeros_like(column(segment.action)),
        mask_padding=column(segment.mask),
        info=[{}] * segment.batch_size,
        segment_ids=[],
    )


def share_noise(denoiser: Any, ours: Any, generator: torch.Generator) -> None:
    """Make the reference draw its training noise as our denoiser does, from the same generator."""
    denoiser.sample_sigma_training = lambda n, device: training_sigmas(
        n, **ours.noise, generator=generator, device=device
    )
    denoiser.apply_noise = lambda x, sigma, offset: add_noise(x, sigma, offset, generator)


@torch.no_grad()
def compare(modules: SimpleNamespace, ours: DiffusionWorldModel) -> dict[str, float]:
    """Largest absolute differences of outputs, of order 1, and relative ones of the loss and its gradients."""
    denoiser, reward = theirs(modules, ours)
    g = torch.Generator().manual_seed(0)
    segment = random_segment(4, 19, ours.image_channels, ours.image_size, num_actions=ours.num_actions)
    frames, k = to_float(segment.obs), ours.context
    context, action = frames[:, :k], segment.action[:, :k]
    figures: dict[str, float] = {}

    sigma = torch.tensor([0.002, 0.3, 1.0, 20.0])
    noisy = add_noise(frames[:, k], sigma, ours.denoiser.sigma_offset, g)
    centre = ours.denoiser.centre_of(context)
    c = denoiser.compute_conditioners(sigma)
    output = denoiser.compute_model_output(noisy, context.flatten(1, 2), action, c)
    denoised, c_out = ours.denoiser.predict(noisy, sigma, context, action, centre)
    figures["denoiser_network"] = _apart((denoised - c.c_skip * noisy) / c_out, output)
    figures["denoised_frame"] = _apart(denoised, c.c_skip * noisy + c.c_out * output)

    memory = (torch.randn(1, 4, 512, generator=g), torch.randn(1, 4, 512, generator=g))
    mine, ends, _ = ours.reward_model(frames[:, :-1], frames[:, 1:], segment.action, memory)
    other, other_ends, _ = reward.predict_rew_end(frames[:, :-1], segment.action, frames[:, 1:], memory)
    figures["reward_logits"], figures["termination_logits"] = _apart(mine, other), _apart(ends[:, :, 0], other_ends)

    settings = modules.diffusion.DiffusionSamplerConfig(num_steps_denoising=3)
    sampler = modules.diffusion.DiffusionSampler(denoiser, settings)
    figures["sigmas"] = _apart(sampler.sigmas, torch.tensor([5.0, 0.283082, 0.002, 0.0]))
    torch.manual_seed(1)
    shown, _ = sampler.sample(context, action)
    mine = ours._sample(context, action, torch.Generator().manual_seed(1))
    figures["sampled_share_of_levels_that_differ"] = ((shown - mine).abs() > 1 / 255).float().mean().item()
    # a difference of 1e-7 can move a pixel across the border between two levels, so they are also compared unrounded
    denoiser.wrap_model_output = lambda noisy, output, c: c.c_skip * noisy + c.c_out * output
    ours.denoiser.quantize = lambda image, centre: image
    torch.manual_seed(1)
    figures["sampled_frame"] = _apart(sampler.sample(context, action)[0], ours._sample(context, action, _seeded(1)))
    del ours.denoiser.quantize
    denoiser, reward = theirs(modules, ours)

    with torch.enable_grad():
        short = segment.steps(0, ours.min_length)
        ours.denoiser.loss(short, g.manual_seed(2))[0].backward()
        share_noise(denoiser, ours.denoiser, g.manual_seed(2))
        torch.rand((), generator=g)  # ours asks whether this batch has a second target; at paper size each has
        denoiser(batch_of(modules, short))[0].backward()
        figures["denoiser_gradient"] = _gradients_apart(ours.denoiser.network, denoiser)
        # the reference looks up one end in a row of a batch, so that no row may have more,
        # and nothing real after it, since it overwrites that frame
        terminated = segment.terminated & (segment.terminated.cumsum(1) == 1)
        going_on = terminated.cumsum(1) - terminated.long() == 0
        segment = replace(segment, terminated=terminated, mask=going_on)
        ours.reward_model.loss(segment, frames[:, :-1], frames[:, 1:])[0].backward()
        batch = batch_of(modules, segment)
        batch.end[:, :-1] = segment.terminated
        reward(_with_final(batch, frames))[0].backward()
        figures["reward_gradient"] = _gradients_apart(ours.reward_model, reward)
    return figures


def _with_final(batch: Any, frames: Tensor) -> Any:
    """With the frame after the end of each row where the reference looks it up: the one before it once more."""
    batch.info = [{"final_observation": frames[i, t]} for i, t in enumerate(batch.end[:, :-1].argmax(1))]
    return batch


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _apart(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _gradients_apart(ours: nn.Module, other: nn.Module) -> float:
    """Norm of the difference of all gradients over their norm."""
    theirs_ = {name: p.grad for name, p in other.named_parameters()}
    mine: list[Tensor] = []
    for name, p in other.named_parameters():
        gradient = ours.get_parameter(our_name(name, NAMES)).grad
        assert gradient is not None
        mine.append(gradient.reshape(p.shape).flatten())
    a, b = torch.cat(mine), torch.cat([g.flatten() for g in theirs_.values() if g is not None])
    return ((a - b).norm() / b.norm()).item()


def main() -> None:
    """Print the differences, and the same as JSON in the last line; exit 1 where one passes 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, help="checkout of github.com/eloialonso/diamond")
    parser.add_argument("--quick", action="store_true", help="the same: there is nothing to repeat")
    parser.add_argument("--out", type=Path, help="folder for reference.json")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    if options.reference is None:
        print("no --reference given: nothing is compared")
    else:
        figures = compare(load(options.reference), model_of("paper"))
        for name, value in figures.items():
            print(f"{name:<40} {value:.2e}  {'' if name.endswith('differ') else f'at most {LIMIT}'}")
    anchor = "self" if options.reference is None else "reference"
    publish("reference", figures, options.out, anchor=anchor)
    if any(value > LIMIT for name, value in figures.items() if not name.endswith("differ")):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Do the agents of DIAMOND's public code, imported, compute here what they compute there? Largest differences.

`python -m benchmarks.diamond_weights --reference CHECKOUT [--fixture FOLDER] [--quick] [--out DIR]`, CHECKOUT being one
of github.com/eloialonso/diamond (measured against commit 5bcd159). For games of 4, 6 and 18 actions an `Agent` is made
of its classes by its published config, with random weights of which none is zero, and saved as its trainer saves it.
`worldmodels import-diamond` then reads the file, and both see the same frames, actions, memories and noise. What is
expected always comes from the public code.

With `--fixture` a tiny agent and its outputs are written for the tests that run without a checkout:
diamond_agent_tiny.pt and diamond_agent_tiny.safetensors.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.reference import LIMIT, load
from benchmarks.results import publish
from worldmodels.evaluation.scores import game_facts
from worldmodels.models.frames import to_float
from worldmodels.portable.diamond import convert
from worldmodels.portable.folder import load_model, write_model

GAMES = ("breakout", "pong", "alien")  # 4, 6 and 18 actions
TINY = {
    "denoiser": {"inner_model": {"cond_channels": 32, "depths": [1, 2], "channels": [8, 16], "attn_depths": [0, 1]}},
    "rew_end_model": {"lstm_dim": 8, "cond_channels": 8, "depths": [1, 1], "channels": [8, 16], "attn_depths": [1, 0]},
    "actor_critic": {"lstm_dim": 12, "channels": [8, 16], "down": [1, 0]},
}
"""What the tiny agent has otherwise than the published config; its frames are 16x16."""
Outputs = dict[str, Tensor]


def agent_of(checkout: Path, game: str, changes: dict[str, Any] | None = None, size: int | None = None) -> Any:
    """An `Agent` of the public code by the config of the checkout, for a game, with weights that are nowhere zero."""
    config = checkout / "config"
    cfg = OmegaConf.create(
        {"agent": OmegaConf.load(config / "agent" / "default.yaml"), "env": OmegaConf.load(config / "env/atari.yaml")}
    )
    if size is not None:
        cfg.env.train.size = size
    cfg.agent = OmegaConf.merge(cfg.agent, changes or {})
    torch.manual_seed(0)
    settings = instantiate(cfg.agent, num_actions=len(game_facts(game)["actions"]))
    agent = importlib.import_module("agent").Agent(settings).eval()
    for weight in agent.parameters():  # else what comes before a layer that starts at zero would not be seen
        if not weight.any():
            nn.init.normal_(weight, std=0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5)
    return agent


def inputs_of(agent: Any, batch: int, steps: int, seed: int) -> Outputs:
    """Frames, actions in the game's own numbers, memories and noise to be shown to both."""
    g = torch.Generator().manual_seed(seed)
    inner, lstm = agent.denoiser.cfg.inner_model, agent.rew_end_model.cfg.lstm_dim
    shape = (inner.img_channels, *[agent.rew_end_model.cfg.img_size] * 2)
    frames = torch.randint(0, 256, (batch, steps + 1, *shape), generator=g, dtype=torch.uint8)
    given = {
        "frames": frames,
        "action": torch.randint(0, inner.num_actions, (batch, steps), generator=g),
        "noisy": torch.randn(batch, *shape, generator=g),
        "sigma": torch.tensor([0.002, 0.3, 1.0, 20.0])[:batch],
        "noise": torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1)),
    }
    widths = {"": lstm, "policy_": agent.actor_critic.lstm_dim}
    return given | {
        f"{who}{name}": torch.randn(batch, width, generator=g) for who, width in widths.items() for name in ("h", "c")
    }


@torch.no_grad()
def expected(modules: Any, agent: Any, given: Outputs) -> Outputs:
    """What the public code makes of the inputs."""
    frames, k = to_float(given["frames"]), agent.denoiser.cfg.inner_model.num_steps_conditioning
    context, action = frames[:, :k], given["action"][:, :k]
    denoiser, flat = agent.denoiser, context.flatten(1, 2)
    c = denoiser.compute_conditioners(given["sigma"])
    output = denoiser.compute_model_output(given["noisy"], flat, action, c)
    memory = (given["h"][None], given["c"][None])
    reward, end, (h, cell) = agent.rew_end_model.predict_rew_end(frames[:, :-1], given["action"], frames[:, 1:], memory)
    act = agent.actor_critic.predict_act_value(frames[:, 0], (given["policy_h"], given["policy_c"]))
    second = agent.actor_critic.predict_act_value(frames[:, 1], act.hx_cx)
    told = {
        "denoised": c.c_skip * given["noisy"] + c.c_out * output,
        "reward_logits": reward,
        "end_logits": end,
        "hidden": h[0],
        "cell": cell[0],
        "action_logits": torch.stack([act.logits_act, second.logits_act]),
        "value": torch.stack([act.val, second.val]),
        "policy_hidden": second.hx_cx[0],
        "policy_cell": second.hx_cx[1],
    }
    sampler = modules.diffusion.DiffusionSampler(denoiser, modules.diffusion.DiffusionSamplerConfig(3))
    told["frame"] = _sample(sampler, context, action, given["noise"])
    # a difference of 1e-7 can move a pixel across the border between two levels, so both are also compared unrounded
    denoiser.wrap_model_output = lambda noisy, output, c: c.c_skip * noisy + c.c_out * output
    told["frame_unrounded"] = _sample(sampler, context, action, given["noise"])
    del denoiser.wrap_model_output
    return told


def _sample(sampler: Any, context: Tensor, action: Tensor, noise: Tensor) -> Tensor:
    torch.manual_seed(1)
    shown, trajectory = sampler.sample(context, action)
    assert torch.equal(trajectory[0], noise), "the sampler draws other noise than is given"
    return shown


@torch.no_grad()
def ours_of(model: Any, policy: Any, given: Outputs) -> Outputs:
    """What the imported world model and policy make of the same inputs, by the same names."""
    frames, k = to_float(given["frames"]), model.context
    full = torch.tensor(policy.actions)
    action = full[given["action"]]
    context, before = frames[:, :k], action[:, :k]
    memory = (given["h"][None], given["c"][None])
    reward, end, (h, cell) = model.reward_model(frames[:, :-1], frames[:, 1:], action, memory)
    state, seen = {"hidden": given["policy_h"], "cell": given["policy_c"]}, []
    for t in range(2):
        features, state = policy.encoder(given["frames"][:, t], state)
        seen.append((policy.preferences(features)[:, full], policy.critic.mean(features)))
    told = {
        "denoised": model.denoiser.predict(
            given["noisy"], given["sigma"], context, before, model.denoiser.centre_of(context)
        )[0],
        "reward_logits": reward,
        "end_logits": end[:, :, 0],
        "hidden": h[0],
        "cell": cell[0],
        "action_logits": torch.stack([logits for logits, _ in seen]),
        "value": torch.stack([value for _, value in seen]),
        "policy_hidden": state["hidden"],
        "policy_cell": state["cell"],
        "frame": model._sample(context, before, torch.Generator().manual_seed(1)),
    }
    model.denoiser.quantize = lambda image, centre: image
    told["frame_unrounded"] = model._sample(context, before, torch.Generator().manual_seed(1))
    del model.denoiser.quantize
    return told


def apart(ours: Outputs, theirs: Outputs) -> dict[str, float]:
    """Largest absolute difference of each output; of rounded frames the share of pixels on another level."""
    assert ours.keys() == theirs.keys()
    figures = {}
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        difference = (ours[name] - value).abs()
        rounded = name == "frame"
        figures["frame_share_of_levels_that_differ" if rounded else name] = (
            (difference > 1 / 255).float().mean() if rounded else difference.max()
        ).item()
    return figures


def imported(file: Path, game: str, folder: Path) -> tuple[Any, Any]:
    """World model and policy of an agent's file, by way of the folders that `worldmodels import-diamond` writes."""
    for name, (about, weights) in convert(file, game).items():
        write_model(folder / name, about, weights)
    return load_model(folder / "world_model")[0], load_model(folder / "policy")[0]


def compare(checkout: Path, modules: Any, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """The largest differences by game."""
    figures = {}
    for seed, game in enumerate(GAMES):
        agent = agent_of(checkout, game)
        given = inputs_of(agent, batch=4, steps=6, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "agent.pt")
            torch.save(agent.state_dict(), file)
            figures[game] = apart(ours_of(*imported(file, game, Path(folder)), given), expected(modules, agent, given))
        for name, value in figures[game].items():
            say(f"{game:<10} {name:<36} {value:.2e}  {'' if name.endswith('differ') else f'at most {LIMIT}'}")
    return figures


def write_fixture(checkout: Path, modules: Any, folder: Path) -> None:
    """A tiny agent of Breakout, as the public code saves it, with inputs and the outputs that it gives of them."""
    agent = agent_of(checkout, "breakout", TINY, size=16)
    given = inputs_of(agent, batch=2, steps=6, seed=0)
    torch.save(agent.state_dict(), folder / "diamond_agent_tiny.pt")
    outputs = {f"expected.{name}": value for name, value in expected(modules, agent, given).items()}
    tensors = {f"given.{name}": value for name, value in given.items()} | outputs
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "diamond_agent_tiny.safetensors")


def main() -> None:
    """Print the differences, and the same as JSON in the last line; exit 1 where one passes 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of github.com/eloialonso/diamond")
    parser.add_argument("--fixture", type=Path, help="folder to which the tiny agent and its outputs are written")
    parser.add_argument("--quick", action="store_true", help="the same: there is nothing to repeat")
    parser.add_argument("--out", type=Path, help="folder for diamond_weights.json")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    if options.reference is None:
        print("no --reference given: nothing is compared")
    else:
        modules = load(options.reference)
        figures = compare(options.reference, modules, print)
        if options.fixture:
            write_fixture(options.reference, modules, options.fixture)
    publish("diamond_weights", figures, options.out, anchor="self" if options.reference is None else "reference")
    if any(v > LIMIT for part in figures.values() for k, v in part.items() if not k.endswith("differ")):
        sys.exit(1)


if __name__ == "__main__":
    main()

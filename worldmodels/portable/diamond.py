"""DIAMOND's agents (eloialonso/diamond) as models of this program: the weights of its file, by our names.

A file is the state_dict of its `Agent` (src/agent.py): denoiser, rew_end_model and actor_critic. Names and shapes tell
the architecture. What they do not tell (noise levels, sampler, clipping of rewards) is as in DIAMOND's config, which is
our size=paper.

DIAMOND numbers the actions that have an effect in the game, we number ALE's 18: embeddings and logits are moved by the
name of the action. An action that the game has not is embedded as DIAMOND's first, which is NOOP but for games that it
was not published for, and the policy never takes it.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from worldmodels.config import conf_dir, plain, sized
from worldmodels.data.card import make_card
from worldmodels.data.sources.reading import game_of
from worldmodels.evaluation.scores import game_facts
from worldmodels.portable.checkpoints import read_tensors
from worldmodels.portable.folder import About, describe, rebuild
from worldmodels.types import ACTIONS, UserError

POLICY_NAMES = [
    (r"^encoder\.encoder\.", "encoder.look."),
    (r"\.f\.0\.norm\.", ".norm."),
    (r"\.f\.2\.", ".conv."),
    (r"\.skip_projection\.", ".skip."),
    (r"^lstm\.", "encoder.cell."),
    (r"^critic_linear", "critic.layer"),
    (r"^actor_linear", "actor"),
]
PUBLISHED = {
    "url": "https://github.com/eloialonso/diamond",
    "citation": "Alonso et al. 2024, Diffusion for World Modeling, arXiv:2405.12399",
}


def world_names(levels: int) -> list[tuple[str, str]]:
    """(theirs, ours) of denoiser and reward model, to be replaced in turn in what follows the part's name.

    Args:
        levels: of the reward model, after which its list of blocks goes on with what we call the middle.
    """
    return [
        (r"^inner_model\.|^encoder\.(?!level)", ""),
        (r"noise_emb\.weight", "noise_embedding.frequency"),
        (r"act_emb\.(0\.)?", "action_embedding."),
        (r"cond_proj", "condition"),
        (r"norm_out\.norm", "norm_out"),
        (r"unet\.d_blocks\.(\d+)\.resblocks", r"unet.encoder.levels.\1"),
        (r"unet\.u_blocks\.(\d+)\.resblocks", r"unet.levels.\1"),
        (r"unet\.mid_blocks\.resblocks", "unet.encoder.middle"),
        (r"unet\.downsamples\.(\d+)\.conv", r"unet.encoder.down.\1"),
        (r"unet\.upsamples", "unet.up"),
        (rf"^blocks\.{levels}\.resblocks", "encoder.middle"),
        (r"^blocks\.(\d+)\.resblocks", r"encoder.levels.\1"),
        (r"^downsamples\.(\d+)\.conv", r"encoder.down.\1"),
        (r"\.proj\.", ".skip."),
        (r"\.attn\.norm\.norm", ".attention.norm"),
        (r"\.attn\.(qkv|out)_proj", r".attention.\1"),
    ]


def our_name(name: str, table: Sequence[tuple[str, str]]) -> str:
    """What we call a weight that they call `name`, which is without its part's own."""
    for theirs, ours in table:
        name = re.sub(theirs, ours, name)
    return name


def read_agent(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file of DIAMOND's; nothing in it is run.

    Raises:
        UserError: the file is missing, damaged, holds more than tensors, or other tensors.
    """
    path = Path(path).absolute()
    weights = read_tensors(path, "give a file of DIAMOND's, such as its Breakout.pt")
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(
            f"{path} is no agent of DIAMOND: it is no state_dict, which names tensors and holds nothing else"
        )
    return {str(name): value.float() for name, value in weights.items()}


def convert(path: str | Path, game: str | None = None) -> dict[str, tuple[About, dict[str, Tensor]]]:
    """World model and policy of an agent, as `portable.folder.write_model` takes them: what is told, and the weights.

    Args:
        path: a file such as Breakout.pt.
        game: its game in any usual spelling; by default the name of the file.

    Returns:
        Of "world_model" and of "policy".

    Raises:
        UserError: the file is no agent of DIAMOND, is of another architecture or for another number of actions, or
            there is no such game.
    """
    path = Path(path)
    weights = read_agent(path)
    game = game_of(game or path.stem, path)
    actions: list[int] = game_facts(game)["actions"]
    try:
        if (count := len(weights["actor_critic.actor_linear.bias"])) != len(actions):
            raise UserError(
                f"{path} is for {count} actions but {game} has {len(actions)}; give the game that it plays as game=..."
            )
        world = _world_model(weights)
        policy = _policy(weights, world["image_size"])
        tensors = _world_weights(weights, actions), _policy_weights(weights, actions)
    except KeyError as error:
        raise _foreign(path, f"it lacks {error}") from error
    except UserError:
        raise
    except (IndexError, ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise _foreign(path, f"its weights have other shapes ({error})") from error
    size = world["image_size"]
    card = make_card(
        "diamond",
        game,
        {"height": size, "width": size, "channels": world["image_channels"]},
        action_set=actions,
        noop_max=30,
        time_limit=27_000,
        policy={"type": "DIAMOND's actor-critic, as it learned in the model's dreams, with random actions"},
        dataset=PUBLISHED
        | {
            "name": "what DIAMOND played while it trained",
            "note": "a lost life ended an episode; the model foresees one as an end, and fits play of whole games",
        },
    )
    source = PUBLISHED | {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    told = {
        "world_model": describe(world, card, source=source | {"parts": "denoiser, rew_end_model"}),
        "policy": describe(policy, card, actions, source=source | {"parts": "actor_critic"}),
    }
    models = {name: (told[name], part) for name, part in zip(told, tensors, strict=True)}
    for about, part in models.values():
        try:
            rebuild(about, part, path)
        except UserError as error:
            raise _foreign(path, str(error.__cause__ or error).strip().splitlines()[-1].strip()) from error
    return models


def _foreign(path: Path, why: str) -> UserError:
    return UserError(f"{path} is no agent of DIAMOND's Atari code: {why}; its CSGO model and changed code are not read")


def _world_model(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of our world model, with what the shapes tell in the place of what was published."""
    model = sized(plain(OmegaConf.load(conf_dir() / "model" / "diffusion.yaml")) | {"size": "paper"})
    inner, reward = "denoiser.inner_model.", "rew_end_model."
    width = len(weights[f"{inner}cond_proj.0.bias"])
    context = width // weights[f"{inner}act_emb.0.weight"].shape[1]
    model["image_channels"] = weights[f"{inner}conv_out.weight"].shape[0]
    network = _levels(weights, f"{inner}unet.d_blocks") | {"context": context, "cond_channels": width}
    model["denoiser"]["network"] |= network
    levels = _levels(weights, f"{reward}encoder.blocks")
    levels = {name: values[:-1] for name, values in levels.items()}  # the last is their middle
    lstm, side = _lstm(weights, f"{reward}lstm.weight_ih_l0", levels["channels"][-1])
    model["reward_model"] |= levels | {"lstm": lstm, "cond_channels": weights[f"{reward}act_emb.weight"].shape[1]}
    model["image_size"] = side * 2 ** (len(levels["channels"]) - 1)
    return model


def _policy(weights: Mapping[str, Tensor], size: int) -> dict[str, Any]:
    """Settings of our actor-critic for frames of `size`."""
    model = plain(OmegaConf.load(conf_dir() / "model" / "actor_critic.yaml"))
    model = sized({k: v for k, v in model.items() if k != "defaults"} | {"size": "paper"})
    found = re.compile(r"actor_critic\.encoder\.encoder\.(\d+)\.f\.2\.weight")
    blocks = {int(m[1]): value.shape[0] for name, value in weights.items() if (m := found.fullmatch(name))}
    places, channels = sorted(blocks), [blocks[k] for k in sorted(blocks)]
    # a pooling between two blocks takes a place in their list; one behind the last is told by the LSTM's width
    pools = [b - a == 2 for a, b in zip(places, places[1:], strict=False)]
    lstm, side = _lstm(weights, "actor_critic.lstm.weight_ih", channels[-1])
    pools.append(size // 2 ** sum(pools) != side)
    model["encoder"] |= {"channels": channels, "pools": pools, "lstm": lstm}
    return model | {"head": plain(OmegaConf.load(conf_dir() / "head" / "mse.yaml"))}


def _levels(weights: Mapping[str, Tensor], prefix: str) -> dict[str, list[Any]]:
    """Channels, depths and attention of the levels of blocks below `prefix`."""
    found = re.compile(re.escape(prefix) + r"\.(\d+)\.resblocks\.(\d+)\.conv1\.weight")
    blocks = {(int(m[1]), int(m[2])): value.shape[0] for name, value in weights.items() if (m := found.fullmatch(name))}
    count = 1 + max((level for level, _ in blocks), default=0)
    attending = {name.removeprefix(f"{prefix}.").partition(".")[0] for name in weights if ".attn.qkv" in name}
    return {
        "channels": [blocks[level, 0] for level in range(count)],
        "depths": [sum(a == level for a, _ in blocks) for level in range(count)],
        "attention": [str(level) in attending for level in range(count)],
    }


def _lstm(weights: Mapping[str, Tensor], name: str, channels: int) -> tuple[int, int]:
    """Width of an LSTM, and height and width of the image that it sees."""
    gates, inputs = weights[name].shape
    return gates // 4, math.isqrt(inputs // channels)


def _world_weights(weights: Mapping[str, Tensor], actions: Sequence[int]) -> dict[str, Tensor]:
    table = world_names(len(_levels(weights, "rew_end_model.encoder.blocks")["channels"]) - 1)
    parts = {"denoiser": "denoiser.network", "rew_end_model": "reward_model"}
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part != "actor_critic":
            ours[f"{parts.get(part, part)}.{our_name(rest, table)}"] = value
    frequency = "denoiser.network.noise_embedding.frequency"
    ours[frequency] = ours[frequency].flatten()
    for name in ("denoiser.network.action_embedding.weight", "reward_model.action_embedding.weight"):
        ours[name] = _by_name(ours[name], actions, ours[name][:1])
    return ours


def _policy_weights(weights: Mapping[str, Tensor], actions: Sequence[int]) -> dict[str, Tensor]:
    part = "actor_critic."
    ours = {our_name(k.removeprefix(part), POLICY_NAMES): v for k, v in weights.items() if k.startswith(part)}
    for name in ("actor.weight", "actor.bias"):
        ours[name] = _by_name(ours[name], actions, torch.zeros_like(ours[name][:1]))
    return ours


def _by_name(rows: Tensor, actions: Sequence[int], others: Tensor) -> Tensor:
    """Rows of the game's own actions, in ALE's order, as rows of the 18; the `others` are this one row."""
    full = others.repeat(len(ACTIONS), *[1] * (others.ndim - 1))
    full[list(actions)] = rows
    return full

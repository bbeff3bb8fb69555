"""What fine-tuning changed of a model, as a small folder that is of use beside the very model that it began with.

    adapter.json          which base it needs (SHA-256 of its weights, and what tells it to people), what was trained,
                          the model's settings, and what the run recorded
    adapter.safetensors   `NAME.lora_A` and `NAME.lora_B` of each weight with a low-rank change (Hu et al. 2021), and
                          whole tensors in place of others

The base lies beside it: a checkpoint `base.ckpt`, or a folder `base` of `worldmodels export-model`, in the adapter's
folder or next to it. `read_checkpoint` then reads the adapter as the model that the two make. Merging is
arithmetic, so that only training needs peft.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from worldmodels import __version__
from worldmodels.data.card import validate_card
from worldmodels.data.disk import atomic, disk_errors, make_folder, on_disk, read_json, remove, sync, write_json
from worldmodels.models.growing import regrown
from worldmodels.types import UserError

ABOUT, WEIGHTS = "adapter.json", "adapter.safetensors"
FORMAT, VERSION = "worldmodels adapter", 1
NEEDED = dict.fromkeys(("sha256", "weights_sha256", "base_sha256"), (str,))
NEEDED |= dict.fromkeys(("model", "card", "transform"), (dict,)) | {"scaling": (int, float)}
BASES = ("base", "base.ckpt")
SEARCH = ("search", "row_noise", "target_every", "clip_rewards")
"""What must be told of a MuZero's learner: how it acts, and how play is searched again with it."""
PEFT = (".base_layer.", ".lora_A.default.", ".lora_B.default.")
"""What peft puts into the names of a wrapped layer's weights."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / ABOUT).is_file()


def merged(weights: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights of an unwrapped model, from those of one that peft has wrapped.

    Args:
        weights: `state_dict` of the model, or of what holds it.
        scaling: alpha / rank.
    """
    found = {name.replace(PEFT[0], "."): value for name, value in weights.items() if ".lora_" not in name}
    for name, a in weights.items():
        if PEFT[1] in name:
            own = name.replace(PEFT[1], ".")
            found[own] = found[own] + scaling * product(a, weights[name.replace(PEFT[1], PEFT[2])])
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """B A: of a linear layer (r, in) and (out, r), of a convolution (r, in, k, k) and (out, r, 1, 1)."""
    return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights, in hex, whatever file they lie in."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_facts(checkpoint: str | Path, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells a base from others: the SHA-256 of its weights, its file's name, games and step.

    Args:
        checkpoint: path of the base.
        weights: of its model, as they lie there.
    """
    from worldmodels.portable.checkpoints import read_checkpoint

    stored, path = read_checkpoint(checkpoint), Path(checkpoint).resolve()
    card = stored["hyper_parameters"].get("card") or {}
    return {
        "weights_sha256": weights_digest(weights),
        "file": path.name,
        "games": card.get("games", [card["game"]] if card else []),
        "step": stored.get("global_step"),
        "adapter": "adapter" in stored,
    }


def write_adapter(
    out: Path,
    trained: Mapping[str, Any],
    start: Mapping[str, Tensor],
    transform: Mapping[str, Any],
    base: Mapping[str, Any],
    run: Mapping[str, Any],
) -> int:
    """Write what a training changed, in the place of an adapter that lies there.

    Args:
        out: folder.
        trained: a Lightning checkpoint of a learner that is `learners.adapting.Adaptable`, as it was saved.
        start: weights that the training began with: the base's, and the classes of reward, games and actions that
            were added.
        transform: of frames, with which the log was read.
        base: of `base_facts`.
        run: what the run recorded, as `portable.export.recorded` gives it.

    Returns:
        How many numbers it holds.
    """
    out, given = on_disk(out), trained["hyper_parameters"]
    adapt, prefix = given["adapt"], "model."
    own = {k.removeprefix(prefix): v for k, v in trained["state_dict"].items() if k.startswith(prefix)}
    tensors: dict[str, Tensor] = {}
    for name, value in own.items():
        if ".lora_" in name:
            tensors[name.replace(".default.weight", "").replace(".lora_", ".weight.lora_")] = value
        elif not torch.equal(value, start[plain := name.replace(PEFT[0], ".")]):
            tensors[plain] = value
    content = save({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()})
    about: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"worldmodels {__version__}",
        "base_sha256": base["weights_sha256"],
        "base": {name: value for name, value in base.items() if name != "weights_sha256"},
        "method": adapt["method"],
        "scaling": adapt["alpha"] / adapt["rank"],
        "parameters": sum(value.numel() for value in tensors.values()),
        "model": given["model"],
        "card": given["card"],
        "policy": {name: given[name] for name in ("actions", *SEARCH) if name in given},
        "step": trained.get("global_step"),
        "transform": dict(transform),
        "run": dict(run),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    about["sha256"] = own_digest(about)
    make_folder(out.parent)
    with disk_errors(out), atomic(out) as tmp:
        tmp.mkdir()
        (tmp / WEIGHTS).write_bytes(content)
        write_json(tmp / ABOUT, about)
        sync(tmp)
        remove(out)  # a folder takes the place of none that holds something: the new one is whole by now
    return about["parameters"]


def read_adapter(folder: Path) -> dict[str, Any]:
    """The model that an adapter and the base beside it make, as `read_checkpoint` gives it of a checkpoint.

    Raises:
        UserError: it is not as it was written, or the base is missing or another.
    """
    about = about_adapter(folder)
    tensors, (before, weights) = _tensors(folder, about), _base(folder, about)
    given = {"model": about["model"], "card": about["card"], **about.get("policy", {})}
    try:
        weights = regrown(weights, before, given)
        for name, value in tensors.items():
            own, _, part = name.partition(".lora_")
            if not part:
                weights[own] = value  # of another name or shape, it fits no model
            elif part == "A":
                weights[own] = weights[own] + about["scaling"] * product(value, tensors[f"{own}.lora_B"])
    except (KeyError, IndexError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"what {folder} changes is not what its base has ({type(error).__name__}: {error}); fine-tune again"
        ) from error
    return {
        "hyper_parameters": given,
        "global_step": about.get("step"),
        "state_dict": {f"model.{name}": value for name, value in weights.items()},
        "StoreDataModule": {"transform": about["transform"]},
        "adapter": about,
    }


def about_adapter(folder: Path) -> dict[str, Any]:
    """The content of adapter.json.

    Raises:
        UserError: it is not as it was written, or of another version.
    """
    from worldmodels.portable.checkpoints import only_models

    path = folder / ABOUT
    about = read_json(path)
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        raise UserError(
            f"{path} describes no adapter of version {VERSION}; fine-tune again, or install a newer version"
        )
    if missing := [name for name, kind in NEEDED.items() if not isinstance(about.get(name), kind)]:
        raise UserError(f"{path} lacks {missing[0]}, so that nothing can be made of it; fine-tune again")
    base, run = about.get("base", {}), about.get("run", {})
    if not all(isinstance(told, dict) for told in (base, run)) or not isinstance(run.get("learner", {}), dict):
        raise UserError(f"{path} tells of a base or a run that is none; fine-tune again")
    policy = about.get("policy", {})
    if not isinstance(policy, dict) or not set(policy) <= {"actions", *SEARCH}:
        raise UserError(f"{path} tells of a policy that is none; fine-tune again")
    if missing := [name for name in SEARCH if policy and (name not in policy or type(about.get("step")) is not int)]:
        raise UserError(f"{path} lacks {missing[0]} or step, without which nothing is searched; fine-tune again")
    if about["sha256"] != own_digest(about):
        raise UserError(f"{path} is not as it was written: its own SHA-256 differs; copy it again, or fine-tune again")
    validate_card(about["card"], f"the dataset card in {path}")
    only_models(path, about["model"])
    return about


def _tensors(folder: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing, without which {ABOUT} is of no use; copy it again, or fine-tune again")
    content = path.read_bytes()
    found, written = hashlib.sha256(content).hexdigest(), about["weights_sha256"]
    if found != written:
        raise UserError(
            f"{path} is not the file that {ABOUT} describes: its SHA-256 is {found[:12]}... and should be "
            f"{written[:12]}...; copy it again, or fine-tune again"
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}); copy it again, or fine-tune again") from error


def _base(folder: Path, about: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the base that lies beside an adapter."""
    from worldmodels.portable.checkpoints import read_checkpoint

    wanted = about["base_sha256"]
    which, hint = f"weights with the SHA-256 {wanted[:12]}...", ""
    if base := about.get("base"):  # earlier versions did not tell
        games = " and ".join(map(str, base.get("games") or ["unknown games"]))
        which += f", those of {base.get('file')} ({games}, step {base.get('step')})"
        if base.get("adapter"):
            hint = ", itself an adapter: make one model of it with `worldmodels export-model`"
    places = [place / name for place in (folder, folder.parent) for name in BASES]
    found = [place for place in places if place.exists() and place.resolve() != folder.resolve()]
    if not found:
        raise UserError(
            f"the adapter {folder} needs the model that it began with beside it, as {folder / BASES[0]} "
            f"(of export-model) or {BASES[1]}: {which}{hint}"
        )
    stored = read_checkpoint(found[0])
    named = stored["state_dict"].items()
    weights = {name.removeprefix("model."): value for name, value in named if name.startswith("model.")}
    if (own := weights_digest(weights)) != wanted:
        raise UserError(
            f"the adapter {folder} was made for another model than {found[0]}, whose weights have the SHA-256 "
            f"{own[:12]}...: it needs {which}{hint}"
        )
    return stored["hyper_parameters"], weights


def own_digest(about: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of all that model.json or adapter.json says, but for this number."""
    text = json.dumps({k: v for k, v in about.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

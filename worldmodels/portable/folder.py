"""A trained model as a folder that needs neither Lightning nor trust: what rebuilds it, and its weights.

    model.json           settings of the network, action vocabulary, dataset card, protocol, what the run recorded,
                         and the SHA-256 of the weights, of the other files and of its own content
    model.safetensors    the weights, by the names of `state_dict`
    starts.safetensors   a few windows of logged play that dreams can begin with, where they were asked for
    README.md            the same for people, as the Hugging Face hub shows it (portable/readme.py)

`read_checkpoint` reads such a folder as it reads a Lightning checkpoint, so whatever takes one takes the other.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from worldmodels import __version__
from worldmodels.config import HEADS, build, build_policy
from worldmodels.data.card import card_digest, validate_card
from worldmodels.data.disk import atomic, disk_errors, make_folder, on_disk, read_json, write_json
from worldmodels.portable.adapter import ABOUT as ADAPTER
from worldmodels.portable.adapter import SEARCH, about_adapter, is_adapter, own_digest, weights_digest
from worldmodels.portable.checkpoints import only_models
from worldmodels.portable.readme import readme
from worldmodels.types import ACTIONS, Segment, UserError

ABOUT, WEIGHTS, STARTS, README = "model.json", "model.safetensors", "starts.safetensors", "README.md"
FILES = (ABOUT, WEIGHTS, STARTS, README)
FORMAT, VERSION = "worldmodels model", 1
NEEDED = dict.fromkeys(("kind", "sha256"), str) | dict.fromkeys(
    ("model", "actions", "card", "transform", "files", "run"), dict
)
KINDS = ("world model", *HEADS)

About = dict[str, Any]


class Portable(NamedTuple):
    """A folder's content, whose hashes are known to be right.

    Args:
        about: of model.json.
        weights: by name, on the CPU.
    """

    about: About
    weights: dict[str, Tensor]

    def checkpoint(self) -> dict[str, Any]:
        """The same as `read_checkpoint` gives it of a Lightning checkpoint, and `about` beside it."""
        given = {"model": self.about["model"], "card": self.about["card"]}
        if self.about["kind"] in HEADS:
            given["actions"] = self.about["actions"]["legal"]
        if self.about["kind"] == "MuZero":
            given |= {name: self.about["run"]["learner"][name] for name in SEARCH}
        return {
            "hyper_parameters": given,
            "global_step": self.about["run"].get("checkpoint_step"),
            "state_dict": {f"model.{name}": value for name, value in self.weights.items()},
            "StoreDataModule": {"transform": self.about["transform"]},
            "about": self.about,
        }


def describe(
    model: Mapping[str, Any],
    card: Mapping[str, Any],
    actions: list[int] | Mapping[str, list[int]] | None = None,
    run: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    transform: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> About:
    """What model.json says of a model; the hashes are added when it is written.

    Args:
        model: settings for `config.build`, or of a policy or a MuZero for `config.build_policy`.
        card: dataset card of the log that it learned from.
        actions: of a policy or a MuZero, the indices into the 18-action set that it may take, of several games by the
            name of each; None for a world model.
        run: what its training recorded; that of a MuZero has a `search` among the settings of its `learner`.
        source: where the weights were before.
        transform: of frames, with which the log was read (data/transforms.py).
        licence: of the weights, by the hub's name for it.
    """
    legal = card["action_set"] if actions is None else actions
    names = ("frame_skip", "sticky_prob", "noop_max", "fire_reset", "episodic_life", "time_limit")
    protocol = {name: card[name] for name in names} | {
        "max_pool": card["obs"]["max_pool"],
        "reward_clipped": card["reward"]["clipped"],
    }
    kind = "world model" if actions is None else "MuZero" if "search" in (run or {}).get("learner", {}) else "policy"
    about = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"worldmodels {__version__}",
        "kind": kind,
        "model": dict(model),
        "actions": {"vocabulary": ACTIONS, "legal": dict(legal) if isinstance(legal, Mapping) else list(legal)},
        "card": dict(card),
        "card_sha256": card_digest(card),
        "protocol": protocol,
        "transform": dict(transform or {}),
        # a figure that is no number is none: other programs' JSON knows no NaN
        "run": json.loads(json.dumps(run or {}), parse_constant=lambda _: None),
        "source": dict(source or {}),
        "licence": licence,
    }
    return json.loads(json.dumps(about))  # as it will be read: tuples are lists


def write_model(out: Path, about: About, weights: Mapping[str, Tensor], starts: Segment | None = None) -> bool:
    """Write a folder, whole or not at all.

    Args:
        out: a new or empty folder.
        about: of `describe`.
        weights: the `state_dict` of the network.
        starts: windows of logged play.

    Returns:
        False where this very model lies there already.

    Raises:
        UserError: the folder holds something else, which stays, or the disk refuses.
    """
    out = on_disk(out)
    data = {WEIGHTS: _bytes(weights)}
    if starts is not None:
        columns = {field.name: getattr(starts, field.name) for field in fields(Segment) if field.name != "side"}
        if about["model"].get("games"):  # what knows no games is read by earlier versions, too
            columns |= {"game": starts.side["game"]}
        data[STARTS] = _bytes(columns)
    about = about | {"parameters": sum(value.numel() for value in weights.values())}
    about["weights_sha256"] = weights_digest(weights)  # by which an adapter names its base
    about["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    about["sha256"] = own_digest(about)
    if vacant(out, about):
        make_folder(out.parent)
        with disk_errors(out), atomic(out) as tmp:
            tmp.mkdir()
            for name, content in data.items():
                (tmp / name).write_bytes(content)
            (tmp / README).write_text(readme(about), encoding="utf-8")
            write_json(tmp / ABOUT, about)
        return True
    return False


def vacant(out: Path, about: About) -> bool:
    """Whether a model is still to be written to `out`; not where it holds this very one.

    Raises:
        UserError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    if (out / ABOUT).is_file() and read_about(out)["sha256"] == about["sha256"]:
        return False
    raise UserError(f"{out} is there already and holds something else; give another folder with out=..., or delete it")


def folder_of(path: str | Path) -> Path | None:
    """The folder that a path names: itself or one of its files; None where it is something else."""
    path = Path(path)
    if path.is_dir():
        return path
    return path.parent if path.name in (*FILES, ADAPTER) or path.suffix == ".safetensors" else None


def digest_of(path: str | Path) -> str:
    """SHA-256 of a checkpoint, in hex: of a file's bytes, or of what a folder's json says, its weights' included.

    Raises:
        UserError: the folder holds no model.
    """
    if (folder := folder_of(path)) is not None:
        return (about_adapter if is_adapter(folder) else read_about)(folder)["sha256"]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_about(folder: Path) -> About:
    """The content of model.json.

    Raises:
        UserError: there is none, it is of a newer version or not as it was written, or its model is not trusted.
    """
    path = folder / ABOUT
    if is_adapter(folder):
        raise UserError(
            f"{folder} holds an adapter, which is of use beside its base alone; make a whole model of the two with "
            f"`worldmodels export-model checkpoint={folder} out=...`"
        )
    if not path.is_file():
        raise UserError(
            f"no model at {folder}, which has no {ABOUT}; make one with `worldmodels export-model checkpoint=...`, "
            "or give the path of a best.ckpt or last.ckpt"
        )
    about = read_json(path)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{path} describes no model of this program; give a folder of `worldmodels export-model`")
    if about.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {about.get('version')}, and this program reads version {VERSION}; install the "
            f"version that wrote it, {about.get('written_by')}, or a newer one"
        )
    if missing := [name for name, kind in NEEDED.items() if not isinstance(about.get(name), kind)]:
        raise UserError(f"{path} lacks {missing[0]}, so that nothing can be built; export or pull the model again")
    if about["sha256"] != own_digest(about):
        raise UserError(f"{path} is not as it was written: its own SHA-256 differs; export or pull the model again")
    validate_card(about["card"], f"the dataset card in {path}")
    if about.get("card_sha256") != card_digest(about["card"]):
        raise UserError(f"the dataset card in {path} is not the one of card_sha256; export or pull the model again")
    if not {WEIGHTS} <= set(about["files"]) <= set(FILES):
        raise UserError(f"{path} names the files {sorted(about['files'])}, where {WEIGHTS} and {STARTS} may be")
    if about["kind"] not in KINDS:
        raise UserError(f"{path} is of a {about['kind']}, which is none of {', '.join(KINDS)}")
    learner = about["run"].get("learner")
    missing = [name for name in SEARCH if not isinstance(learner, dict) or name not in learner]
    missing += [] if type(about["run"].get("checkpoint_step")) is int else ["checkpoint_step"]
    if about["kind"] == "MuZero" and missing:
        raise UserError(f"{path} lacks {missing[0]} in its run, without which nothing is searched; export it again")
    if about["actions"].get("vocabulary") != ACTIONS:
        raise UserError(f"{path} has another action vocabulary than ALE's {len(ACTIONS)} actions, the only one known")
    only_models(path, about["model"])
    return about


def check_files(folder: Path) -> About:
    """The content of model.json, once every file that it names is known to be there and as it was written.

    Raises:
        UserError: as `read_about`, or a file is missing or another.
    """
    about = read_about(folder)
    for name in about["files"]:
        _tensors(folder, about, name)
    return about


def read_model(folder: Path) -> Portable:
    """Everything in a folder but its start frames.

    Raises:
        UserError: as `read_about`, or the weights are missing or not those of model.json.
    """
    about = read_about(folder)
    return Portable(about, _tensors(folder, about, WEIGHTS))


def read_starts(folder: str | Path) -> Segment:
    """Windows of logged play that dreams can begin with.

    Raises:
        UserError: as `read_model`, or the folder has none.
    """
    folder = Path(folder)
    about = read_about(folder)
    if STARTS not in about["files"]:
        raise UserError(f"{folder} holds no start frames; export it again with store=... starts=4")
    columns: dict[str, Any] = _tensors(folder, about, STARTS)
    game = columns.pop("game", None)
    return Segment(**columns, side={} if game is None else {"game": game})


def load_model(folder: str | Path) -> tuple[nn.Module, About]:
    """The network of a folder, in evaluation mode on the CPU, and what is told of it; no Lightning.

    Raises:
        UserError: as `read_model`, or the weights do not fit the network that is described.
    """
    about, weights = read_model(Path(folder))
    return rebuild(about, weights, folder), about


def rebuild(about: About, weights: Mapping[str, Tensor], where: object) -> nn.Module:
    """The network that `describe` describes, with these weights, in evaluation mode.

    Raises:
        UserError: the weights do not fit, with `where` they come from.
    """
    if about["kind"] in HEADS:
        model = build_policy(about["model"], about["card"], about["actions"]["legal"], about["kind"])
    else:
        model = build(about["model"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {where} do not fit the model it describes; export it again") from error
    return model.eval().requires_grad_(False)


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """As safetensors, which holds tensors that lie in order and share no memory."""
    return save({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()})


def _tensors(folder: Path, about: About, name: str) -> dict[str, Tensor]:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing, without which {ABOUT} is of no use; export or pull the model again")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != about["files"].get(name):
        raise UserError(
            f"{path} is not the file that {ABOUT} describes: its SHA-256 is {found[:12]}... and should be "
            f"{str(about['files'].get(name))[:12]}...; export or pull the model again"
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}); export or pull the model again") from error

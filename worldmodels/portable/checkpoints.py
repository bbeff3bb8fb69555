"""What `checkpoint=` takes, read without trust: Lightning checkpoints, folders of `export-model`, adapters."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldmodels.types import UserError

MODELS = ("worldmodels.models.", "worldmodels.nn.")
"""The prefixes that the settings of a checkpoint's model may have."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Tensors and plain data of a Lightning checkpoint, of a folder of `worldmodels export-model`, or of an adapter.

    They are on the CPU. What fine-tuning changed is merged into the weights, as if it had trained them all, and how it
    was done is told under `adapt`.

    Raises:
        UserError: it is missing, truncated, not what its hash says, or holds anything but tensors and plain data, or
            it is an adapter without its base.
    """
    from worldmodels.portable.adapter import is_adapter, merged, read_adapter
    from worldmodels.portable.folder import folder_of, read_model

    path = Path(path).resolve()
    if (folder := folder_of(path)) is not None:
        if is_adapter(folder):
            return read_adapter(folder)
        return read_model(folder).checkpoint()
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint.get("hyper_parameters", {}):
        raise UserError(f"{path} is no checkpoint of this program; give the path of a best.ckpt or last.ckpt")
    only_models(path, checkpoint["hyper_parameters"]["model"])
    if adapt := checkpoint["hyper_parameters"].pop("adapt", None):
        try:
            checkpoint["state_dict"] = merged(checkpoint["state_dict"], adapt["alpha"] / adapt["rank"])
        except (KeyError, RuntimeError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"the low-rank changes in {path} are not whole; fine-tune again") from error
        checkpoint["adapt"] = adapt
    return checkpoint


def read_tensors(path: Path, hint: str = "make one with `worldmodels train experiment=... out=...`") -> Any:
    """What `torch.save` wrote, if it is tensors and plain data, on the CPU; the `hint` is for those who have no file.

    Raises:
        UserError: the file is missing, truncated, or holds anything else.
    """
    import torch

    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; {hint}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain data, so it is not loaded: reading it could run somebody's code"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint {path} is truncated or damaged; use another one of its folder, or train again"
        ) from error


def only_models(path: str | Path, settings: Any) -> None:
    """Refuse a file whose settings would build anything but a model and its parts.

    `config.TRUSTED` is not enough for files of strangers: this package has functions that delete and download.

    Raises:
        UserError: naming the file and the target.
    """
    if isinstance(settings, list):
        settings = dict(enumerate(settings))
    if not isinstance(settings, Mapping):
        return
    if not (target := str(settings.get("_target_", MODELS[0]))).startswith(MODELS):
        raise UserError(f"{path} has _target_ '{target}', which is not trusted; a model is of {' or '.join(MODELS)}")
    for part in settings.values():
        only_models(path, part)


def trained_transform(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Of the frames that a checkpoint learned from, as data/transforms.py has it; none where it does not tell."""
    data = ("StoreDataModule", "ReanalyseDataModule")
    return next((stored[name]["transform"] for name in data if "transform" in stored.get(name, {})), {})

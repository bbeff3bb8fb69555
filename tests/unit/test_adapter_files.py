"""Adapters of strangers: whatever is in the files, what does not fit is told in a sentence, and nothing is run."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from worldmodels.config import build, read_checkpoint
from worldmodels.data.sources.catch_play import catch_card
from worldmodels.portable.adapter import write_adapter
from worldmodels.types import UserError

LEVEL = {"channels": [8], "depths": [1], "attention": [False]}
SETTINGS = {
    "_target_": "worldmodels.models.diffusion.DiffusionWorldModel",
    "denoiser": {"network": {"context": 4, "cond_channels": 16, **LEVEL}},
    "reward_model": {"cond_channels": 8, "lstm": 16, **LEVEL},
    "sampler": {"steps": 2, "sigma_min": 2e-3, "sigma_max": 5.0},
    "image_size": 16,
}
ADAPT = {"method": "lora", "rank": 2, "alpha": 4.0}
WEIGHT = "reward_model.head.0.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Beside its base.ckpt; a low-rank change of one weight, and another bias."""
    weights = build(SETTINGS).state_dict()
    given = {"model": SETTINGS, "card": catch_card(0, 0.5)}
    torch.save({"hyper_parameters": given, "state_dict": _named(weights)}, tmp_path / "base.ckpt")
    out, width = weights[WEIGHT].shape
    changes = {
        WEIGHT.replace(".weight", ".lora_A.default.weight"): torch.ones(2, width),
        WEIGHT.replace(".weight", ".lora_B.default.weight"): torch.ones(out, 2),
        "reward_model.head.0.bias": torch.full((out,), 0.5),
    }
    own = {name.replace(WEIGHT, WEIGHT.replace(".weight", ".base_layer.weight")): v for name, v in weights.items()}
    trained = {"hyper_parameters": given | {"adapt": ADAPT}, "state_dict": _named(own | changes)}
    assert write_adapter(tmp_path / "adapter", trained, weights, weights, {}) == 2 * width + 2 * out + out
    return tmp_path / "adapter"


def _named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in weights.items()}


def sealed(folder: Path, about: Callable[[dict], Any] = dict, tensors: Callable[[dict], Any] = dict) -> None:
    """Change what an adapter says or holds, and all its hashes with it, as who means harm would."""
    content = save(tensors(load_file(folder / "adapter.safetensors")))
    (folder / "adapter.safetensors").write_bytes(content)
    told = about(json.loads((folder / "adapter.json").read_text()))
    told["weights_sha256"] = hashlib.sha256(content).hexdigest()
    told.pop("sha256")
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    told["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(told))


def test_it_is_read_beside_its_base(adapter: Path) -> None:
    sealed(adapter)
    base, own = (read_checkpoint(path)["state_dict"] for path in (adapter.parent / "base.ckpt", adapter))
    torch.testing.assert_close(
        own[f"model.{WEIGHT}"] - base[f"model.{WEIGHT}"], torch.full_like(own[f"model.{WEIGHT}"], 4.0)
    )
    assert (own["model.reward_model.head.0.bias"] == 0.5).all()
    assert read_checkpoint(adapter / "adapter.json")["state_dict"].keys() == own.keys()


def test_one_that_is_called_base_is_not_its_own_base(adapter: Path) -> None:
    renamed = adapter.rename(adapter.with_name("base"))
    assert "state_dict" in read_checkpoint(renamed)
    (adapter.parent / "base.ckpt").unlink()
    with pytest.raises(UserError, match="needs the model that it began with beside it"):
        read_checkpoint(renamed)


def without(name: str) -> Callable[[dict], dict]:
    return lambda given: {k: v for k, v in given.items() if k != name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"about": without("scaling")}, "lacks scaling"),
        ({"about": lambda a: a | {"scaling": "2"}}, "lacks scaling"),
        ({"about": lambda a: a | {"card": {}}}, "lacks the field"),
        ({"about": lambda a: a | {"model": a["model"] | {"_target_": "os.system"}}}, "not trusted"),
        ({"about": lambda a: a | {"model": a["model"] | {"games": {"_target_": "shutil.rmtree"}}}}, "not trusted"),
        ({"about": lambda a: a | {"model": a["model"] | {"reward_model": 3}}}, "is not what its base has"),
        ({"tensors": without(f"{WEIGHT}.lora_B")}, "is not what its base has"),
        ({"tensors": lambda t: t | {f"{WEIGHT}.lora_A": torch.ones(3, 5)}}, "is not what its base has"),
        ({"tensors": lambda t: t | {"x.lora_A": torch.ones(2, 2), "x.lora_B": torch.ones(2, 2)}}, "is not what its"),
    ],
)
def test_what_does_not_fit_is_told(adapter: Path, change: dict[str, Any], told: str) -> None:
    sealed(adapter, **change)
    with pytest.raises(UserError, match=told):
        read_checkpoint(adapter)


def test_a_checkpoint_that_does_not_say_how_it_is_merged(adapter: Path) -> None:
    stored = torch.load(adapter.parent / "base.ckpt", weights_only=True)
    for adapt in ({"method": "lora"}, "lora", ADAPT | {"rank": 0}):
        stored["hyper_parameters"]["adapt"] = adapt
        torch.save(stored, adapter.parent / "other.ckpt")
        with pytest.raises(UserError, match="are not whole"):
            read_checkpoint(adapter.parent / "other.ckpt")

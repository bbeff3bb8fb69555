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

from worldmodels.config import build
from worldmodels.data.sources.catch_play import catch_card
from worldmodels.portable.adapter import base_facts, weights_digest, write_adapter
from worldmodels.portable.checkpoints import read_checkpoint
from worldmodels.portable.export import export_model
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
    stored = {"hyper_parameters": given, "state_dict": _named(weights), "global_step": 70}
    torch.save(stored, tmp_path / "base.ckpt")
    out, width = weights[WEIGHT].shape
    changes = {
        WEIGHT.replace(".weight", ".lora_A.default.weight"): torch.ones(2, width),
        WEIGHT.replace(".weight", ".lora_B.default.weight"): torch.ones(out, 2),
        "reward_model.head.0.bias": torch.full((out,), 0.5),
    }
    own = {name.replace(WEIGHT, WEIGHT.replace(".weight", ".base_layer.weight")): v for name, v in weights.items()}
    trained = {"hyper_parameters": given | {"adapt": ADAPT}, "state_dict": _named(own | changes)}
    base = base_facts(tmp_path / "base.ckpt", weights)
    run = {"learner": {"lr": 0.1}, "seed": 5}
    assert write_adapter(tmp_path / "adapter", trained, weights, {}, base, run) == 2 * width + 2 * out + out
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


def test_what_its_run_recorded_travels_with_it(adapter: Path, tmp_path: Path) -> None:
    """Whatever run's folder it lies in: figures of another would be taken for its own."""
    (tmp_path / "metrics.json").write_text('{"final": {"rollout": 99.9}, "steps": 4000}')
    (tmp_path / "config.yaml").write_text("seed: 7\ndata: {length: 26}\n")
    export_model(adapter, tmp_path / "whole")
    about = json.loads((tmp_path / "whole" / "model.json").read_text())
    assert about["run"] == {"learner": {"lr": 0.1}, "seed": 5}
    sealed(adapter, without("run"))  # as earlier versions wrote it
    export_model(adapter, tmp_path / "earlier")
    earlier = json.loads((tmp_path / "earlier" / "model.json").read_text())
    assert earlier["run"] == {"checkpoint_step": None, "learner": {}}


def test_its_base_is_named_as_people_know_it(adapter: Path, tmp_path: Path) -> None:
    weights = build(SETTINGS).state_dict()
    stored = torch.load(tmp_path / "base.ckpt", weights_only=True)
    torch.save(stored | {"state_dict": _named(weights)}, tmp_path / "other.ckpt")
    digest = json.loads((adapter / "adapter.json").read_text())["base_sha256"]
    which = rf"{digest[:12]}\.\.\., those of base.ckpt \(catch, step 70\)$"
    (tmp_path / "base.ckpt").unlink()
    with pytest.raises(UserError, match=f"needs the model that it began with .*{which}"):
        read_checkpoint(adapter)
    export_model(tmp_path / "other.ckpt", tmp_path / "base")
    told = json.loads((tmp_path / "base" / "model.json").read_text())["weights_sha256"]
    assert told == weights_digest(weights) and told in (tmp_path / "base" / "README.md").read_text()
    with pytest.raises(UserError, match=rf"have the SHA-256 {told[:12]}\.\.\.: it needs .*{which}"):
        read_checkpoint(adapter)
    sealed(adapter, without("base"))
    with pytest.raises(UserError, match=rf"it needs weights with the SHA-256 {digest[:12]}\.\.\.$"):
        read_checkpoint(adapter)


def test_an_adapter_of_an_adapter_asks_for_one_whole_model(adapter: Path, tmp_path: Path) -> None:
    stored = read_checkpoint(adapter)
    weights = {name.removeprefix("model."): value for name, value in stored["state_dict"].items()}
    given = {"model": SETTINGS, "card": catch_card(0, 0.5), "adapt": ADAPT | {"method": "bias"}}
    changed = weights | {"reward_model.head.0.bias": torch.zeros_like(weights["reward_model.head.0.bias"])}
    trained = {"hyper_parameters": given, "state_dict": _named(changed)}
    second = tmp_path / "second" / "adapter"
    write_adapter(second, trained, weights, {}, base_facts(adapter, weights), {})
    with pytest.raises(UserError, match="itself an adapter: make one model of it with `worldmodels export-model`$"):
        read_checkpoint(second)
    export_model(adapter, second / "base")
    assert (read_checkpoint(second)["state_dict"]["model.reward_model.head.0.bias"] == 0).all()


def test_a_new_one_is_whole_before_the_old_one_goes(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    weights = build(SETTINGS).state_dict()
    trained = {"hyper_parameters": {"model": SETTINGS, "card": {}, "adapt": ADAPT}, "state_dict": _named(weights)}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("worldmodels.portable.adapter.sync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(adapter, trained, weights, {}, base_facts(adapter.parent / "base.ckpt", weights), {})
    assert before == {path.name: path.read_bytes() for path in adapter.iterdir()}


def without(name: str) -> Callable[[dict], dict]:
    return lambda given: {k: v for k, v in given.items() if k != name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"about": without("scaling")}, "lacks scaling"),
        ({"about": lambda a: a | {"scaling": "2"}}, "lacks scaling"),
        ({"about": lambda a: a | {"base": "pong"}}, "tells of a base or a run that is none"),
        ({"about": lambda a: a | {"run": {"learner": 3}}}, "tells of a base or a run that is none"),
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

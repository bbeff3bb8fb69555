"""Which weights of a model are trained when it is moved to another game, and how far they may go from where they were.

Sources: LoRA of Hu et al. 2021, by peft; training of biases alone of Ben Zaken et al. 2022 (BitFit); learning rates
that fall with the distance from the output of Howard & Ruder 2018 (ULMFiT); L2 to the start of Li et al. 2018 (L2-SP).
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmodels.learners.base import Learner, decay_groups
from worldmodels.models.reward import DOUBLINGS, doublings_for
from worldmodels.nn.equivariant import Expanded
from worldmodels.types import UserError

METHODS = {
    "full": "all weights",
    "lora": "low-rank changes of convolutions and linear layers; biases, norms and embeddings whole",
    "heads": "the output layers",
    "bias": "biases and norms",
}
DEFAULTS: dict[str, Any] = {"method": "full", "rank": 8, "alpha": 16.0, "layer_decay": 1.0, "l2_start": 0.0}
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d)


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with what they leave out.

    Raises:
        UserError: one is unknown or out of range.
    """
    if unknown := set(settings) - set(DEFAULTS):
        raise UserError(f"learner.adapt has no setting {min(unknown)!r}; it has {', '.join(DEFAULTS)}")
    given = DEFAULTS | dict(settings)
    if given["method"] not in METHODS:
        raise UserError(f"method={given['method']} is unknown; choose one of {', '.join(METHODS)}")
    for name, fine, allowed in (
        ("rank", type(given["rank"]) is int and given["rank"] >= 1, "a whole number of at least 1"),
        ("alpha", _number(given["alpha"]) and given["alpha"] > 0, "a number above 0"),
        ("layer_decay", _number(given["layer_decay"]) and 0 < given["layer_decay"] <= 1, "above 0 and at most 1"),
        ("l2_start", _number(given["l2_start"]) and given["l2_start"] >= 0, "a number of 0 or more"),
    ):
        if not fine:
            raise UserError(f"{name}={given[name]} is out of range; it must be {allowed}")
    return given


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def restrict(model: Any, settings: Mapping[str, Any]) -> None:
    """Leave only those weights trainable that the method trains; with LoRA layers are wrapped by peft, in place.

    Args:
        model: has `stages()`, the parts of each component from input to output, the last of which are its heads.
        settings: of `checked`.

    Raises:
        UserError: peft is not installed, or the model has layers that LoRA cannot change.
    """
    method = settings["method"]
    if method == "full":
        return
    if method == "lora" and any(isinstance(module, Expanded) and len(module.index) > 1 for module in model.modules()):
        raise UserError(
            "method=lora changes convolutions and linear layers, and the layers of a symmetry that is built in are "
            "neither, so that next to nothing would be trained; give method=full, heads or bias"
        )
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(_with_gradient)
    if method == "heads":
        for stages in model.stages().values():
            for part in stages[-1]:
                part.requires_grad_(True)
        return
    if method == "lora":
        _wrap(model, settings)
    for module in model.modules():
        whole = isinstance(module, NORMS) or (method == "lora" and isinstance(module, nn.Embedding))
        for name, parameter in module.named_parameters(recurse=False):
            if whole or name.startswith("bias"):
                parameter.requires_grad_(True)


def _with_gradient(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Have the input of a norm ask for a gradient.

    Without, torch 2.13 writes where it must not on a CPU, in the backward pass of a norm of channels_last images.
    """
    if not torch.is_grad_enabled():
        return inputs
    return tuple(x if x.requires_grad else x.detach().requires_grad_() for x in inputs)


def _wrap(model: nn.Module, settings: Mapping[str, Any]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model  # pyrefly: ignore
    except ImportError as error:
        raise UserError(
            'method=lora needs a library that is not installed: pip install "worldmodels[lora]" brings it'
        ) from error
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    config = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=names)
    logging.getLogger("peft").setLevel(logging.ERROR)
    inject_adapter_in_model(config, model)
    for module in model.modules():
        if hasattr(module, "lora_A") and isinstance(module.base_layer, nn.Conv2d):
            for layer in module.lora_A.values():  # pyrefly: ignore
                layer.dilation = module.base_layer.dilation  # pyrefly: ignore  # peft 0.21 leaves it out


def begin_with(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of an unwrapped model into one that `restrict` may have wrapped."""
    own = model.state_dict()
    names = {name: name if name in own else ".base_layer.".join(name.rsplit(".", 1)) for name in weights}
    missing = {name for name in own if ".lora_" not in name} ^ set(names.values())
    if missing:
        raise RuntimeError(f"weights that do not fit the model: {sorted(missing)}")
    model.load_state_dict({names[name]: value for name, value in weights.items()}, strict=False)


def layers(model: Any, decay: float) -> Iterator[tuple[str, nn.Module, float]]:
    """Component, part and factor of its learning rate: 1 at the output, and `decay` times as much a stage before.

    Stages without weights do not count.
    """
    if decay == 1:
        yield from ((name, component, 1.0) for name, component in model.components().items())
        return
    for name, stages in model.stages().items():
        parts = [part for stage in stages if list((part := nn.ModuleList(stage)).parameters())]
        for k, part in enumerate(parts):
            yield name, part, decay ** (len(parts) - 1 - k)


class Start:
    """The trained weights as they were in the beginning; it lies beside the model, and no checkpoint holds it."""

    def __init__(self, model: nn.Module) -> None:
        self._were = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Start":
        return self  # never changed: an average of the model need not copy it

    def distance(self, model: nn.Module) -> Tensor:
        """Half the squared distance of the weights from there."""
        each = []
        for name, parameter in model.named_parameters():
            if name in self._were:
                self._were[name] = self._were[name].to(parameter.device)
                each.append((parameter - self._were[name]).square().sum())
        return torch.stack(each).sum() / 2


class Adaptable(Learner):
    """A learner that may begin with another's weights: it then trains some of them, at their rates, or near to them.

    Its model has `components()`, a dict of disjoint modules, and `stages()`. A subclass calls `take_adapt` once it has
    the model.
    """

    _start: Start | None = None

    def take_adapt(self, adapt: Mapping[str, Any] | None) -> None:
        """Leave only those weights trainable that these settings of `checked` train."""
        self.adapt = checked(adapt or {})
        restrict(self.model, self.adapt)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these weights of the model, and remember them where it is drawn to them."""
        begin_with(self.model, weights)
        if self.adapt["l2_start"]:
            self._start = Start(self.model)

    def drawn_back(self, loss: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """The loss, with the distance from the start in it and among the metrics where that counts."""
        if self._start is None:
            return loss
        metrics["start_distance"] = (distance := self._start.distance(self.model)).detach()
        return loss + self.adapt["l2_start"] * distance

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Two a component, or a stage of it."""
        hp = self.hparams
        groups = []
        for name, part, factor in layers(self.model, self.adapt["layer_decay"]):
            lr = hp["lr"][name] if isinstance(hp["lr"], dict) else hp["lr"]
            for group, label in zip(decay_groups(part, hp["weight_decay"]), ("", ", not decayed"), strict=True):
                groups.append(group | {"lr": lr * factor, "name": f"{name}{label}"})
        return groups


def fit_rewards(model: Mapping[str, Any], greatest: float) -> dict[str, Any]:
    """Settings of a world model with classes for rewards up to `greatest`, beside the old ones.

    A model that learns signs needs no more of them.

    Args:
        model: settings for `config.build`.
        greatest: largest magnitude of a reward that is to be learned.
    """
    reward = model.get("reward_model", {})
    new = max(reward.get("doublings", DOUBLINGS), doublings_for(greatest))
    if reward.get("rewards") != "two_hot" or new == reward.get("doublings", DOUBLINGS):
        return dict(model)
    return {**model, "reward_model": {**reward, "doublings": new}}


def fit_games(given: Mapping[str, Any], logged: Mapping[str, list[int]]) -> dict[str, Any]:
    """Settings of a learner whose model knows these games by name, beside those that it knows.

    A world model that is told no games needs none. A MuZero of one game, moved to another or to more actions, has from
    then on the actions of each by its name.

    Args:
        given: its `model` and `card` and, of a MuZero, its `actions`.
        logged: the actions of each game.
    """
    games = given["model"].get("games")
    own = given["actions"] if "actions" in given else games and games["actions"]
    if not own:
        return dict(given)
    if not isinstance(own, Mapping):
        names = given["card"].get("games", [given["card"]["game"]])
        if all(game in names and set(actions) <= set(own) for game, actions in logged.items()):
            return dict(given)
        own = {name: sorted({*own, *logged.get(name, [])}) for name in names}
    known = {**logged, **own}
    if "actions" in given:
        return {**given, "actions": known}
    return {**given, "model": {**given["model"], "games": {**games, "actions": known}}}

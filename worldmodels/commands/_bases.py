"""What depends on the kind of model that is moved to another game: a world model with frames, or a MuZero without."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from worldmodels.commands._results import load_fitting
from worldmodels.config import build, plain
from worldmodels.learners.world_model import load_learner
from worldmodels.portable.checkpoints import read_checkpoint
from worldmodels.types import ACTIONS, UserError


def base_of(arguments: Sequence[str]) -> list[str]:
    """The choice of settings that suits the model of a command line; none where it is made, or the model unknown."""
    given = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    try:
        found = "base" not in given and is_muzero(given["checkpoint"].strip("'\""))
    except (KeyError, UserError):  # which is told when all settings are read
        found = False
    return ["base=muzero"] if found else []


def is_muzero(checkpoint: str | Path) -> bool:
    """Whether a checkpoint holds a MuZero, which is searched in."""
    return "search" in read_checkpoint(checkpoint)["hyper_parameters"]


def open_base(cfg: DictConfig, store: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of the learner in `cfg.checkpoint`, and the weights of its model.

    What `cfg` leaves open is then as a MuZero was trained, and as long as it needs.

    Raises:
        UserError: it cannot be read, is of another kind than the settings are for, or the store does not fit it.
    """
    from worldmodels.data.mixing import check_fits
    from worldmodels.learners.muzero import load_muzero
    from worldmodels.portable.adapter import SEARCH

    latent = is_muzero(cfg.checkpoint)
    if latent != str(cfg.learner.get("_target_")).endswith(".MuZeroLearner"):
        needed = "a MuZero: give base=muzero" if latent else "no MuZero: give base=diffusion"
        raise UserError(f"{cfg.checkpoint} holds {needed} with it")
    if not latent:
        learner = load_fitting(cfg.checkpoint, store, same_game=False)
        return dict(learner.hparams), learner.model.state_dict()
    model, given = load_muzero(cfg.checkpoint)
    check_fits(store.card, given["card"], f"the checkpoint {cfg.checkpoint}", same_game=False)
    whole, before = model.least_length, model.frames - 1
    needed = {"length": whole, "left_padding": before, "right_padding": whole - before - 1}
    for part, values in (
        (cfg.data, needed),
        (cfg.data.validation, {"length": whole}),
        (cfg.learner, {name: given[name] for name in SEARCH}),
    ):
        for name, value in values.items():
            if part[name] is None:
                part[name] = value
    return given, model.state_dict()


def closed(model: Mapping[str, Any], logged: Mapping[str, list[int]], checkpoint: str) -> dict[str, Any]:
    """The settings of a model whose symmetries the actions of all games have: what only turned windows is left out.

    Args:
        model: its settings.
        logged: the actions of each game.
        checkpoint: where the model is from.

    Raises:
        UserError: a symmetry that is built in does not fit a game.
    """
    from worldmodels.ops.groups import group, is_closed

    for game, actions in logged.items():
        names = ", ".join(ACTIONS[action] for action in actions)
        if not is_closed(own := group(model.get("symmetry", "none")), actions):
            raise UserError(
                f"{checkpoint} has symmetry={own.name} built in, under which the actions of {game} ({names}) are not "
                "closed: give a checkpoint that was trained with model.symmetry=none"
            )
        if not is_closed(turned := group(model.get("turned", "none")), actions):
            print(
                f"warning: the actions of {game} ({names}) are not closed under turned={turned.name}, with which the "
                "model was trained: it goes on with turned=none",
                file=sys.stderr,
            )
            model = {**model, "turned": "none"}
    return dict(model)


def judge(checkpoint: str | Path, store: Any, cfg: DictConfig, progress: bool = True) -> dict[str, Any]:
    """Figures of a checkpoint on the test split of `store`: of its rollouts, or the losses of a MuZero."""
    from worldmodels.evaluation.quality import rollout_quality
    from worldmodels.hardware import accelerator

    device = accelerator(cfg.trainer.accelerator)
    if is_muzero(checkpoint):
        return _losses(checkpoint, store, cfg, device)
    options = {"windows": cfg.windows, "horizons": list(cfg.horizons), "burn_in": cfg.burn_in, "device": device}
    model = load_learner(checkpoint).model.to(device)
    return rollout_quality(model, store, reward_rows=0, progress=progress, **options)


def _losses(checkpoint: str | Path, store: Any, cfg: DictConfig, device: str) -> dict[str, Any]:
    """What validation measures of a MuZero, on windows of the test split."""
    import lightning as L

    from worldmodels.learners.fit import quiet
    from worldmodels.learners.muzero import MuZeroLearner

    quiet()
    stored = read_checkpoint(checkpoint)
    learner = MuZeroLearner(**stored["hyper_parameters"])
    learner.load_state_dict(stored["state_dict"])
    own = {"store": str(store.path), "budget": None, "replay": None, "version": None}
    settings = plain(cfg.data) | own
    data = build(settings | {"validation": settings["validation"] | {"windows": cfg.windows}})
    still = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator=device, devices=1, enable_checkpointing=False, **still)
    (found,) = trainer.validate(learner, data.test_dataloader(), verbose=False)
    found = {name.removeprefix("val/"): round(value, 6) for name, value in found.items()}
    losses = [name for name in sorted(found) if name.startswith("loss")]  # a game's own are catch/loss...
    return {**{name: found[name] for name in losses}, "windows": cfg.windows, "episodes": len(store.splits["test"])}

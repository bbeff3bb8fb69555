"""What `finetune` and `adapt-report` share: one training that begins with another model's weights, or with none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from worldmodels.commands._bases import closed, open_base
from worldmodels.commands._results import settings_of
from worldmodels.config import plain
from worldmodels.portable.checkpoints import read_tensors
from worldmodels.types import ACTIONS, UserError

SCRATCH = {"learner": {"adapt": None}, "data": {"replay": {"store": None}}}
"""What differs where a training begins at random: all weights are trained, and nothing is there to be forgotten."""


class Move(NamedTuple):
    """A model on its way to a store.

    Args:
        cfg: of the command, from which each run takes its settings.
        settings: all that decides the result.
        model: settings of the model, with classes for the store's rewards and a row for its game.
        learner: settings of the learner that go with it.
        start: its weights, with what the store needs beside them.
    """

    cfg: DictConfig
    settings: dict[str, Any]
    model: dict[str, Any]
    learner: dict[str, Any]
    start: dict[str, Tensor]

    def run(self, name: str, out: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """Train in the folder `out`; "scratch" begins at random, any other name with the model's weights.

        What was changed is left beside it as an adapter, unless all was trained.

        Args:
            name: of the run.
            out: its folder, which is found finished or gone on with where it is there.
            changes: of settings.

        Returns:
            The figures of its metrics.json, none on ranks that only help.
        """
        from worldmodels.learners.fit import fit
        from worldmodels.portable.adapter import write_adapter
        from worldmodels.portable.export import recorded

        scratch, own = name == "scratch", self.asked(name, out, changes)
        done = fit(own, out, None if scratch else self.start)
        if done and not scratch and (own["learner"].get("adapt") or SCRATCH).get("method", "full") != "full":
            best = read_tensors(out / "best.ckpt")
            told = own["data"]["transform"], own["base"], recorded(best, out)
            numbers = write_adapter(out / "adapter", best, self.start, *told)
            print(
                f"{numbers:,} numbers in {out / 'adapter'}, which needs its base beside it; best.ckpt has both merged"
            )
        return done

    def asked(self, name: str, out: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """The settings of such a run, as `fit` takes them; arguments as of `run`."""
        scratch = name == "scratch"
        # paths in it are relative to `out`
        own = plain(OmegaConf.merge(self.cfg, {"out": str(out)}, SCRATCH if scratch else {}, changes or {}))
        if (own["callbacks"].get("stop") or {}).get("patience") is None:
            own["callbacks"]["stop"] = None
        own["learner"] |= self.learner
        return {**self.settings, **own, "model": self.model} | ({"replay_uuid": None} if scratch else {})


def begin_move(cfg: DictConfig, store: Any, budget: int | None) -> Move:
    """The model of `cfg.checkpoint`, ready to be moved to `store` with `budget` transitions of each game, or with all.

    Raises:
        UserError: the checkpoint cannot be read, the store or the budget does not fit it, or `out` has another
            command's figures.
    """
    from worldmodels.data.disk import read_json
    from worldmodels.data.mixing import Mixture, logged_actions, open_stores
    from worldmodels.data.transforms import Transform
    from worldmodels.learners.adapting import fit_games, fit_rewards
    from worldmodels.learners.building import legal_actions
    from worldmodels.models.growing import regrown
    from worldmodels.portable.adapter import base_facts

    if plain(cfg.data.store) != plain(cfg.store):
        raise UserError(
            f"data.store={cfg.data.store} is not store={cfg.store}, by which a run is judged; give store alone"
        )
    metrics, mine = Path(cfg.out).absolute() / "metrics.json", "budgets" if "budgets" in cfg else "work"
    if metrics.exists() and mine not in read_json(metrics):
        raise UserError(f"{metrics} holds the figures of another command, which stay; give another out=DIR")
    given, base = open_base(cfg, store)
    asked = plain(cfg.store), plain(cfg.data.replay.store) or []
    new, old = ([paths] if isinstance(paths, str) else paths for paths in asked)
    learned = open_stores([*new, *old], Transform(**plain(cfg.data.transform)))
    replayed = learned.stores[len(new) :] if isinstance(learned, Mixture) else []
    greatest = _greatest_reward(cfg, store, budget, replayed)
    model = fit_rewards(given["model"], greatest)
    if model != given["model"]:
        print(f"rewards up to {greatest:g} are new to the model: it gets classes for them and keeps the old ones")
    known = (given["card"] or {}).get("action_set", range(len(ACTIONS)))
    if (added := sorted(set(store.card["action_set"]) - set(known))) and cfg.method in ("heads", "bias"):
        names = ", ".join(ACTIONS[action] for action in added)
        print(f"{names} are new to the model, and method={cfg.method} does not train what it makes of them")
    logged = logged_actions(learned)
    model = closed(model, logged, cfg.checkpoint)
    latent = "actions" in given
    after = fit_games({**given, "model": model}, logged if latent else legal_actions(learned))
    learner = {"actions": after["actions"]} if latent else {}
    uuids = "+".join(part.uuid for part in replayed) or None
    settings = settings_of(cfg, store) | {"replay_uuid": uuids, "base": base_facts(cfg.checkpoint, base)}
    return Move(cfg, settings, after["model"], learner, regrown(base, given, after))


def _greatest_reward(cfg: DictConfig, store: Any, budget: int | None, replayed: Sequence[Any] = ()) -> float:
    """The greatest absolute reward of the rows that may be used: those of the budget, or of the train split.

    Of stores that are `replayed` all of the train split may be.
    """
    from worldmodels.data.few_shot import few_shot
    from worldmodels.data.scan import greatest_reward

    lengths = store.lengths
    if budget is None:
        used, first = store.splits["train"], lengths
    else:
        split = few_shot(store, budget, cfg.data.validation_share, cfg.data.seed, cfg.data.validation.length)
        used, first = np.concatenate([split["train"], split["validation"]]), split["lengths"]
    whole = [(part, part.splits["train"], part.lengths) for part in replayed]
    return max(greatest_reward(*part) for part in [(store, used, first), *whole])

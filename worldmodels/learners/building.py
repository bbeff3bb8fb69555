"""A learner and its model from settings and the store that they are for."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from worldmodels.config import build
from worldmodels.data.mixing import logged_actions
from worldmodels.evaluation.scores import game_facts
from worldmodels.ops.groups import GROUPS
from worldmodels.types import UserError

SYMMETRIES = ("symmetry", "turned")
"""Settings of a model that may be `game`."""


def check_learner(settings: Mapping[str, Any]) -> None:
    """Refuse settings of what learners share for those of one.

    Raises:
        UserError: no learner was chosen.
    """
    if "_target_" not in settings["learner"]:
        raise UserError(
            "learner=policy is what the learners of policies share, muzero_base what those with a search do; choose "
            "learner=cloning, offline_q, actor_critic, muzero, rosmo or muzero_cloning"
        )


def build_learner(settings: Mapping[str, Any], data: Any) -> Any:
    """The learner, with what is for the data to give: a policy may take the actions that are in its log.

    Args:
        settings: of a run, as `fit` takes them.
        data: the data module, with its `store` and `card`.

    Raises:
        UserError: settings that do not fit the store.
    """
    found: dict[str, Any] = {}
    if settings["learner"].get("actions", ()) is None:
        logged = logged_actions(data.store)
        told_apart = len(logged) > 1 or settings["model"].get("games") is not None
        found["actions"] = logged if told_apart else next(iter(logged.values()))
    model = told_symmetries(settings["model"], data.store)
    return build(settings["learner"], model=model, card=data.card, **found)


def told_games(model: Mapping[str, Any], actions: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a model with the `actions` of each game, where it is to know games and was not told them.

    They are kept with it, for what is called by which name must not change with the stores at hand.

    Raises:
        UserError: `games` is neither null nor has settings.
    """
    games = model.get("games")
    if games is not None and not isinstance(games, Mapping):
        raise UserError(f"model.games={games} must be null or have settings, such as model.games={{unknown: 0.1}}")
    return {**model, "games": {"actions": actions, **games}} if games is not None and actions else dict(model)


def told_symmetries(model: Mapping[str, Any], store: Any) -> dict[str, Any]:
    """The settings of a model where those that are `game` are the symmetry that play of the store's games nearly has.

    Raises:
        UserError: nothing is known of such a symmetry of a game, or those of the games differ.
    """
    asked = [name for name in SYMMETRIES if model.get(name) == "game"]
    if not asked:
        return dict(model)
    known: dict[str, str | None] = dict.fromkeys(logged_actions(store))
    for game in known:
        with suppress(UserError):  # nobody's table has a game of the user's own
            known[game] = game_facts(game).get("approximate_symmetry")
    found = set(known.values())
    if None in found or len(found) > 1:
        told = ", ".join(f"{game} {symmetry or 'none'}" for game, symmetry in known.items())
        raise UserError(
            f"model.{asked[0]}=game is the approximate_symmetry that conf/game has of the store's games, which must be "
            f"one and the same ({told}): give model.{asked[0]}={', '.join(GROUPS)} in its place"
        )
    return {**model, **dict.fromkeys(asked, found.pop())}


def legal_actions(store: Any) -> dict[str, list[int]]:
    """The actions of each game, by its name: those that it is known to heed, and those that are in its log."""
    actions = logged_actions(store)
    for game in actions:
        with suppress(UserError):  # nobody's table has a game of the user's own
            actions[game] = sorted({*actions[game], *game_facts(game)["actions"]})
    return actions


def check_frames(model: Any, card: Mapping[str, Any]) -> None:
    """Refuse frames of another size or colour now, and not with the first batch.

    Raises:
        UserError: those of the card are no `image_size` by `image_size` of `image_channels`, where a model has these.
    """
    obs = card["obs"]
    for name, wanted in (("image_size", {obs["height"], obs["width"]}), ("image_channels", {obs["channels"]})):
        if (size := getattr(model, name, None)) is not None and wanted != {size}:
            raise UserError(
                f"model.{name}={size} does not fit the store, whose frames are {obs['height']}x{obs['width']}x"
                f"{obs['channels']}; set model.image_size and model.image_channels, or data.transform"
            )

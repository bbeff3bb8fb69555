"""What decides a score besides the policy: the rules of play, under a name and with a hash.

Games are always played to their end, with rewards as the game gives them: no protocol ends an episode with a life or
clips. Size and colour of the frames are the policy's own matter and no part of the rules.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import OmegaConf

from worldmodels.config import conf_dir
from worldmodels.types import ACTIONS, UserError

TIME_LIMIT = 27_000
_OF_CARD = ("frame_skip", "sticky_prob", "max_pool")
"""What decides how a game answers: a policy that learned from a log plays by no others than the log's."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How a score is made.

    Args:
        name: of the protocol.
        frame_skip: raw frames an action.
        sticky_prob: probability per raw frame that the previous action is repeated instead.
        max_pool: whether the frame seen is the maximum over the last two raw ones.
        noop_max: a game starts after 0 to noop_max - 1 raw frames without action.
        time_limit: steps after which a game is cut.
        actions: "minimal" (those that have an effect in the game), "full", or indices into the 18-action set.
        temperature: times the policy's own.
        epsilon: share of actions that are drawn at random.
    """

    name: str
    frame_skip: int
    sticky_prob: float
    max_pool: bool
    noop_max: int
    time_limit: int
    actions: str | tuple[int, ...]
    temperature: float = 1.0
    epsilon: float = 0.0

    def told(self) -> dict[str, Any]:
        """All of it, as metrics.json has it, with what no protocol changes."""
        return asdict(self) | {"episodic_life": False, "clipped_rewards": False}

    @property
    def hash(self) -> str:
        """Twelve hex digits that are equal for equal rules, whatever their name."""
        rules = self.told()
        del rules["name"]
        rules |= {k: float(rules[k]) for k in ("sticky_prob", "temperature", "epsilon")}  # 0 is 0.0
        if isinstance(self.actions, tuple):
            rules["actions"] = sorted(set(self.actions))
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:12]

    def allowed(self, minimal: Sequence[int]) -> list[int]:
        """The actions that may be taken in a game whose minimal set is `minimal`."""
        sets = {"minimal": list(minimal), "full": list(range(len(ACTIONS)))}
        return sets[self.actions] if isinstance(self.actions, str) else list(self.actions)


def make_rules(settings: Mapping[str, Any], card: Mapping[str, Any] | None, minimal: Sequence[int]) -> Rules:
    """The rules that conf/protocol/*.yaml describe.

    Args:
        settings: fields of `Rules`; what is None is taken from the card.
        card: dataset card of the log that the policy learned from, or None.
        minimal: the game's minimal action set.

    Raises:
        UserError: a field is unknown, missing or out of range, or contradicts the card.
    """
    given: dict[str, Any] = dict(settings)
    name = given.get("name")
    if card is not None:
        found = {k: card[k] for k in ("frame_skip", "sticky_prob", "noop_max")}
        found |= {"max_pool": card["obs"]["max_pool"], "time_limit": card["time_limit"] or TIME_LIMIT}
        logged = tuple(sorted(card["action_set"]))
        found["actions"] = {tuple(minimal): "minimal", tuple(range(len(ACTIONS))): "full"}.get(logged, logged)
        # a game of catch is as long as its grid is high
        for field in (*_OF_CARD, *(["time_limit"] if card["game"] == "catch" else [])):
            if given.get(field) not in (None, found[field]):
                raise UserError(
                    f"protocol={name} has {field}={given[field]} but the store's card has {found[field]}: "
                    "choose protocol=store, or a protocol that agrees with the card"
                )
        given = {k: found.get(k) if v is None else v for k, v in given.items()}
    if missing := [k for k, v in given.items() if v is None]:
        raise UserError(
            f"protocol={name} takes {missing[0]} from a dataset card and there is none: give store=..., "
            "or another protocol, e.g. protocol=diamond-100k"
        )
    if isinstance(given.get("actions"), list):
        given["actions"] = tuple(given["actions"])
    file = conf_dir() / "protocol" / f"{name}.yaml"
    if file.is_file() and OmegaConf.to_container(OmegaConf.load(file)) != dict(settings):
        given["name"] = f"{name} (changed)"
    try:
        rules = Rules(**given)
    except TypeError as error:
        raise UserError(f"wrong settings of protocol={name}: {error}") from error
    _check(rules)
    return rules


def _check(rules: Rules) -> None:
    listed = rules.actions if isinstance(rules.actions, tuple) else ()
    fine = {
        "frame_skip": type(rules.frame_skip) is int and rules.frame_skip > 0,
        "sticky_prob": 0 <= rules.sticky_prob < 1,
        "max_pool": isinstance(rules.max_pool, bool),
        "noop_max": type(rules.noop_max) is int and rules.noop_max >= 0,
        "time_limit": type(rules.time_limit) is int and rules.time_limit > 0,
        "actions": rules.actions in ("minimal", "full") or (listed and set(listed) <= set(range(len(ACTIONS)))),
        "temperature": rules.temperature >= 0,
        "epsilon": 0 <= rules.epsilon <= 1,
    }
    for field in (field for field, ok in fine.items() if not ok):
        raise UserError(
            f"protocol.{field}={getattr(rules, field)} is out of range; see conf/protocol for what it means"
        )


def check_actions(actions: Sequence[int], allowed: Sequence[int], rules: Rules) -> None:
    """Refuse a policy that may take an action which the rules do not have.

    Raises:
        UserError: naming these actions.
    """
    if foreign := sorted(set(actions) - set(allowed)):
        names = ", ".join(ACTIONS[a] for a in foreign)
        raise UserError(
            f"the policy is for another action set: it may take {names}, which protocol={rules.name} "
            f"(actions={rules.actions}) does not have; choose another protocol, or train with fewer learner.actions"
        )

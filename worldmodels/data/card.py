"""The dataset card: how the frames, actions and rewards of a store came to be, as plain data that travels with it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from worldmodels.types import ACTIONS, Episode, UserError

Card = dict[str, Any]

_DEFAULTS: Card = {
    "source": "",  # short name of the generator function that the episodes came from, e.g. atari_play
    "game": "",  # ALE's snake_case name
    "action_set": list(range(len(ACTIONS))),  # the source's actions in logged order, as indices into ALE's 18
    "obs.height": 0,
    "obs.width": 0,
    "obs.channels": 0,  # 1 or 3
    "obs.colour": "rgb",  # rgb | ale_gray | cv2_gray
    "obs.resize": "area",  # area | none | ...
    "obs.max_pool": True,  # maximum over the last two raw frames
    "frame_skip": 4,
    "sticky_prob": 0.0,
    "noop_max": 0,
    "fire_reset": False,
    "episodic_life": False,  # a lost life ends the episode
    "reward.clipped": False,
    "time_limit": None,  # agent steps
    "truncation_known": True,  # false: a cut by the time limit looks like a termination
    "lossy": None,  # e.g. "jpeg" where the frames were compressed with loss before they came here
    "policy": {},  # what acted: {"type": ..., ...}
    "seed": None,  # seed of the collection; the split by episode is drawn from it
    "licence": "",
    "dataset": {},  # name, url, version, sha256, citation of a public log
    "versions": {},  # of what wrote the episodes, e.g. {"ale_py": "0.12.1"}
}
_NESTED = ("obs", "reward")  # spelled as dotted names in this file
_MUST_AGREE = (  # the fields that decide what a frame, a step or a reward means
    *(name for name in _DEFAULTS if name.startswith("obs.")),
    "frame_skip",
    "sticky_prob",
    "episodic_life",
    "reward.clipped",
)
GREYS = ("ale_gray", "cv2_gray")
"""Names of one grey: ALE's own levels are OpenCV's luma of its colours, to the level, in 61 of the 62 Atari games of
conf/game (ale-py 0.12.1), but not in Air Raid, whose picture loses its colours. Frames that were shrunk in colour, and
then made grey, are a level off; where moving things flicker, the maximum over two frames, taken of colours in place of
greys, differs by up to 38 levels in up to 0.7 % of the pixels (eight games, random play)."""


def make_card(source: str, game: str, obs: Mapping[str, Any], **fields: Any) -> Card:
    """A valid dataset card; fields not given take the defaults (frame skip 4, no sticky actions, rewards as logged).

    Args:
        source: short name of where the episodes come from, an identifier.
        game: ALE's snake_case name.
        obs: height, width, channels and, where they differ from the defaults, colour, resize and max_pool.
        fields: any other field.

    Raises:
        UserError: a field is unknown, of a wrong type or out of range.
    """
    given = _flat({"source": source, "game": game, "obs": obs, **fields})
    if unknown := set(given) - set(_DEFAULTS):
        raise UserError(f"a dataset card has no field {min(unknown)!r}; the fields are {', '.join(_DEFAULTS)}")
    card: Card = {name: {} for name in _NESTED}
    for name, value in (_DEFAULTS | given).items():
        group, _, key = name.rpartition(".")
        (card[group] if group else card)[key] = value
    return validate_card(json.loads(json.dumps(card)))


def validate_card(card: Mapping[str, Any], where: str = "the dataset card") -> Card:
    """The card as a plain dict, if it is whole; fields that a later version added are let through.

    Raises:
        UserError: naming the first field that is missing, of a wrong type or out of range, and `where` it is.
    """
    given = _flat(card)
    for name, default in _DEFAULTS.items():
        if name not in given:
            raise UserError(f"{where} lacks the field {name!r}; the fields are {', '.join(_DEFAULTS)}")
        value, kind = given[name], float if isinstance(default, int) else type(default)
        if default is not None and not isinstance(value, (kind, int) if kind is float else kind):
            raise UserError(f"{where} has {name}={value!r}, which must be of type {type(default).__name__}")
    fine = {
        "source": given["source"].isidentifier(),
        "game": bool(given["game"]),
        "action_set": bool(given["action_set"]) and all(a in range(len(ACTIONS)) for a in given["action_set"]),
        "obs.height": given["obs.height"] > 0,
        "obs.width": given["obs.width"] > 0,
        "obs.channels": given["obs.channels"] in (1, 3),
        "frame_skip": given["frame_skip"] > 0,
        "sticky_prob": 0 <= given["sticky_prob"] < 1,
    }
    for name in (name for name, ok in fine.items() if not ok):
        raise UserError(f"{where} has {name}={given[name]!r}, which is out of range")
    return dict(card)


def check_compatible(
    data: Mapping[str, Any], other: Mapping[str, Any], what: str, same_game: bool = True, mend: str | None = None
) -> None:
    """Refuse data whose frames, steps or rewards mean something else than those of `other`.

    Either name of grey will do, and any way of resizing where frames are resized when they are read: who asks for that
    takes frames of other origins for the same.

    Args:
        data: card of the store at hand.
        other: card of what the store is to be used with, e.g. the one in a checkpoint.
        what: names the owner of `other` in the message, e.g. "the checkpoint runs/pong/best.ckpt".
        same_game: also ask for the same game (fine-tuning does not).
        mend: the end of the message, where the usual advice does not fit.

    Raises:
        UserError: naming the first field that differs, both values and the mend.
    """
    a, b = _flat(data), _flat(other)
    alike = {
        "game": a.get("game") in b.get("games", ()),
        "obs.colour": {a.get("obs.colour"), b.get("obs.colour")} <= set(GREYS),
        "obs.resize": any(card.get("obs.resized_when_read") for card in (a, b)),
    }
    for name in (("game",) if same_game else ()) + _MUST_AGREE:
        if a.get(name) == b.get(name) or alike.get(name):
            continue
        advice = f"collect or import a store with {name}={b.get(name)!r}, or train a model on this store"
        theirs = b.get(name)
        if name == "game":
            theirs = " and ".join(b.get("games", [theirs]))
            advice = f"give a store of {theirs}, or move the model to {a.get(name)} with `worldmodels finetune`"
        raise UserError(f"the store has {name}={a.get(name)!r} but {what} has {theirs!r}: {mend or advice}")


def check_episode(card: Card, e: Episode, where: str) -> None:
    """Refuse an episode that is malformed or not of the card's frame size.

    Raises:
        UserError: saying what is wrong and `where`.
    """
    t, obs = len(e.action), card["obs"]
    frame = (obs["height"], obs["width"]) + ((3,) if obs["channels"] == 3 else ())
    flags = (e.terminated, e.truncated, e.life_loss)
    problems = {
        "it has no rows": t == 0,
        f"obs is {e.obs.dtype} {e.obs.shape}, not uint8 {(t, *frame)}": e.obs.dtype != np.uint8
        or e.obs.shape != (t, *frame),
        "final_obs differs from the rows of obs in shape or type": e.final_obs is not None
        and (e.final_obs.dtype != np.uint8 or e.final_obs.shape != frame),
        "its columns differ in length": any(x.shape != (t,) for x in (e.action, e.reward, *flags)),
        "a flag is not bool": any(x.dtype != bool for x in flags),
        f"an action is not an index 0 to {len(ACTIONS) - 1}": e.action.dtype.kind not in "iu"
        or bool(((e.action < 0) | (e.action >= len(ACTIONS))).any()),
        "a reward is not finite": not np.isfinite(e.reward).all(),
        "it ends before its last row": bool(e.terminated[:-1].any() or e.truncated[:-1].any()),
    }
    for problem in (problem for problem, found in problems.items() if found):
        raise UserError(f"{where} cannot be stored: {problem}")


def card_digest(card: Mapping[str, Any]) -> str:
    """SHA-256 of the card as canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(card, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _flat(card: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in card.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if key in _NESTED else {key: value}
    return flat

"""What the importers of people's own recordings share: the order of files, the card, and the checks of an episode."""

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data.card import Card, make_card, validate_card
from worldmodels.data.sources.reading import MAX_FRAMES, bad, check_rewards, one_game, to_full_set
from worldmodels.types import ACTIONS, Episode, UserError

ARRAYS = ("obs", "action", "reward", "terminated", "truncated", "life_loss")
REQUIRED = ARRAYS[:3]
MAX_BYTES = 2**32  # of one array: 27,000 steps of 210x160 frames in colour are 2.7 GB
_SMALL, _RATIO = 2**26, 800  # deflate shrinks zeros 1,030 times; Pong at 210x160, the emptiest play measured, 370 times


def natural(name: str) -> list[Any]:
    """Sort key that puts ep_2 before ep_10."""
    pieces = re.split("0*([0-9]+)", name)
    return [(len(piece), piece) if i % 2 else piece for i, piece in enumerate(pieces)] + [name]


def files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The file `path`, or the files of the folder `path` that end so, in natural order.

    Raises:
        UserError: there are none.
    """
    root = Path(path)
    if root.is_dir():
        found = [p for p in root.iterdir() if p.suffix.lower() in suffixes and p.name[0] != "." and p.is_file()]
    else:
        found = [root] if root.is_file() and root.suffix.lower() in suffixes else []
    if not found:
        raise bad(path, f"there is no {' or '.join(suffixes)} file")
    return sorted(found, key=lambda p: natural(p.name))


def file_of(path: str, part: str) -> Path:
    """The file that `part` names: in the folder `path`, or `path` itself."""
    return Path(path) / part if Path(path).is_dir() else Path(path)


def at_least(least: int, **settings: int | None) -> None:
    """Refuse settings that are given and are no whole numbers of at least `least`.

    Raises:
        UserError: naming the setting.
    """
    for name, value in settings.items():
        if value is not None and (type(value) is not int or value < least):
            raise UserError(f"source.{name}={value} must be a whole number of at least {least}")


def check_array(path: str | Path, name: str, shape: tuple[int, ...], dtype: np.dtype, stored: int) -> None:
    """Refuse an array before memory is given to it.

    Args:
        path: where it lies, for the message.
        name: what it is called, for the message.
        shape: what its header claims.
        dtype: what its header claims.
        stored: bytes that it takes in the file, compressed or not.

    Raises:
        UserError: it is of a kind or size that no recording has.
    """
    if dtype.hasobject:
        raise bad(path, f"{name} holds Python objects, which are never loaded; save it as plain numbers")
    if dtype.kind not in "biuf" or any(type(n) is not int or n < 0 for n in shape):
        raise bad(path, f"{name} is {dtype} {shape}, not an array of numbers")
    size = dtype.itemsize * prod(shape)
    if shape and shape[0] > MAX_FRAMES + 1:
        raise bad(path, f"{name} claims {shape[0]} rows; an episode has at most {MAX_FRAMES}")
    if size > MAX_BYTES:
        raise bad(path, f"{name} claims {size} bytes; at most {MAX_BYTES} are read as one episode")
    if size > _SMALL and size > _RATIO * stored:
        raise bad(path, f"{name} claims {size} bytes in the {stored} that it takes; no recording shrinks so far")


def frame_of(path: str | Path, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """(H, W) or (H, W, 3), the shape of one frame of an array of observations.

    Raises:
        UserError: these are no frames.
    """
    frame = shape[1:3] if len(shape) == 4 and shape[3] == 1 else shape[1:]
    if dtype != np.uint8 or not (len(frame) == 2 or (len(frame) == 3 and frame[2] == 3)) or 0 in frame:
        raise bad(path, f"obs is {dtype} {shape}; allowed is uint8 (T, H, W) or (T, H, W, 3), colour last")
    return frame


def same_frame(path: str | Path, frame: tuple[int, ...], first: tuple[int, ...]) -> None:
    """Refuse a file whose frames differ in size or colour from those of the first, which the card describes.

    Raises:
        UserError: they do.
    """
    if frame != first:
        raise bad(path, f"its frames are {frame} but those of the first file are {first}; a store holds one size")


def recording(path: str | Path, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any] | None = None) -> Episode:
    """One episode of somebody's own recording, checked.

    Args:
        path: where it lies, for messages.
        arrays: by the names in `ARRAYS`, those of `REQUIRED` at least. `obs` is (T or T+1, H, W[, 1 or 3]) uint8, with
            T+1 rows where the frame after the last action was kept; the others are (T,). Without flags nothing ended,
            and the episode is open.
        info: kept with the episode.

    Raises:
        UserError: an array is missing, or not as said above, or a flag is set before the last row.
    """
    for name in REQUIRED:
        if name not in arrays:
            raise bad(path, f"it has no {name}; needed are {', '.join(REQUIRED)}")
    action = to_full_set(arrays["action"], list(range(len(ACTIONS))), path)
    steps = len(action)
    if not steps:
        raise bad(path, "the episode has no rows")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        columns = {"reward": check_rewards(arrays["reward"], path)}
    for name in ARRAYS[3:]:
        columns[name] = _flag(arrays[name], name, path) if name in arrays else np.zeros(steps, bool)
    obs = arrays["obs"]
    obs = obs.reshape(len(obs), *frame_of(path, obs.shape, obs.dtype))
    if len(obs) not in (steps, steps + 1):
        raise bad(path, f"{steps} actions need {steps} frames or one more, but obs has {len(obs)}")
    for name, values in columns.items():
        if len(values) != steps:
            raise bad(path, f"it has {steps} actions but {len(values)} rows of {name}")
        if name in ("terminated", "truncated") and values[:-1].any():
            raise bad(path, f"{name} is set before the last row; an episode ends once", int(values.argmax()))
    final = obs[steps] if len(obs) > steps else None
    return Episode(obs[:steps], action, *columns.values(), final_obs=final, info=info or {})


def _flag(values: np.ndarray, name: str, path: str | Path) -> np.ndarray:
    if values.ndim != 1 or values.dtype.kind not in "biu" or bool(((values != 0) & (values != 1)).any()):
        raise bad(path, f"{name} is {values.dtype} {values.shape}; allowed are true and false, or 0 and 1, a row each")
    return values.astype(bool)


def recording_card(
    source: str, path: str, frame: tuple[int, ...], game: str | None, ends: bool = True, **about: Any
) -> Card:
    """The card of somebody's own recordings: what card.json beside them says, and over it what the user says.

    Args:
        source: short name of the importer.
        path: the folder, or a file in it.
        frame: (H, W) or (H, W, 3), of the data.
        game: ALE's name, where the user gives it.
        ends: whether a cut by a time limit was logged apart from the end of a game.
        about: other fields of a card, those of `obs` and `reward` too, by their last name; None says nothing.

    Raises:
        UserError: the game is not told, or told twice, or a field cannot be so, or card.json is no card of these data.
    """
    size = dict(zip(("height", "width", "channels"), (*frame, 1), strict=False))
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / "card.json"
    if file.is_file():
        card = _read_card(file)
        if game not in (None, card["game"]):
            raise bad(file, f"it is of {card['game']}, not {game}; leave game= out, or give recordings of one game")
        if told := {k: card["obs"][k] for k in size if card["obs"][k] != size[k]}:
            raise bad(file, f"it says {told} of frames that are {size}")
    else:
        colour = "rgb" if size["channels"] == 3 else "ale_gray"
        card = make_card(source, one_game(game, [], path), size | {"colour": colour}, policy={"type": "unknown"})
    card |= {"source": source, "truncation_known": card["truncation_known"] and ends}
    for name, value in about.items():
        group = next((card[group] for group in ("obs", "reward") if name in card[group]), card)
        if value is not None:
            group[name] = value
    return validate_card(card, f"what is said of {path}")


def _read_card(file: Path) -> Card:
    try:
        if file.stat().st_size > 2**20:
            raise ValueError("too long")
        card = json.loads(file.read_bytes())
        if not isinstance(card, dict) or not all(isinstance(card.get(k), dict) for k in ("obs", "reward")):
            raise ValueError("it has no obs and reward")
    except (ValueError, RecursionError) as e:
        raise bad(file, f"it is no dataset card ({e})") from e
    return validate_card(card, str(file))

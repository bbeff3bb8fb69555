"""Datasets of Minari (Farama), HDF5 or Arrow, with JPEG or raw frames, read without Minari itself.

As Minari 0.5.4 writes them (minari/dataset/minari_storage.py, _storages/hdf5_storage.py, _storages/arrow_storage.py):

    DATASET/data/metadata.json     id, number of episodes, spaces and env_spec (each of them JSON in a string)
    DATASET/data/main_data.hdf5    groups episode_0, episode_1, ...: observations (T+1 rows), actions, rewards,
                                   terminations, truncations (T rows)
    DATASET/data/0/part-0.arrow    or a table for each episode, its other columns padded to T+1 rows

Frames are JPEG unless the writer said otherwise: rows of any length, or one (T+1, length) array where all files happen
to be equally long. What a file holds is told by its types. `worldmodels export` adds its dataset card and life losses.
"""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from worldmodels.data.card import Card, make_card, validate_card
from worldmodels.data.sources.minari_files import ARROW, HDF5, Stored, library, opened, sentences
from worldmodels.data.sources.reading import bad, minimal_actions, one_game, to_full_set
from worldmodels.data.sources.recordings import recording
from worldmodels.types import ACTIONS, Episode

CARD = "worldmodels_card"  # in metadata.json, where `worldmodels export` wrote the dataset


class _Dataset(NamedTuple):
    file: Path  # metadata.json
    hdf5: bool
    meta: dict[str, Any]
    spec: dict[str, Any]  # env_spec of Gymnasium, empty where there is none
    actions: int | None  # of the action space, where there is one
    game: str


def minari_card(path: str, game: str | None = None) -> Card:
    """The dataset card of what `minari` yields.

    What metadata.json does not say is as in the public sets `atari/GAME/expert-v0`: frame skip 4, no sticky actions,
    raw frames without maximum (minari-dataset-generation-scripts, scripts/atari/create_datasets.py).

    Raises:
        UserError: there is not exactly one dataset of one game, or its first episode cannot be read.
    """
    found = _find(path, game)
    with _open(found, minari_parts(path, game)[0]) as stored:
        frame, lossy = stored.shape, "jpeg" if stored.jpeg else None
    if ours := found.meta.get(CARD):
        return ours | {"source": "minari", "lossy": lossy or ours["lossy"]}
    with sentences(found.file):
        return _card(found, frame, lossy)


def _card(found: _Dataset, frame: tuple[int, ...], lossy: str | None) -> Card:
    meta, env = found.meta, found.spec.get("kwargs", {})
    wrappers = {w["name"]: w["kwargs"] or {} for w in found.spec.get("additional_wrappers") or []}
    prepared = wrappers.get("AtariPreprocessing")  # its defaults: gymnasium/wrappers/atari_preprocessing.py
    skip = env.get("frameskip", 4) if prepared is None else prepared.get("frame_skip", 4)
    if type(skip) is not int or skip < 1:
        raise bad(found.file, f"its frame skip is {skip}, but a dataset card can only note a fixed number of frames")
    known_gray = prepared is not None or env.get("obs_type") == "grayscale"
    obs = {
        "height": frame[0],
        "width": frame[1],
        "channels": 3 if len(frame) == 3 else 1,
        "colour": "rgb" if len(frame) == 3 else "ale_gray" if known_gray else "gray",
        "resize": "area" if wrappers.keys() & {"AtariPreprocessing", "ResizeObservation"} else "none",
        "max_pool": prepared is not None and skip > 1,
    }
    limits = [found.spec.get("max_episode_steps"), (env.get("max_num_frames_per_episode") or 0) // skip]
    told = {"name": "dataset_id", "url": "code_permalink", "author": "author", "minari_version": "minari_version"}
    return make_card(
        "minari",
        found.game,
        obs,
        action_set=_action_set(found),
        frame_skip=skip,
        sticky_prob=env.get("repeat_action_probability", 0.0),
        noop_max=0 if prepared is None else prepared.get("noop_max", 30),
        episodic_life=prepared is not None and prepared.get("terminal_on_life_loss", False),
        time_limit=min((n for n in limits if n), default=None),
        lossy=lossy,
        policy={"type": meta["algorithm_name"]} if meta.get("algorithm_name") else {},
        dataset={name: meta[key] for name, key in told.items() if meta.get(key)},
    )


def minari_parts(path: str, game: str | None = None) -> list[str]:
    """The names of the episodes, in numeric order.

    Raises:
        UserError: as `minari_card`, or there are fewer episodes than metadata.json says.
    """
    found = _find(path, game)
    folder, total = found.file.parent, found.meta.get("total_episodes")
    if type(total) is not int or total < 1:
        raise bad(found.file, f"its total_episodes is {total}, so that there is nothing to import")
    if found.hdf5:
        h5py = library("h5py")
        with sentences(folder / HDF5), h5py.File(folder / HDF5) as f:
            stored = set(f)
    else:
        stored = {f"episode_{p.parent.name}" for p in folder.glob(f"*/{ARROW}")}
    parts = []
    for number in range(total):
        parts.append(f"episode_{number}")
        if parts[-1] not in stored:
            raise bad(found.file, f"it tells of {total} episodes, but there is no {parts[-1]}")
    return parts


def minari(path: str, part: str, game: str | None = None) -> Iterator[Episode]:
    """One episode, with its last frame.

    Args:
        path: folder of a dataset, or one above it that holds no other.
        part: one of `minari_parts`.
        game: ALE's name of the game, where the dataset does not tell it.

    Raises:
        UserError: a file is missing, damaged, or not what Minari writes.
    """
    found = _find(path, game)
    with _open(found, part) as stored:
        action = to_full_set(stored.columns["action"], _action_set(found), stored.where)
        if len(stored.rows) != len(action) + 1:
            raise bad(stored.where, f"{len(action)} actions need one frame more, but there are {len(stored.rows)}")
        episode = recording(stored.where, {**stored.columns, "action": action, "obs": stored.frames()})
    yield episode


# The dataset


def _find(path: str, game: str | None) -> _Dataset:
    files = sorted(Path(path).rglob("data/metadata.json"))
    if len(files) != 1:
        names = " and ".join(str(file.parents[1]) for file in files[:2])
        problem = (
            f"it holds {len(files)} datasets, {names}" if files else "there is no data/metadata.json in it or below"
        )
        raise bad(path, f"{problem}; give the folder of one dataset, such as datasets/atari/pong/expert-v0")
    with sentences(files[0]):
        return _describe(_object(files[0].read_bytes()), files[0], game)


def _describe(meta: dict[str, Any], file: Path, game: str | None) -> _Dataset:
    form = meta.get("data_format", "hdf5")
    if form not in ("hdf5", "arrow"):
        raise bad(file, f"its data_format is {form!r}, but only hdf5 and arrow are read")
    spec, space = _object(meta.get("env_spec")), _object(meta.get("action_space"))
    actions, env = space.get("n"), spec.get("kwargs", {})
    if space and (space["type"] != "Discrete" or type(actions) is not int or space.get("start", 0) != 0):
        raise bad(file, "its actions are not Discrete from 0 onwards, as those of an Atari game are")
    if CARD in meta:
        name = validate_card(meta[CARD], f"{CARD} in {file}")["game"]
        if game not in (None, name):
            raise bad(file, f"it holds {name}, not {game}")
    else:
        told = re.match(r"atari/([^/]+)/", meta.get("dataset_id", ""))
        name = one_game(game, ([told[1]] if told else []) + ([env["game"]] if "game" in env else []), file)
    return _Dataset(file, form == "hdf5", meta, spec, actions, name)


def _object(text: str | bytes | None) -> dict[str, Any]:
    value = json.loads(text or "{}")
    if not isinstance(value, dict):
        raise ValueError("a JSON object is expected")
    return value


def _action_set(found: _Dataset) -> list[int]:
    """The actions by logged index, as indices into the 18: all, or those that ALE calls minimal, by their number."""
    everything = list(range(len(ACTIONS)))
    n = found.actions
    if n == len(everything) or (n is None and found.spec.get("kwargs", {}).get("full_action_space")):
        return everything
    minimal = minimal_actions(found.game)
    if n not in (None, len(minimal)):
        problem = f"its action space has {n} actions, but {found.game} has {len(minimal)}, or all {len(everything)}"
        raise bad(found.file, problem)
    return minimal


def _open(found: _Dataset, part: str) -> AbstractContextManager[Stored]:
    space = found.meta.get("observation_space")
    return opened(found.file.parent, found.hdf5, part.removeprefix("episode_"), space, CARD in found.meta)

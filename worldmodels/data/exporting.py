"""Write the episodes of a store for other programs: one .npz file each, or a dataset of Minari (Farama)."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data.disk import atomic, disk_errors, make_folder, read_json, remove, write_json
from worldmodels.data.sources.minari import CARD
from worldmodels.data.store import Store
from worldmodels.types import ACTIONS, Episode, UserError

Progress = Callable[[int], None]
"""Called with the number of steps that are done, after every episode."""


def export(store: Store, out: Path, form: str, progress: Progress = lambda steps: None) -> dict[str, Any]:
    """Write all episodes of `store` to the folder `out`; an interrupted export is gone on with, or begun anew.

    Args:
        store: what to write.
        out: a new or empty folder, or one with an earlier export of this store in this format.
        form: "npz" or "minari".
        progress: told of every episode.

    Returns:
        Plain figures: game, episodes, steps, bytes, and what had to be left out.

    Raises:
        UserError: the format is unknown or needs a library that is not installed, the folder holds other things, or the
            disk refuses.
    """
    if form not in _WRITERS:
        raise UserError(f"format={form} is unknown; there are {', '.join(_WRITERS)}")
    write, ours = _WRITERS[form], {"format": form, "store_uuid": store.uuid}
    marker = out / "export.json"
    make_folder(out)
    with disk_errors(out):
        if marker.exists() and read_json(marker) != ours:
            raise UserError(f"{out} holds an export of another store or format; give another out=, or delete it")
        known = (".", "export.json.tmp")
        if not marker.exists() and (foreign := [p.name for p in out.iterdir() if not p.name.startswith(known)]):
            raise UserError(f"{out} holds other things ({min(foreign)}); give an empty folder")
        for tmp in list(out.glob("*.tmp*")):
            remove(tmp)
        write_json(marker, ours)
        figures = write(store, out, progress)
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return {"format": form, "game": store.card["game"], **figures, "bytes": size}


def _npz(store: Store, out: Path, progress: Progress) -> dict[str, Any]:
    """card.json, and NUMBER.npz for each episode; files that are there are whole, and stay."""
    write_json(out / "card.json", store.card)
    for i, done in enumerate(store.lengths.cumsum().tolist()):
        path = out / f"{i:09d}.npz"
        if not path.exists():
            e = store.episode(i)
            arrays = {"obs": _frames(e), "action": e.action, "reward": e.reward}
            arrays |= {"terminated": e.terminated, "truncated": e.truncated}
            if e.life_loss.any():
                arrays["life_loss"] = e.life_loss
            with atomic(path) as tmp, open(tmp, "wb") as f:
                np.savez_compressed(f, allow_pickle=False, **arrays)
        progress(done)
    return {"episodes": len(store.lengths), "steps": int(store.lengths.sum())}


def _minari(store: Store, out: Path, progress: Progress) -> dict[str, Any]:
    """A lossless dataset in the folder `minari`, which appears when it is whole.

    Minari asks for a frame after every action. Where the last one is not logged the last transition is left out, which
    loses least: a frame that nobody saw would be learnt from. Where the episode ended there, the transition before it
    is then marked as truncated, since the game did not end with it.
    """
    try:
        import h5py  # noqa: F401 (Minari asks for it later)
        import minari
        from gymnasium.spaces import Box, Discrete
    except ImportError as e:
        raise UserError(f'format=minari needs {e.name}; install it with: pip install "worldmodels[minari]"') from e
    card, root = store.card, out / "minari"
    obs, name = card["obs"], f"worldmodels/{card['game']}-v0"
    shape = (obs["height"], obs["width"]) + ((3,) if obs["channels"] == 3 else ())
    figures: dict[str, Any] = {"dataset_id": name, "episodes": 0, "steps": 0}
    figures |= {"transitions_left_out": 0, "episodes_left_out": 0}
    remove(root)
    with atomic(root) as tmp, _datasets_in(tmp), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the dataset does not tell: environment, authors, scores
        dataset = minari.create_dataset_from_buffers(
            name,
            [],
            observation_space=Box(0, 255, shape, np.uint8),
            action_space=Discrete(len(ACTIONS)),
            algorithm_name=card["policy"].get("type"),
            description=f"{card['game']}, exported by worldmodels; {CARD} in metadata.json tells how it was played",
            data_format="hdf5",
            jpeg_encoding=False,
        )
        for i, done in enumerate(store.lengths.cumsum().tolist()):
            e = store.episode(i)
            if e.final_obs is None:
                e = _without_last(e)
                figures["transitions_left_out"] += 1
                figures["episodes_left_out"] += not len(e)
            if len(e):
                _add(dataset, e)
                figures["episodes"] += 1
                figures["steps"] += len(e)
            progress(done)
        told = {k: v for k, v in figures.items() if k.endswith("left_out")}
        dataset.storage.update_metadata({CARD: card, **told})
    return figures


def _add(dataset: Any, e: Episode) -> None:
    from minari.data_collector import EpisodeBuffer

    columns: dict[str, Any] = {
        "observations": _frames(e),
        "actions": e.action.astype(np.int64),
        "rewards": e.reward,
        "terminations": e.terminated,
        "truncations": e.truncated,
        "infos": {"life_loss": np.concatenate([[False], e.life_loss])},  # T+1 rows, of which the first is the reset's
    }
    dataset.update_dataset_from_buffer([EpisodeBuffer(**columns)])


def _frames(e: Episode) -> np.ndarray:
    return e.obs if e.final_obs is None else np.concatenate([e.obs, e.final_obs[None]])


def _without_last(e: Episode) -> Episode:
    """The episode without its last transition, so that its last frame comes after the last action."""
    n = len(e) - 1
    shorter = {name: getattr(e, name)[:n] for name in ("obs", "action", "reward", "terminated", "life_loss")}
    ended = e.terminated[n] | e.truncated[n]
    truncated = np.append(e.truncated[: n - 1], ended) if n else e.truncated[:0]
    return replace(e, **shorter, truncated=truncated, final_obs=e.obs[n])


@contextmanager
def _datasets_in(root: Path) -> Iterator[None]:
    """Let Minari keep its datasets in `root`: it asks the environment for the place."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        yield
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before


_WRITERS = {"npz": _npz, "minari": _minari}

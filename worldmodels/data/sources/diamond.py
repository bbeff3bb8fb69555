"""Episodes that DIAMOND collected while it trained (eloialonso/diamond): the folder `dataset` of one of its runs.

    dataset/{train,test}/info.pt                 never read: it needs a pickle that runs code; the episodes say it all
    dataset/{train,test}/200/30/4/1234.pt        episode 1234, one file (src/data/dataset.py, _get_episode_path)

A file is a dict of obs (T, 3, H, W) uint8, act (T,) int64 in the game's minimal action set, rew (T,) float32 as the
game gave them, end and trunc (T,) uint8, and info, which holds final_observation (3, H, W) float32 in [-1, 1] where the
episode has ended (src/data/episode.py, src/coroutines/collector.py); it may lie on a GPU. Episodes that were still
being played when the run stopped have no flag, and are open.

When DIAMOND saves its floats in [-1, 1] as bytes it cuts instead of rounding, so that 63 of the 256 levels are one too
low in obs, and lower still in episodes that it loaded and went on with. Two levels become one: this cannot be undone,
and obs stays as it is. final_observation was never cut; rounding (x + 1) / 2 * 255 gives back the very bytes.

In `train` a lost life ends an episode, in `test` only the end of the game does (config/env/atari.yaml); each episode's
`info["split"]` says which it is.
"""

import warnings
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodels.data.card import Card, make_card
from worldmodels.data.sources.reading import bad, minimal_actions, one_game, to_full_set
from worldmodels.data.sources.recordings import check_array, recording, same_frame
from worldmodels.types import Episode, UserError

SPLITS = ("train", "test")
COLUMNS = {"obs": torch.uint8, "act": torch.int64, "rew": torch.float32, "end": torch.uint8, "trunc": torch.uint8}
_MAX_PICKLE = 2**20  # bytes; DIAMOND's has about 600


def diamond_card(path: str, game: str | None = None, split: str | None = None) -> Card:
    """The dataset card of the episodes at `path`.

    Args:
        path: the folder that holds `train` and `test`.
        game: ALE's name; the files do not tell it.
        split: only the episodes of `train` or of `test`; None for both.

    Raises:
        UserError: there are no episodes, one is missing, the first cannot be read, or the game is not told.
    """
    parts = diamond_parts(path, game, split)
    height, width, channels = _frame(Path(path, parts[0]))
    game = one_game(game, [], path)
    return make_card(
        "diamond",
        game,
        {"height": height, "width": width, "channels": channels},
        action_set=minimal_actions(game),
        noop_max=30,
        episodic_life=parts[0].startswith("train"),
        time_limit=27_000,  # ALE's own, 108,000 raw frames
        lossy="truncated to bytes",
        policy={"type": "actor-critic, as it learned in the model's dreams, with random actions"},
        dataset={
            "name": "a dataset of DIAMOND",
            "url": "https://github.com/eloialonso/diamond",
            "citation": "Alonso et al. 2024, arXiv:2405.12399",
            "splits": sorted({part.partition("/")[0] for part in parts}),
            "note": "a lost life ends an episode of train, not of test; 63 of 256 levels of obs are 1 too low",
        },
    )


def diamond_parts(path: str, game: str | None = None, split: str | None = None) -> list[str]:
    """The files of the episodes relative to `path`, by number, those of train first.

    Raises:
        UserError: there are none, or one is missing, or lies where DIAMOND would not look for it.
    """
    if split not in (None, *SPLITS):
        raise UserError(f"source.split={split} is unknown; allowed are train, test and null, which is both")
    parts = []
    for name in [split] if split else SPLITS:
        files = Path(path, name).glob("[0-9]*/[0-9]*/[0-9]*/*.pt")
        numbers = sorted(int(file.stem) for file in files if file.stem.isdecimal() and len(file.stem) < 10)
        for expected, number in enumerate(numbers):
            if number != expected:
                raise bad(Path(path, name), f"episode {expected} is missing; copy the folder again")
            parts.append(_part(name, number))
            if not Path(path, parts[-1]).is_file():
                raise bad(path, f"episode {number} is not at {parts[-1]}, where DIAMOND puts it")
    if not parts:
        raise bad(path, "it holds no episodes; give DIAMOND's folder `dataset`, in which are train and test")
    return parts


def diamond(path: str, part: str, game: str | None = None, split: str | None = None) -> Iterator[Episode]:
    """The episode of one file.

    Args:
        path: as in `diamond_card`.
        part: the file, relative to `path`.
        game: as in `diamond_card`.
        split: as in `diamond_card`.

    Raises:
        UserError: the file is damaged or hostile, or what it holds is no episode like the others.
    """
    file, name = Path(path, part), part.partition("/")[0]
    columns, final = _load(file)
    frames = [columns["obs"]] if final is None else [columns["obs"], final[None]]
    arrays = {
        "obs": np.ascontiguousarray(np.concatenate(frames).transpose(0, 2, 3, 1)),
        "action": to_full_set(columns["act"], minimal_actions(one_game(game, [], path)), file),
        "reward": columns["rew"],
        "terminated": columns["end"],
        "truncated": columns["trunc"],
    }
    first = next(part for part in (_part(s, 0) for s in ([split] if split else SPLITS)) if Path(path, part).is_file())
    same_frame(file, arrays["obs"].shape[1:], _frame_cached(Path(path, first), Path(path, first).stat().st_mtime_ns))
    yield recording(file, arrays, {"split": name, "episode": int(file.stem)})


def _part(split: str, number: int) -> str:
    hundreds, tens, ones = number % 1000 // 100 * 100, number % 100 // 10 * 10, number % 10
    return f"{split}/{hundreds:03d}/{tens:02d}/{ones}/{number}.pt"


def _frame(file: Path) -> tuple[int, ...]:
    _, channels, height, width = _load(file)[0]["obs"].shape
    return height, width, channels


@lru_cache(1)
def _frame_cached(file: Path, changed: int) -> tuple[int, ...]:
    return _frame(file)


def _load(file: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The columns of an episode, mapped from the file, and the final frame (3, H, W) uint8 where there is one."""
    try:
        size = _check_archive(file)
        # Mapped, a storage cannot grow to whatever size the pickle claims.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a damaged file calls its pickle's version
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(stored, dict) or not isinstance(info := stored["info"], dict):
            raise bad(file, "it is no dict of an episode")
        columns = {name: _array(stored[name], name, dtype, file, size) for name, dtype in COLUMNS.items()}
        if columns["obs"].ndim != 4 or columns["obs"].shape[1] != 3:
            raise bad(file, f"obs is {columns['obs'].shape}; allowed is (T, 3, H, W)")
        final = _final(info["final_observation"], columns["obs"], file, size) if "final_observation" in info else None
    except UserError:
        raise
    except Exception as e:  # a damaged pickle can fail in any way, but it runs no code
        reason = str(e).partition("\n")[0].partition(". ")[0]
        raise bad(file, f"it is no whole episode of DIAMOND ({type(e).__name__}: {reason})") from e
    return columns, final


def _check_archive(file: Path) -> int:
    """Bytes of the file, if it is a zip archive that holds no more than it seems to: torch.save compresses nothing."""
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            limit = _MAX_PICKLE if member.filename.endswith(".pkl") else size
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > limit:
                raise bad(file, f"its member {member.filename!r} is not as torch.save writes it")
    return size


def _array(value: Any, name: str, dtype: torch.dtype, file: Path, stored: int) -> np.ndarray:
    if type(value) is not Tensor or value.dtype != dtype or value.layout is not torch.strided:
        kind = getattr(value, "dtype", type(value).__name__)
        raise bad(file, f"{name} is {kind}; DIAMOND writes {dtype}")
    if value.numel() * value.element_size() > stored:
        raise bad(file, f"{name} claims {tuple(value.shape)}, more than the file holds")
    array = value.detach().numpy()
    check_array(file, name, array.shape, array.dtype, stored)
    return array


def _final(value: Any, obs: np.ndarray, file: Path, stored: int) -> np.ndarray:
    floats = _array(value, "final_observation", torch.float32, file, stored)
    if floats.shape != obs.shape[1:] or not (np.abs(floats) <= 1).all():
        raise bad(file, f"final_observation is no frame of {obs.shape[1:]} in [-1, 1]")
    return np.rint((floats + 1) / 2 * 255).astype(np.uint8)

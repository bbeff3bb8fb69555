"""Logs of real play for the benchmarks: stores, and the same episodes in other forms. What is there is kept."""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tests.fixtures.make_dqn_replay import write_log
from worldmodels.data.collecting import collect
from worldmodels.data.disk import read_json, write_json
from worldmodels.data.sources.atari_play import atari_card, atari_play
from worldmodels.data.sources.reading import minimal_actions
from worldmodels.data.store import Store
from worldmodels.hardware import cores
from worldmodels.types import Episode

GAMES = ("pong", "breakout", "ms_pacman")
FORMS = {"gray84": {"size": 84, "colour": "ale_gray"}, "rgb64": {"size": 64, "colour": "rgb"}}


def stores(root: Path, form: str, steps: int) -> list[Path]:
    """A store of at least `steps` steps for each game: random actions that are held, sticky actions, frame skip 4."""
    paths = []
    for game in GAMES:
        settings = {"game": game, "sticky_prob": 0.25, "mixture": {"sticky": 1.0}, **FORMS[form]}
        path = root / f"{game}-{form}-{steps}"

        def play(more: int, start: int, settings: dict = settings) -> Iterator[Episode]:
            return atari_play(more, 0, start, processes=cores(), **settings)

        collect(path, atari_card(0, **settings), play, steps)
        paths.append(path)
    return paths


def write_pt_files(root: Path, path: Path) -> list[Path]:
    """The episodes of a store as torch.save writes them: one file each, uint8 frames and their columns."""
    files, store = [], Store.open(path)
    for i in range(len(store.lengths)):
        file = root / f"{path.name}-pt" / f"{i:05d}.pt"
        files.append(file)
        if not file.exists():
            e = store.episode(i)
            file.parent.mkdir(exist_ok=True)
            columns = {"obs": e.obs, "act": e.action, "rew": e.reward, "end": e.terminated, "trunc": e.truncated}
            torch.save({k: torch.from_numpy(v) for k, v in columns.items()}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
    return files


def repeated(root: Path, paths: Sequence[Path], times: int) -> Path:
    """One store of all segments of some stores, `times` over: hard links, so that it takes no room."""
    path, source = root / f"repeated-{times}", Store.open(paths[0]).card["source"]
    shutil.rmtree(path, ignore_errors=True)
    segments = path / "segments" / source
    for folder in (segments, path / "staging" / source):
        folder.mkdir(parents=True)
    shutil.copytree(paths[0] / "sources", path / "sources")
    header = read_json(paths[0] / "store.json") | {"uuid": uuid.uuid4().hex}
    write_json(path / "store.json", header, checksum=True)
    number = 0
    for _ in range(times):
        for store in paths:
            for segment in sorted((store / "segments" / source).glob("*.zarr")):
                shutil.copytree(segment, segments / f"{number:06d}.zarr", copy_function=os.link)
                number += 1
    return path


def dqn_log(root: Path, path: Path, steps: int) -> Path:
    """About `steps` steps of a store as Dopamine would have logged them, in five checkpoints; rewards are clipped."""
    folder = root / "dqn" / path.name / "1" / "replay_logs"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    store = Store.open(path)
    count = int(np.searchsorted(store.offsets[1:], steps)) + 1
    episodes = [store.episode(i) for i in range(min(count, len(store.lengths)))]
    rows = sum(map(len, episodes)) + 3 * len(episodes)
    write_log(folder, episodes, -(-rows // 5), minimal_actions(store.card["game"]))
    (folder / "done").touch()
    return folder


def drop_cache(files: Sequence[Path]) -> None:
    """Ask the system to forget what it keeps of these files in memory."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

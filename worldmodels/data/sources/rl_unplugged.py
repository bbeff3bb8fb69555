"""RL Unplugged, Atari: the DQN Replay logs as whole episodes, one tf.Example each, frames as PNG.

The files are gs://rl_unplugged/atari_episodes_ordered/{Game}/run_{r}-{i:05d}-of-00050, gzipped TFRecords. Features of
an episode of T steps (tensorflow_datasets, rl_unplugged/atari_utils.py): `observations` T PNG files of 84x84 grey
pixels; `actions` int64 in the game's minimal set; `unclipped_rewards`, `clipped_rewards`, `discounts` float32;
`checkpoint_idx`, `episode_idx` int64; `episode_return`, `clipped_episode_return` float32.

- The rewards that count here are the clipped ones. The logs that the files were made from hold no others, and
  TensorFlow Datasets dropped one of the two as redundant. Where they do differ, the info of the episode has the sum of
  the others as `unclipped_return`.
- A last discount of 0 says that the game is over. TensorFlow Datasets declares action and reward of that step invalid;
  in the logs they are real, so they are kept. The frame after it was never stored.
- The other form, gs://rl_unplugged/atari/{Game}/run_{r}-{i:05d}-of-00100, holds single transitions in random order.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data.card import Card, make_card
from worldmodels.data.sources.dopamine import MAX_SIDE, TIME_LIMIT, clipped, end_flags, games_among
from worldmodels.data.sources.reading import bad, minimal_actions, one_game, to_full_set
from worldmodels.data.sources.tfrecord import features, records
from worldmodels.types import Episode

_NAME = re.compile(r"run_\d{1,6}-\d{5}-of-\d{5}")
_KINDS = {"observations": list, "actions": np.int64, "clipped_rewards": np.float32, "discounts": np.float32}
_ORDERED = "fetch the episodes, gs://rl_unplugged/atari_episodes_ordered/{Game}/run_R-NNNNN-of-00050"
_SHUFFLED = f"it holds shuffled single transitions, and a world model needs whole episodes; {_ORDERED}"


def rl_unplugged_card(path: str, game: str | None = None) -> Card:
    """The dataset card of the shards at `path`; arguments as for `rl_unplugged`.

    Raises:
        UserError: there are none, or of two games, or the first episode is not as the format has it.
    """
    shards = _shards(path)
    game = _game(path, game, shards)
    action_set = minimal_actions(game)
    first = next((e for shard in shards for e in _episodes(shard, action_set)), None)
    if first is None:
        raise bad(path, "its files hold no episode")
    height, width = first.obs.shape[1:]
    return make_card(
        "rl_unplugged",
        game,
        {"height": height, "width": width, "channels": 1, "colour": "ale_gray", "resize": "area", "max_pool": True},
        action_set=action_set,
        frame_skip=4,
        sticky_prob=0.25,
        reward={"clipped": True},
        time_limit=TIME_LIMIT,
        truncation_known=False,
        policy={"type": "dqn", "learning": True, "epsilon": "from 1 to 0.01 over the first 250,000 steps"},
        licence="not stated where it is published",
        dataset={
            "name": "RL Unplugged, Atari, ordered episodes",
            "url": "gs://rl_unplugged/atari_episodes_ordered",
            "runs": sorted({_run(shard) for shard in shards}),
            "citation": "Gulcehre et al.: RL Unplugged: Benchmarks for Offline Reinforcement Learning, NeurIPS 2020, "
            "arXiv:2006.13888",
        },
    )


def rl_unplugged_parts(path: str, game: str | None = None) -> list[str]:
    """The shards in order, by their path below `path`; arguments as for `rl_unplugged`.

    Raises:
        UserError: there are none.
    """
    return [str(shard.relative_to(_root(path))) for shard in _shards(path)]


def rl_unplugged(path: str, part: str, game: str | None = None) -> Iterator[Episode]:
    """The episodes of a shard.

    Args:
        path: a shard, or a folder that holds shards of one game, in folders of their own or not.
        part: one of `rl_unplugged_parts`.
        game: ALE's name of the game, where the folder of the shards does not tell it.

    Yields:
        Episodes without final frame. `info` has run, checkpoint and number of the episode. One of exactly 27,000 rows
        that ended counts as truncated, as the log does not tell: its info has `truncation` "assumed". One whose last
        discount is not 0 has no flag at its end.

    Raises:
        UserError: a file is missing or malformed, or an episode is not as the format has it.
    """
    yield from _episodes(_root(path) / part, minimal_actions(_game(path, game, _shards(path))))


def _root(path: str) -> Path:
    return Path(path).parent if Path(path).is_file() else Path(path)


def _shards(path: str) -> list[Path]:
    found = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("run_*-of-*"))
    shards = [shard for shard in found if shard.is_file() and _NAME.fullmatch(shard.name)]
    if not shards:
        raise bad(path, f"there is no file run_R-NNNNN-of-NNNNN; {_ORDERED}")
    for shard in shards:
        if shard.name.endswith("-of-00100"):
            raise bad(shard, _SHUFFLED)
    return shards


def _game(path: str, game: str | None, shards: list[Path]) -> str:
    folders = {shard.absolute().parent.name for shard in shards}
    return one_game(game, games_among(folders) if game else folders, path)


def _run(shard: Path) -> int:
    return int(shard.name.removeprefix("run_").partition("-")[0])


def _episodes(shard: Path, action_set: list[int]) -> Iterator[Episode]:
    for number, data in enumerate(records(shard)):
        where = f"{shard}, record {number}"
        e = features(data, where)
        if "o_t" in e:
            raise bad(where, _SHUFFLED)
        for name, kind in _KINDS.items():
            if not (isinstance(e.get(name), list) if kind is list else getattr(e.get(name), "dtype", None) == kind):
                raise bad(
                    where, f"it lacks the feature {name} ({kind.__name__}); it has {', '.join(sorted(e)) or 'none'}"
                )
        yield _episode(e, action_set, where, {"run": _run(shard)})


def _episode(e: dict[str, Any], action_set: list[int], where: str, info: dict[str, Any]) -> Episode:
    lengths = {name: len(e[name]) for name in _KINDS}
    length = lengths["actions"]
    if set(lengths.values()) != {length} or not 0 < length <= TIME_LIMIT:
        told = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise bad(where, f"it has {told}; there must be equally many, 1 to {TIME_LIMIT}")
    discounts, last = e["discounts"], np.arange(length) == length - 1
    wrong = np.flatnonzero(~((discounts >= 0) & (discounts <= 1)) | ((discounts == 0) & ~last))
    if len(wrong):
        raise bad(where, f"discount {discounts[wrong[0]]:g}; allowed are 0 to 1, and 0 in the last row alone", wrong[0])
    for name, key in (("checkpoint", "checkpoint_idx"), ("episode", "episode_idx")):
        if isinstance(e.get(key), np.ndarray) and len(e[key]) == 1:
            info[name] = int(e[key][0])
    others = e.get("unclipped_rewards")
    if isinstance(others, np.ndarray) and not np.array_equal(others, e["clipped_rewards"]):
        info["unclipped_return"] = float(others.sum(dtype=np.float64))
    obs = _frame(e["observations"][0], where, 0)[None].repeat(length, 0)
    for row in range(1, length):
        if (frame := _frame(e["observations"][row], where, row)).shape != obs.shape[1:]:
            raise bad(where, "its frame is not of the size of the one before", row)
        obs[row] = frame
    return Episode(
        obs,
        to_full_set(e["actions"], action_set, where),
        clipped(e["clipped_rewards"], where, 0),
        *end_flags(length, bool(discounts[-1] == 0), info),
        np.zeros(length, bool),
        None,
        info,
    )


def _frame(png: bytes, where: str, row: int) -> np.ndarray:
    """The grey frame (height, width) uint8 of a PNG file, whose size is seen to be small before it is decoded."""
    import cv2

    if not _intact(png):
        raise bad(where, "its frame is no PNG file, or a damaged one", row)
    width, height, depth, colour = struct.unpack_from(">IIBB", png, 16)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and (depth, colour) == (8, 0)):
        problem = f"its frame is a PNG of {width}x{height}, {depth} bits, colour type {colour}"
        raise bad(where, f"{problem}; allowed are 8 bits of grey (type 0) and at most {MAX_SIDE}x{MAX_SIDE}", row)
    frame = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if frame is None or frame.shape != (height, width):
        raise bad(where, "its frame cannot be decoded", row)
    return frame


def _intact(png: bytes) -> bool:
    """Whether a PNG file is whole, by its own checksums: OpenCV writes to stderr about one that is not."""
    at, kind = 8, b""
    while len(png) >= at + 12:
        size, kind = struct.unpack_from(">I4s", png, at)
        if at == 8 and (kind, size) != (b"IHDR", 13):
            return False
        at += 12 + size
        if png[at - 4 : at] != zlib.crc32(png[at - 8 - size : at - 4]).to_bytes(4, "big"):
            return False
    return png[:8] == b"\x89PNG\r\n\x1a\n" and kind == b"IEND" and at == len(png)

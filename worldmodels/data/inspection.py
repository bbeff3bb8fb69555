"""What a store holds, counted segment by segment: memory does not grow with its frames."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data import side
from worldmodels.data.catalog import StagedReader
from worldmodels.data.disk import is_url, read_json
from worldmodels.data.segments import COLUMNS, LIFE_LOSS, TABLE, columns, describe, read_attributes, read_column
from worldmodels.data.store import Store
from worldmodels.data.verify import files_below, size_of
from worldmodels.types import ACTIONS

_EXACT = 64  # different rewards that are told apart; where there are more, two digits of each


def inspect(store: Store, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Count what is in a store.

    Args:
        store: opened for reading; it may grow meanwhile.
        progress: called with the segments read and those to read.

    Returns:
        Plain data: the dataset `card`, `frames`, `episodes`, `lengths` and `returns` (min, median, mean, max),
        `actions` by name, `rewards` by value (to two digits where `rewards_rounded`), `life_losses`, `ends`,
        `final_frames`, `splits` (None where they are not drawn yet), sums of what was `stripped` and `repaired`,
        `behaviours`, `bytes` on disk and `bytes_per_frame` with `raw_bytes_per_frame` beside it, `segments`, `staged`,
        and the `side` columns with their versions. Of a store behind a URL, where no folder is listed, the bytes are
        those of its segments, and nothing staged and no side column is seen.
    """
    tally, remote, size = _Tally(), is_url(store.path), 0
    # staging first: what is sealed meanwhile is then found in a segment
    waiting = {}
    for path in () if remote else (store.path / "staging" / store.card["source"]).glob("*.npz"):
        with suppress(FileNotFoundError):
            episode = StagedReader(path).episode
            waiting[path.stem] = describe(path.stem, episode), columns(episode)
    segments = store.segments_now()
    for k, path in enumerate(segments):
        table = read_attributes(path)
        for entry in zip(*(table[column] for column in TABLE.values()), strict=True):
            tally.add_episode(dict(zip(TABLE, entry, strict=True)))
        tally.add_rows({name: read_column(path, name, sum(table["lengths"])) for name in COLUMNS})
        size += sum(entry[0] for entry in table.get("files", {}).values())
        for name in table["ids"]:
            waiting.pop(name, None)
        progress(k + 1, len(segments))
    for entry, rows in waiting.values():
        tally.add_episode(entry)
        tally.add_rows(rows)
    if not remote:
        size = sum(map(size_of, files_below(store.path)))
    obs = store.card["obs"]
    return {
        "store": str(store.path if remote else store.path.absolute()),
        "uuid": store.uuid,
        "card": store.card,
        **tally.figures(store.card["action_set"]),
        "splits": _splits(store),
        "bytes": size,
        "bytes_per_frame": round(size / tally.frames, 2),
        "raw_bytes_per_frame": obs["height"] * obs["width"] * obs["channels"],
        "segments": len(segments),
        "staged": len(waiting),
        "side": {} if remote else _side(store.path / "side"),
    }


class _Tally:
    def __init__(self) -> None:
        self.lengths, self.returns = array("q"), array("d")
        self.actions = np.zeros(len(ACTIONS), np.int64)
        self.rewards: Counter[float] = Counter()
        self.rounded = False
        self.life_losses = self.final_frames = self.frames = 0
        self.ends: Counter[str] = Counter()
        self.sums: dict[str, Counter[str]] = {"stripped": Counter(), "repaired": Counter()}
        self.behaviours: dict[str, Counter[str]] = {}

    def add_episode(self, entry: Mapping[str, Any]) -> None:
        """Count an episode, as `segments.describe` tells of it."""
        self.lengths.append(entry["length"])
        self.returns.append(entry["return"])
        self.ends[entry["end"]] += 1
        self.final_frames += entry["has_final"]
        info = entry["info"]
        for name, sums in self.sums.items():
            sums.update(_numbers(info.get(name)))
        for name, part in (info.get("behaviours") or {}).items():
            self.behaviours.setdefault(name, Counter()).update(_numbers(part))

    def add_rows(self, rows: Mapping[str, np.ndarray]) -> None:
        """Count rows, by column."""
        self.frames += len(rows["action"])
        self.actions += np.bincount(rows["action"], minlength=len(ACTIONS))
        self.life_losses += int((rows["flags"] & LIFE_LOSS > 0).sum())
        values, counts = np.unique(rows["reward"], return_counts=True)
        self._add_rewards(zip(values.tolist(), counts.tolist(), strict=True))

    def _add_rewards(self, counted: Iterable[tuple[float, int]]) -> None:
        for value, n in counted:
            self.rewards[float(f"{value:.1e}") if self.rounded else value] += n
        if len(self.rewards) > _EXACT and not self.rounded:
            self.rounded, exact, self.rewards = True, self.rewards, Counter()
            self._add_rewards(exact.items())

    def figures(self, action_set: list[int]) -> dict[str, Any]:
        shown = sorted({*action_set, *np.flatnonzero(self.actions).tolist()})
        return {
            "frames": self.frames,
            "episodes": len(self.lengths),
            "lengths": _spread(self.lengths),
            "returns": _spread(self.returns),
            "actions": {ACTIONS[a]: int(self.actions[a]) for a in shown},
            "rewards": {f"{value:g}": self.rewards[value] for value in sorted(self.rewards)},
            "rewards_rounded": self.rounded,
            "life_losses": self.life_losses,
            "ends": dict(self.ends),
            "final_frames": self.final_frames,
            **{name: dict(sums) for name, sums in self.sums.items()},
            "behaviours": {name: dict(sums) for name, sums in self.behaviours.items()},
        }


def _numbers(part: Any) -> dict[str, float]:
    """The entries of a dict that can be summed; none where it is no dict."""
    items = part.items() if isinstance(part, Mapping) else ()
    return {k: v for k, v in items if isinstance(v, int | float)}


def _spread(values: array) -> dict[str, float]:
    numbers = np.asarray(values)
    found = {"min": numbers.min(), "median": np.median(numbers), "mean": numbers.mean(), "max": numbers.max()}
    return {name: round(float(value), 4) for name, value in found.items()}


def _splits(store: Store) -> dict[str, dict[str, int]] | None:
    if not (store.path / "splits" / "default.json").exists():  # asking would draw them
        return None
    lengths = store.lengths
    return {name: {"episodes": len(e), "frames": int(lengths[e].sum())} for name, e in store.splits.items()}


def _side(folder: Path) -> dict[str, Any]:
    """Side columns by name: the `latest` version, and type, shape of a value and number of values of each."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*/*/MANIFEST.json")):
        if ".tmp" not in path.parent.name:
            column = found.setdefault(path.parents[1].name, {"latest": None, "versions": {}})
            manifest = read_json(path)
            column["versions"][path.parent.name] = {k: manifest[k] for k in ("dtype", "shape", "count")}
    for name, column in found.items():
        if (folder / name / "LATEST").exists():
            column["latest"] = side.latest(folder / name)
    return found


def page(found: Mapping[str, Any]) -> list[str]:
    """The figures of `inspect` as lines for people."""
    card, obs = found["card"], found["card"]["obs"]
    colour = {"rgb": "colour", "ale_gray": "grey (ALE's luminance)", "cv2_gray": "grey (OpenCV's)"}.get(obs["colour"])
    limit = f"{card['time_limit']:,} steps" if card["time_limit"] else "none known"
    dataset = {k: v for k, v in card["dataset"].items() if v}
    rows: dict[str, str | list[str]] = {
        "game": f"{card['game']}, from {card['source']}",
        "frames": f"{found['frames']:,} in {found['episodes']:,} episodes",
        "lengths": _few(found["lengths"]),
        "returns": _few(found["returns"]),
        "ends": _few(found["ends"]) + f"; {found['final_frames']:,} with the frame after the last action",
        "actions": [*_histogram({k: n for k, n in found["actions"].items() if n}), *_never(found["actions"])],
        "rewards": [*_histogram(found["rewards"], most=12), _about_rewards(found)],
        "lives lost": f"{found['life_losses']:,}; a lost life "
        + ("ends an episode" if card["episodic_life"] else "does not end an episode"),
        "frame": f"{obs['width']}x{obs['height']} {colour or obs['colour']}, resize {obs['resize']}, "
        + ("maximum over two raw frames" if obs["max_pool"] else "no maximum over raw frames")
        + (f", lossy ({card['lossy']})" if card["lossy"] else ", lossless"),
        "step": f"frame skip {card['frame_skip']}, sticky actions "
        + (f"{card['sticky_prob']:g}" if card["sticky_prob"] else "off")
        + f", no-op starts up to {card['noop_max']}, fire on reset {'yes' if card['fire_reset'] else 'no'}",
        "time limit": limit + ("" if card["truncation_known"] else "; a cut by it looks like the end of a game"),
        "policy": ", ".join(f"{k} {_plain(v)}" for k, v in card["policy"].items()) or "not known",
        "behaviours": [
            f"{name}: {part.get('steps', 0):,} steps, return {part.get('return', 0):+,.6g}"
            for name, part in found["behaviours"].items()
        ],
        "stripped": _few(found["stripped"]) or "nothing",
        "repaired": _few(found["repaired"]) or "nothing",
        "splits": ", ".join(
            f"{name} {part['episodes']:,} episodes ({part['frames']:,} frames)"
            for name, part in (found["splits"] or {}).items()
        )
        or "not drawn yet",
        "licence": card["licence"] or "not known",
        "dataset": [f"{k}: {v}" for k, v in dataset.items()] or "none named",
        "columns": [_about_column(name, column, found["frames"]) for name, column in found["side"].items()],
        "disk": f"{found['bytes']:,} bytes, {found['bytes_per_frame']:,.1f} a frame "
        f"({found['raw_bytes_per_frame'] / found['bytes_per_frame']:.1f} times less than raw), "
        f"{found['segments']:,} segments, {found['staged']:,} staged episodes",
    }
    lines = []
    for name, text in rows.items():
        for k, line in enumerate([text] if isinstance(text, str) else text):
            lines.append(f"{'' if k else name:<11} {line}")
    return lines


def _few(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:,.6g}" for name, value in numbers.items())


def _histogram(counts: Mapping[str, int], most: int = 18, width: int = 30) -> list[str]:
    """One line and bar an entry, in order; the `most` frequent where there are more."""
    total, top = max(1, sum(counts.values())), max(1, *counts.values())
    kept = set(sorted(counts, key=lambda name: -counts[name])[:most])
    lines = [
        f"{name:<13}{n:>12,} {n / total:>6.1%}  {'#' * -(-n * width // top)}"
        for name, n in counts.items()
        if name in kept
    ]
    return lines + ([f"and {len(counts) - most} values more"] if len(counts) > most else [])


def _never(counts: Mapping[str, int]) -> list[str]:
    unused = [name for name, n in counts.items() if not n]
    return [f"never {', '.join(unused)}"] if unused else []


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _about_rewards(found: Mapping[str, Any]) -> str:
    said = "clipped" if found["card"]["reward"]["clipped"] else "not clipped"
    within = all(abs(float(value)) <= 1 for value in found["rewards"])
    seen = "all of them lie" if within else "not all of them lie"
    doubt = "" if within or said != "clipped" else ": the card is wrong"
    rounded = "; shown to two digits" if found["rewards_rounded"] else ""
    return f"{said}, says the card; {seen} within -1 and 1{doubt}{rounded}"


def _about_column(name: str, column: Mapping[str, Any], frames: int) -> str:
    versions = ", ".join(
        f"{version}{' (latest)' if version == column['latest'] else ''} of {v['dtype']} {tuple(v['shape'])} "
        f"for {v['count']:,} of {frames:,} rows"
        for version, v in column["versions"].items()
    )
    return f"{name}: {versions}"

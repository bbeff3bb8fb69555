"""Side columns: named and versioned arrays beside the rows of a store, segment by segment.

ROOT/side/<name>/<version>/<source>/000123.zarr   `values` (n, ...) and `covered` (n,), uncompressed
ROOT/side/<name>/<version>/MANIFEST.json          shape of a value, dtype, number of values, covered segments; files;
                                                  `about`, what made it
ROOT/side/<name>/LATEST                           the version written last
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data.checksums import file_table
from worldmodels.data.disk import atomic, damaged, read_json, write_json
from worldmodels.data.groups import add_plain, group_in_memory, write_files
from worldmodels.data.segments import plain_file, read_attributes
from worldmodels.types import UserError


def write(
    path: Path,
    source: str,
    segments: Sequence[Path],
    rows: Sequence[int] | np.ndarray,
    array: np.ndarray,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the version `path` of a column; see `Store.write_side`."""
    rows, array = np.asarray(rows, np.int64), np.asarray(array)
    ends = np.cumsum([0] + [sum(read_attributes(s)["lengths"]) for s in segments])
    if path.exists():
        raise UserError(f"the side column {path} exists and is never overwritten; give another version")
    if rows.shape != array.shape[:1] or array.dtype.kind not in "biuf":
        raise UserError(f"the side column {path} has {rows.shape} rows but {array.dtype} values of shape {array.shape}")
    if len(rows) and not (rows.min() >= 0 and rows.max() < ends[-1]):
        raise UserError(
            f"the side column {path} names rows {rows.min()}..{rows.max()} of {ends[-1]}; seal the store first"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as tmp:
        for segment, start, end in zip(segments, ends[:-1], ends[1:], strict=True):
            inside = (rows >= start) & (rows < end)
            values = np.zeros((end - start, *array.shape[1:]), array.dtype)
            covered = np.zeros(end - start, np.uint8)
            values[rows[inside] - start], covered[rows[inside] - start] = array[inside], 1
            group, files = group_in_memory()
            add_plain(group, "values", values)
            add_plain(group, "covered", covered)
            write_files(tmp / source / segment.name, files)
        kind: dict[str, Any] = {
            "shape": array.shape[1:],
            "dtype": array.dtype.newbyteorder("<").str,
            "count": len(rows),
        }
        kind["about"] = dict(about or {})
        table = {"segments": [s.name for s in segments], "files": file_table(tmp)}
        write_json(tmp / "MANIFEST.json", kind | table, checksum=True)
    mark_latest(path)


def mark_latest(path: Path) -> None:
    """Have the version `path` of a column be its newest."""
    write_json(path.parent / "LATEST", {"version": path.name}, checksum=True)


def latest(folder: Path) -> str:
    """The version of the column in `folder` that was written last.

    Raises:
        FileNotFoundError: there is none.
        UserError: the file that tells it is damaged.
    """
    value = read_json(folder / "LATEST")
    return value["version"] if isinstance(value, dict) else value  # in format 1 it was the name alone


def about(folder: Path, version: str | None) -> dict[str, Any]:
    """What made version `version` of the column in `folder`, by default the newest; see `Store.side_about`."""
    try:
        return read_json(folder / (version or latest(folder)) / "MANIFEST.json").get("about", {})
    except FileNotFoundError as e:
        raise _absent(folder, version) from e


def _absent(folder: Path, version: str | None) -> UserError:
    have = sorted(p.parent.name for p in folder.glob("*/MANIFEST.json") if ".tmp" not in p.parent.name)
    return UserError(f"there is no side column {folder}/{version or ''}; its versions are: {have or 'none'}")


def read(folder: Path, version: str | None, source: str, segments: Sequence[Path]) -> np.ma.MaskedArray:
    """Version `version` of the column in `folder` over the rows of `segments`; see `Store.side`."""
    try:
        path = folder / (version or latest(folder))
        manifest = read_json(path / "MANIFEST.json")
    except FileNotFoundError as e:
        raise _absent(folder, version) from e
    parts = [np.ma.masked_all((0, *manifest["shape"]), manifest["dtype"])]
    for segment in segments:
        group, n = path / source / segment.name, sum(read_attributes(segment)["lengths"])
        part = np.ma.masked_all((n, *manifest["shape"]), manifest["dtype"])
        if segment.name in manifest["segments"]:
            file = plain_file(group, "values", part.ndim)
            try:
                covered = np.frombuffer(plain_file(group, "covered").read_bytes(), np.uint8).astype(bool)
                part[covered] = np.frombuffer(file.read_bytes(), manifest["dtype"]).reshape(part.shape)[covered]
            except (FileNotFoundError, ValueError, IndexError) as e:
                raise damaged(group, e) from e
        parts.append(part)
    return np.ma.concatenate(parts)

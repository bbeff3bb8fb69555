"""Is every byte of a store as it was written? Files that are damaged, missing, foreign or unreadable are all named.

No frame is decoded: every file has a checksum of its own (checksums.py) or one in the list of its segment or side
column. Stores of format 1 have some files without; these are read as far as their kind allows, and counted. What a
writer does meanwhile is never taken for damage.
"""

import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data.checksums import json_matches, measure, zip_matches
from worldmodels.data.disk import is_url
from worldmodels.data.header import FORMAT, VERSION
from worldmodels.data.segments import plain_file
from worldmodels.types import UserError

_EPISODES = ("staging", "segments")
_PARTS = (*_EPISODES, "side", "sources", "splits")
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError)
_WRONG, _MISSING, _BARE = "it does not match its checksum", "it is missing", "it carries no checksum"
_GRACE = 1.0  # seconds, far more than a writer takes between a side column and the name of the latest one


def verify(path: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Read every file of the store at `path` and compare it with its checksum.

    Args:
        path: folder of the store.
        progress: called with the bytes read and those to read.

    Returns:
        `problems`, a list of {"file", "problem"} with paths from the store's folder; and how many `files`, `bytes`,
        `episodes` and `frames` were read, in how many `seconds`, `frames_per_s`, and how many files are `unchecked`
        because they carry no checksum (format 1).

    Raises:
        UserError: there is no store, or it is of a newer version.
    """
    if is_url(path):
        raise UserError(f"{path} is a URL, and only a store on a disk can be verified; give its folder as store=...")
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"there is no store at {root}; give the folder of one as store=...")
    if not (root / "store.json").exists() and not any((root / part).is_dir() for part in _PARTS):
        raise UserError(f"{root} is not a store: it has no store.json; give the folder of a store")
    return _Check(root, progress).run()


class _Check:
    def __init__(self, root: Path, progress: Callable[[int, int], None]) -> None:
        self.root, self.progress = root, progress
        self.problems: dict[Path, str] = {}
        self.files = self.bytes = self.episodes = self.frames = self.unchecked = 0
        self.total = sum(map(size_of, files_below(root)))
        self.strict = False  # every file must carry its checksum

    def run(self) -> dict[str, Any]:
        began, root = time.monotonic(), self.root
        self._header()
        metrics = self._json(root / "metrics.json") if (root / "metrics.json").exists() else {}
        files = [root / name for name in ("store.json", "metrics.json")]
        self._known(root, lambda p: p in files or p.suffix == ".log" or (p.is_dir() and p.name in _PARTS))
        for path in self._known(root / "sources", lambda p: p.suffix in (".json", ".lock")):
            if path.suffix == ".json":
                self._json(path)
        if (splits := root / "splits").is_dir():
            self._soon(splits / "default.json")
            for path in {splits / "default.json", *self._known(splits, lambda p: p.suffix == ".json")}:
                self._json(path)
        for source in sorted({p.name for part in _EPISODES for p in self._known(root / part, Path.is_dir)}):
            if not (card := root / "sources" / f"{source}.json").exists():
                self.problems[card] = _MISSING
            self._source(source)
        for column in self._known(root / "side", Path.is_dir):
            self._column(column)
        told = metrics.get("episodes") if isinstance(metrics, dict) else None
        if isinstance(told, int) and told > self.episodes and not self.problems:
            few = f"it tells of {told} episodes and {self.episodes} are here: the last ones are missing"
            self.problems[root / "metrics.json"] = few
        return self._figures(time.monotonic() - began)

    def _figures(self, seconds: float) -> dict[str, Any]:
        return {
            "store": str(self.root.absolute()),
            "files": self.files,
            "bytes": self.bytes,
            "episodes": self.episodes,
            "frames": self.frames,
            "unchecked": self.unchecked,
            "seconds": round(seconds, 3),
            "frames_per_s": round(self.frames / max(seconds, 1e-3)),
            "problems": [
                {"file": p.relative_to(self.root).as_posix(), "problem": why}
                for p, why in sorted(self.problems.items())
            ],
        }

    def _header(self) -> None:
        path = self.root / "store.json"
        header = self._json(path)
        if path in self.problems:
            return
        try:
            version, reader = int(header["version"]), int(header["min_reader"])
            if header["format"] != FORMAT:
                raise ValueError(header["format"])
        except _MALFORMED:
            self.problems[path] = "it is not that of a store"
            return
        if reader > VERSION:
            raise UserError(
                f"the store {self.root} was written by a newer version of worldmodels (its format is {version}, this "
                f"version reads up to {VERSION}); update worldmodels to verify it"
            )
        self.strict = version > 1
        if self.strict and self.unchecked:  # this file itself
            self.problems[path] = _BARE

    def _source(self, source: str) -> None:
        """Check the segments and the staged episodes of a source."""
        staging, segments = self.root / "staging" / source, self.root / "segments" / source
        # staging first, as in catalog.look: what is sealed meanwhile is then seen twice, never missed
        staged = {p.stem: p for p in self._known(staging, lambda p: p.suffix == ".npz")}
        sealed = set(self._known(segments, lambda p: p.suffix == ".zarr" and p.stem.isdigit() and p.is_dir()))
        for a, b in _gaps(0, (int(p.stem) for p in sealed)):
            self.problems[segments / f"{a:06d}.zarr"] = _missing(a, b)
        first = self.episodes
        for path in sorted(sealed):
            self._segment(path, staged)
        if not self.problems:  # the file of a staged episode has its number in the store for a name
            for a, b in _gaps(self.episodes - first, (int(stem) for stem in staged if stem.isdigit())):
                self.problems[staging / f"{a:09d}.npz"] = _missing(a, b)
        gone = {stem: path for stem, path in staged.items() if not self._staged(path)}
        if gone:  # sealed since we looked, or taken away
            for path in sorted(set(segments.glob("*.zarr")) - sealed):
                self._segment(path, gone)
            self.problems.update(dict.fromkeys(gone.values(), _MISSING))

    def _segment(self, path: Path, staged: dict[str, Path]) -> None:
        """Check the segment, and take the episodes that it holds out of `staged`."""
        meta = path / "zarr.json"
        content = self._json(meta)
        if meta in self.problems:
            return
        try:
            table = content["attributes"]
            ids, lengths, files = table["ids"], table["lengths"], table["files"]
            if len(ids) != len(lengths) or files[plain_file(Path(), "action").as_posix()][0] != sum(lengths):
                raise ValueError("its episodes and its rows differ in number")
            for name in ids:
                staged.pop(name, None)
            self._listed(path, files, meta)
            self.episodes += len(ids)
            self.frames += sum(lengths)
        except _MALFORMED as e:
            self.problems[meta] = f"it is not that of a segment ({e})"

    def _staged(self, path: Path) -> bool:
        """Check a staged episode, if it is still there."""
        try:
            matches = zip_matches(path)
            if matches is None:  # format 1: the archive's own checksums, which leave its directory out
                with zipfile.ZipFile(path) as archive:
                    matches = archive.testzip() is None and not self.strict
                self.unchecked += not self.strict
            if matches:
                with np.load(path, allow_pickle=False) as arrays:
                    self.frames += len(arrays["action"])
            else:
                self.problems[path] = _WRONG
        except FileNotFoundError:
            return False
        except OSError as e:
            self.problems[path] = _unreadable(e)
        except (*_MALFORMED, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as e:
            self.problems[path] = f"it is damaged ({e})"
        self._read(size_of(path))
        self.episodes += 1
        return True

    def _column(self, folder: Path) -> None:
        """Check all versions of a side column."""
        latest = folder / "LATEST"
        versions = [p for p in self._known(folder, lambda p: p.is_dir() or p == latest) if p != latest]
        for version in versions:
            manifest = version / "MANIFEST.json"
            table = self._json(manifest)
            if manifest in self.problems:
                continue
            if isinstance(table, dict) and isinstance(table.get("files"), dict):
                self._listed(version, table["files"], manifest)
            elif self.strict:
                self.problems[manifest] = "it lists no files"
            else:
                self.unchecked += sum(1 for _ in files_below(version)) - 1
        if not versions:
            return
        self._soon(latest)
        name = self._json(latest)
        if latest not in self.problems:
            name = name.get("version") if isinstance(name, dict) else name
            if not isinstance(name, str) or not (folder / name / "MANIFEST.json").exists():
                self.problems[latest] = f"it names the version {name!r}, which is not there"

    def _listed(self, folder: Path, known: dict[str, list[int]], lister: Path) -> None:
        """Check all files below `folder` but `lister` against their `known` sizes and checksums."""
        found = {p.relative_to(folder).as_posix(): p for p in files_below(folder) if p != lister}
        self.problems.update({folder / name: _MISSING for name in known.keys() - found.keys()})
        for name, path in found.items():
            if name not in known:
                self._foreign(path)
                continue
            try:
                size, crc = known[name]
                if size_of(path) != size:
                    self.problems[path] = f"it has {size_of(path)} bytes in place of {size}"
                elif measure(path) != (size, crc):
                    self.problems[path] = _WRONG
            except _MALFORMED as e:
                self.problems[lister] = f"its list of files is damaged ({e})"
            except OSError as e:
                self.problems[path] = _unreadable(e)
            self._read(size_of(path))

    def _json(self, path: Path) -> Any:
        """The content of a JSON file; what is wrong with the file is among the problems then."""
        text = b""
        try:
            text = path.read_bytes()
            matches, value = json_matches(text), json.loads(text)
        except OSError as e:
            self.problems[path] = _MISSING if isinstance(e, FileNotFoundError) else _unreadable(e)
            return None
        except (ValueError, RecursionError) as e:
            self.problems[path] = f"it is damaged ({e})"
            return None
        finally:
            self._read(len(text))
        if matches is False:
            self.problems[path] = _WRONG
        elif matches is None and self.strict:
            self.problems[path] = _BARE
        self.unchecked += matches is None and not self.strict
        return value

    def _known(self, folder: Path, known: Callable[[Path], bool]) -> list[Path]:
        """What `known` says yes to in `folder`; there is a problem with the rest, but for what is being written."""
        if not folder.is_dir():
            return []
        found = sorted(p for p in folder.iterdir() if ".tmp" not in p.name)
        for path in found:
            if not known(path):
                self._foreign(path)
        return [p for p in found if known(p)]

    def _soon(self, path: Path) -> None:
        """Let a writer end what it has begun, where this file is still to come."""
        if not path.exists():
            time.sleep(_GRACE)

    def _foreign(self, path: Path) -> None:
        if not path.name.startswith("."):  # hydra's folder and the like
            self.problems[path] = "it does not belong to the store"

    def _read(self, size: int) -> None:
        self.files, self.bytes = self.files + 1, self.bytes + size
        self.progress(self.bytes, max(self.total, self.bytes))


def files_below(folder: Path) -> Iterator[Path]:
    """All that is no folder in a folder and those in it."""
    for where, _, names in os.walk(folder):
        yield from (Path(where, name) for name in names)


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where it is gone or no plain file."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # it went between the two
        return 0


def _gaps(first: int, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last of the numbers that are missing in a row, from `first` on."""
    for a, b in pairwise([first - 1, *sorted(n for n in numbers if n >= first)]):
        if b > a + 1:
            yield a + 1, b - 1


def _missing(a: int, b: int) -> str:
    return _MISSING + (f", as are those after it up to number {b}" if b > a else "")


def _unreadable(e: OSError) -> str:
    return f"it cannot be read ({e.strerror or e})"

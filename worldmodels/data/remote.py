"""Stores behind a URL, read where they lie: JSON files by fsspec, frames and columns by TensorStore (extra `cloud`).

Nothing has to be listed, as plain HTTP lists nothing: store.json names the source, and segments are numbered from 0
without a gap. A bucket that may be read but not listed refuses what is missing: where it refuses a file that cannot be
there, what else it refuses counts as missing. What is staged is not seen. A batch asks for all that it needs at once,
and what came is kept in memory up to a bound, chunk by chunk; there are no files in between.
"""

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from errno import EROFS
from functools import cache, cached_property
from itertools import takewhile
from typing import Any, NoReturn

import numpy as np

from worldmodels.data.card import Card, validate_card
from worldmodels.data.catalog import Catalog, places
from worldmodels.data.disk import damaged, on_disk, read_json
from worldmodels.data.segments import COLUMNS
from worldmodels.data.store import Store
from worldmodels.types import UserError

SCHEMES = ("http", "https", "gs", "s3", "file")
CACHE_BYTES = 2**28  # of decoded chunks, of all stores together; the columns of a segment are 400 kB of it
_AT_ONCE = 32  # small files asked for at the same time
_PATIENCE = 60  # seconds without an answer
_RETRIES = {"max_retries": 4, "initial_delay": "200ms", "max_delay": "5s"}
_OUT_OF_REACH = ("ABORTED", "UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED", "DEADLINE_EXCEEDED")
_EXTRA = 'pip install "worldmodels[cloud]"'


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URL: what reading a store takes of `pathlib.Path`, as on a disk that is read-only.

    Args:
        url: of it.
        hides: whether the server refuses what is missing.
    """

    url: str
    hides: bool = False

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return self.joinpath(name)

    def joinpath(self, *names: str) -> "RemotePath":
        """A file or folder in this folder."""
        return RemotePath("/".join((self.url, *names)), self.hides)

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.url.rpartition("/")[0], self.hides)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]

    def read_bytes(self) -> bytes:
        """The content of this file.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is out of reach.
        """
        return self._asked(lambda fs, path: fs.cat_file(path))

    def exists(self) -> bool:
        """Whether there is this file, which must be a small one."""
        try:
            self.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def is_file(self) -> bool:
        """False: asked by who found nothing here."""
        return False

    is_dir = is_file

    def glob(self, pattern: str) -> list["RemotePath"]:
        """Files here with the ending of `pattern` (*.json); none where folders cannot be listed."""
        try:
            names = self._asked(lambda fs, path: fs.ls(path, detail=False))
        except (FileNotFoundError, UserError):
            return []
        found = sorted({name.rstrip("/").rpartition("/")[2] for name in names})
        return [self / name for name in found if name.endswith(pattern.lstrip("*"))]

    def mkdir(self, **_: Any) -> NoReturn:
        """Refused, as a disk does it."""
        raise OSError(EROFS, os.strerror(EROFS), self.url)

    def _asked(self, ask: Callable[[Any, str], Any]) -> Any:
        from fsspec.core import url_to_fs

        try:
            return ask(*url_to_fs(self.url, **_options(self.url)))
        except (FileNotFoundError, NotADirectoryError):
            raise
        except IsADirectoryError as e:
            raise FileNotFoundError(self.url) from e
        except ImportError as e:
            raise UserError(f"what reads {self.url} is not installed ({_line(e)}): {_EXTRA}") from e
        except Exception as e:  # every backend of fsspec has errors of its own
            if self.hides and _denied(e):
                raise FileNotFoundError(self.url) from e
            raise _unreachable(self.url, e) from e


class RemoteSegmentReader:
    """Reads windows of one segment as `SegmentReader` does; `Reads` makes many of them at the same time."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self._arrays = {name: self._open(name) for name in ("obs", *COLUMNS)}

    @cached_property
    def _final_obs(self) -> Any:
        return self._open("final_obs")

    def _open(self, name: str) -> Any:
        """A future of the array."""
        url = str(self._path / name)
        spec = {
            "driver": "zarr3",
            "kvstore": _kvstore(url),
            # else a file that is missing would be read as zeros; our writer leaves no chunk out
            "fill_missing_data_reads": False,
            # what is sealed never changes, but another store may have been put there
            "recheck_cached_metadata": "open",
            "recheck_cached_data": "open",
        }
        return _tensorstore(url).open(spec, context=_context(), open=True, read=True)

    def frames(self, start: int, out: np.ndarray, decoder: "Reads") -> None:
        """Rows `start` to `start + len(out)` of `obs` into `out` (n, H, W[, C]) uint8, once `decoder` is finished."""
        decoder.ask(self._path / "obs", self._arrays["obs"], start, out)

    def final(self, number: int, out: np.ndarray, decoder: "Reads") -> None:
        """Last frame number `number` into `out` (1, H, W[, C]), likewise."""
        decoder.ask(self._path / "final_obs", self._final_obs, number, out)

    def column(self, name: str, start: int, out: np.ndarray, decoder: "Reads") -> None:
        """Rows `start` to `start + len(out)` of `action`, `reward` or `flags` into `out`, likewise."""
        decoder.ask(self._path / name, self._arrays[name], start, out)


class Reads:
    """What a batch reads: first all of it is asked for, then it is awaited."""

    def __init__(self) -> None:
        self._wanted: list[tuple[RemotePath, Any, int, np.ndarray]] = []

    def ask(self, path: RemotePath, array: Any, start: int, out: np.ndarray) -> None:
        """Rows `start` to `start + len(out)` of the array, given as a future, into `out`."""
        self._wanted.append((path, array, start, out))

    def finish(self) -> None:
        """Wait until all that was asked for is there.

        Raises:
            UserError: something is missing, damaged or out of reach.
        """
        from tensorstore import Batch

        coming = []
        with Batch() as batch:  # neighbouring chunks of a shard come in one request
            for path, array, start, out in self._wanted:
                with _Told(path):
                    coming.append(array.result()[start : start + len(out)].read(batch=batch))
        for (path, _, _, out), future in zip(self._wanted, coming, strict=True):
            with _Told(path):
                out[:] = future.result()
        self._wanted.clear()


class RemoteStore(Store):
    """A store behind a URL, for reading; it has the episodes that are sealed when it is opened or refreshed.

    Args:
        url: of the folder of the store: http(s)://, gs://, s3:// or file://.

    Raises:
        UserError: there is no store, it is out of reach, damaged or empty, or what reads it is not installed.
    """

    _segment_reader: Any = RemoteSegmentReader
    _decoder: Any = Reads

    def __init__(self, url: str) -> None:
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES or "?" in url:
            kinds = "".join(f", {name}://" for name in SCHEMES)[2:]
            raise UserError(f"store={url} must be a folder on the disk, or a URL that begins with {kinds} and has no ?")
        _tensorstore(url)
        root: Any = RemotePath(url.rstrip("/"))
        super().__init__(root, write=False)
        if not self.sealed:
            root = self.path
            may = " (or it refuses to show any: see that they may be read)" if root.hides else ""
            raise UserError(
                f"the store {root} holds no sealed episodes{may}, and staged ones cannot be read through a URL; seal "
                "it (every `worldmodels collect` and `import` ends with that) before it is published"
            )

    def _read_card(self, header: Mapping[str, Any]) -> Card:
        root: Any = self.path  # where store.json could be read
        root = self.path = replace(root, hides=_hides(root))
        folder = root / "sources"
        cards = [folder / f"{header['source']}.json"] if "source" in header else folder.glob("*.json")
        if not cards:
            raise UserError(
                f"the store.json of {self.path} does not name its source, and the server lists no folders; add "
                '"source": "NAME" to it, where the file sources/NAME.json is'
            )
        try:
            return validate_card(read_json(cards[0]), f"the dataset card {cards[0]}")
        except FileNotFoundError as e:
            raise damaged(cards[0], "it is missing") from e

    def _look(self, seen: Catalog | None = None) -> Catalog:
        sealed: list[Any] = list(seen.sealed) if seen else []
        parts = [np.array(seen[2:]) if seen else np.zeros((4, 0), np.int64)]
        step, more = 2, True
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while more:
                paths = [self.segments / f"{n:06d}.zarr" for n in range(len(sealed), len(sealed) + step)]
                tables: list[Any] = list(takewhile(lambda table: table is not None, pool.map(_attributes, paths)))
                parts += [places(table, len(sealed) + k) for k, table in enumerate(tables)]
                sealed += paths[: len(tables)]
                step, more = min(2 * step, 2 * _AT_ONCE), len(tables) == step
        return Catalog(tuple(sealed), (), *np.concatenate(parts, 1))

    def segments_now(self) -> list[Any]:
        """Those that were there when we looked: a reader of what is sealed alone misses nothing."""
        return list(self.sealed)

    def write_side(self, *_: Any) -> None:
        """Refused.

        Raises:
            UserError: always.
        """
        on_disk(self.path)


def _attributes(path: Any) -> dict[str, Any] | None:
    """The episode table of a segment, or None where there is no such segment."""
    try:
        return read_json(path / "zarr.json")["attributes"]
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as e:
        raise damaged(path, "its zarr.json is not ours") from e


class _Told:
    """One sentence for an error of TensorStore, whose text begins with its kind and ends with [details]."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        if not isinstance(error, Exception):
            return
        if any(code in str(error) for code in _OUT_OF_REACH):
            raise _unreachable(str(self._path), error) from error
        raise damaged(str(self._path), _line(error)) from error


def _hides(root: RemotePath) -> bool:
    """Whether a file that is not there is refused."""
    try:
        (root / "no-such-file").read_bytes()
    except FileNotFoundError:
        return False
    except UserError as e:
        return _denied(e.__cause__)
    return False


def _denied(error: BaseException | None) -> bool:
    """Whether it means HTTP's 403, in whatever words the backends say so."""
    return isinstance(error, PermissionError) or any(x in str(error) for x in ("403", "Forbidden", "PERMISSION_DENIED"))


def _unreachable(url: str, why: BaseException) -> UserError:
    if _denied(why):
        return UserError(
            f"{url} cannot be read ({_line(why)}); give the right to read it (s3:GetObject, storage.objects.get) and, "
            "as a bucket does not tell what is missing without it, to list (s3:ListBucket, storage.objects.list)"
        )
    return UserError(
        f"{url} cannot be read ({_line(why)}); see that the address is right, the server can be reached and the store "
        "may be read from here"
    )


def _line(error: BaseException) -> str:
    return re.split(r"\n| \[", str(error))[0][:300].rstrip(". ") or type(error).__name__


@cache
def _context() -> Any:
    from tensorstore import Context

    retries = {f"{kind}_request_retries": _RETRIES for kind in ("http", "gcs", "s3")}
    return Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}, **retries})


def _tensorstore(url: str) -> Any:
    try:
        import tensorstore
    except ImportError as e:
        raise UserError(f"reading {url} needs tensorstore, which is not installed: {_EXTRA}") from e
    return tensorstore


def _kvstore(url: str) -> dict[str, Any]:
    """Where TensorStore finds the files below `url`; nothing is percent-decoded, as fsspec does not either."""
    scheme, _, path = f"{url}/".partition("://")
    if scheme == "file":
        return {"driver": "file", "path": path}
    if scheme in ("gs", "s3"):
        bucket, _, path = path.partition("/")
        return {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": path}
    return {"driver": "http", "base_url": f"{url}/"}


def _options(url: str) -> dict[str, Any]:
    """How fsspec is to ask: a server that is silent is given up."""
    if not url.startswith("http"):
        return {}
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=_PATIENCE / 4, sock_read=_PATIENCE)}}

"""Recordings in HDF5 files: one group an episode, or the datasets of a single episode at the root.

An episode's datasets are `obs` (T or T+1, H, W[, 3]) uint8, `action` (T,) in ALE's 18-action set, `reward` (T,), and
where they are known `terminated`, `truncated` and `life_loss` (T,), under these or other usual names (`NAMES`), or
under those that the setting `names` gives. Groups and files are read in natural order. Without flags an episode is
open.

JOWA's files have this form (CJReinforce/JOWA, dataset/src/downsample.py: `{idx}/{observations, actions, rewards,
terminals}`); they keep the three all-zero rows that Dopamine writes before each episode, which `padding=3` strips.

A file from a stranger can name other files (external links and storage, virtual datasets) and filters that load code:
these are refused, and so is what claims more rows than it stores.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from worldmodels.data.card import Card
from worldmodels.data.sources.reading import bad
from worldmodels.data.sources.recordings import (
    ARRAYS,
    REQUIRED,
    at_least,
    check_array,
    file_of,
    files,
    frame_of,
    natural,
    recording,
    recording_card,
    same_frame,
)
from worldmodels.types import Episode, UserError

SUFFIXES = (".hdf5", ".h5")
NAMES = {
    "obs": ("obs", "observations", "observation", "frames"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards"),
    "terminated": ("terminated", "terminations", "terminals", "terminal", "dones", "done"),
    "truncated": ("truncated", "truncations", "timeouts"),
    "life_loss": ("life_loss", "life_losses"),
}
_FILTERS = (1, 2, 3, 4, 5, 6, 32000)  # numbers of HDF5's own, and of LZF, which is part of h5py
_HARD = 0  # HDF5's number of a link that is neither soft nor external
_MAX_CHUNK = 2**26  # bytes, or the size of the dataset: a chunk is held in memory whole

Names = Mapping[str, str | None] | None


def hdf5_card(path: str, game: str | None = None, names: Names = None, padding: int = 0, **about: Any) -> Card:
    """The dataset card of the files at `path`.

    Args:
        path: a folder of .hdf5 or .h5 files, or one file.
        game: ALE's name, where no card.json tells it.
        names: what the datasets are called, by the keys of `NAMES`; None for the usual names.
        padding: as in `hdf5`.
        about: other fields of the card, see `recording_card`.

    Raises:
        UserError: there are no files, the first episode cannot be read, or the game is not told.
    """
    at_least(0, padding=padding)
    frame, ends = _first(path, _aliases(path, names))
    return recording_card("hdf5", path, frame, game, ends, **about)


def hdf5_parts(path: str, names: Names = None, **about: Any) -> list[str]:
    """The episodes at `path`: FILE/GROUP in natural order, or FILE where the episode is at its root."""
    parts, aliases = [], _aliases(path, names)
    for file in files(path, SUFFIXES):
        with _opened(file) as h5:
            parts += [f"{file.name}/{group}".rstrip("/") for group in _episodes(h5, file, aliases)]
    return parts


def hdf5(path: str, part: str, names: Names = None, padding: int = 0, **about: Any) -> Iterator[Episode]:
    """One episode.

    Args:
        path: as in `hdf5_card`.
        part: FILE/GROUP or FILE.
        names: as in `hdf5_card`.
        padding: so many first rows are left out of an episode in which they are all zero; their number is then in
            `info["stripped"]["zero_rows"]`.
        about: what only the card needs.

    Raises:
        UserError: the file is damaged or hostile, or what it holds is no episode like the others.
    """
    at_least(0, padding=padding)
    aliases = _aliases(path, names)
    name, _, group = part.partition("/")
    file = file_of(path, name)
    where = file / group if group else file
    with _opened(file) as h5:
        datasets = _datasets(h5[group] if group and _is_here(h5, group, file) else h5, where, aliases)
        frame = frame_of(where, datasets["obs"].shape, datasets["obs"].dtype)
        same_frame(where, frame, _first_cached(path, Path(path).stat().st_mtime_ns, aliases)[0])
        arrays = {name: dataset[()] for name, dataset in datasets.items()}
    info = {}
    if 0 < padding < len(arrays["action"]) and not any(values[:padding].any() for values in arrays.values()):
        arrays, info = {name: values[padding:] for name, values in arrays.items()}, {"zero_rows": padding}
    yield recording(where, arrays, {"stripped": info} if info else {})


def _aliases(path: str, names: Names) -> tuple[tuple[str, ...], ...]:
    given = {key: str(name) for key, name in (names or {}).items() if name is not None}
    for key, name in given.items():
        if key not in NAMES or not name.strip("./") or "/" in name:
            raise bad(path, f"names.{key}={name} is no name of a dataset for one of {', '.join(NAMES)}")
    return tuple((given[key],) if key in given else usual for key, usual in NAMES.items())


def _first(path: str, aliases: tuple[tuple[str, ...], ...]) -> tuple[tuple[int, ...], bool]:
    """Shape of the first episode's frames, and whether it tells truncation apart."""
    file = files(path, SUFFIXES)[0]
    with _opened(file) as h5:
        group = next(_episodes(h5, file, aliases))
        datasets = _datasets(h5[group] if group else h5, file / group, aliases)
        return frame_of(file / group, datasets["obs"].shape, datasets["obs"].dtype), "truncated" in datasets


@lru_cache(1)
def _first_cached(path: str, changed: int, aliases: tuple[tuple[str, ...], ...]) -> tuple[tuple[int, ...], bool]:
    return _first(path, aliases)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        import h5py
    except ModuleNotFoundError as e:
        raise UserError('reading HDF5 needs h5py; install it with: pip install "worldmodels[minari]"') from e
    try:
        with h5py.File(file, "r") as h5:
            yield h5
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, LookupError) as e:
        raise bad(file, f"it is no whole HDF5 file ({e})") from e


def _episodes(h5: Any, file: Path, aliases: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    """The groups of a file that are episodes, in natural order; "" where the episode is at the root."""
    from h5py import Group

    found = [""] if _has(h5, aliases) else sorted(h5, key=natural)
    episodes = (
        g for g in found if not g or (_is_here(h5, g, file) and isinstance(h5[g], Group) and _has(h5[g], aliases))
    )
    if (first := next(episodes, None)) is None:
        usual = ", ".join(aliases[k][0] for k in range(len(REQUIRED)))
        raise bad(file, f"it has no group with {usual}; where they are called otherwise, say how with source.names")
    yield first
    yield from episodes


def _has(group: Any, aliases: tuple[tuple[str, ...], ...]) -> bool:
    return any(group.id.links.exists(alias.encode()) for several in aliases for alias in several)


def _is_here(group: Any, name: str, where: Path) -> bool:
    """Whether `group` has something of that name; asked without following a link, which may lead to another file."""
    links = group.id.links
    if not links.exists(name.encode()):
        return False
    if links.get_info(name.encode()).type != _HARD:
        raise bad(where, f"{name} is a link; only what lies in the file itself is read")
    return True


def _datasets(group: Any, where: Path, aliases: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    """The datasets of an episode by the names in `ARRAYS`, each checked before it is read."""
    found = {}
    for name, several in zip(ARRAYS, aliases, strict=True):
        for alias in several:
            if name not in found and _is_here(group, alias, where):
                found[name] = _checked(group[alias], alias, where)
    if missing := [several for name, several in zip(REQUIRED, aliases, strict=False) if name not in found]:
        raise bad(where, f"it has no dataset {' or '.join(missing[0])}; say what it is called with source.names")
    return found


def _checked(dataset: Any, name: str, where: Path) -> Any:
    from h5py import Dataset

    if not isinstance(dataset, Dataset) or dataset.shape is None:
        raise bad(where, f"{name} is no dataset with rows")
    plan = dataset.id.get_create_plist()
    filters = {plan.get_filter(k)[0] for k in range(plan.get_nfilters())}
    if dataset.external or dataset.is_virtual:
        raise bad(where, f"{name} lies in another file; only what lies in the file itself is read")
    if unknown := filters - set(_FILTERS):
        raise bad(where, f"{name} needs the filter {min(unknown)}, which is code; save it with gzip, lzf or none")
    check_array(where, name, dataset.shape, dataset.dtype, dataset.id.get_storage_size())
    if chunks := dataset.chunks:
        if prod(chunks) * dataset.dtype.itemsize > max(_MAX_CHUNK, dataset.nbytes):
            raise bad(where, f"{name} is chunked by {chunks}; a chunk has at most {_MAX_CHUNK} bytes")
        expected = prod(-(-rows // chunk) for rows, chunk in zip(dataset.shape, chunks, strict=True))
        whole = dataset.id.get_num_chunks() == expected
    else:
        whole = dataset.id.get_storage_size() == dataset.nbytes
    if not whole:
        raise bad(where, f"not all rows of {name} were written; record it again, or shorten it")
    return dataset

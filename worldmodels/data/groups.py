"""Zarr v3 groups: zarr-python makes their files in memory, and they are written in the thread that asks for it.

Left to write by itself, zarr-python does so in several threads, and where one of them fails (on a full disk, say) the
others go on for a while: they put files into a folder that is being removed, so that it stays, or its removal fails.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def group_in_memory() -> tuple[Any, dict[str, Any]]:
    """An empty group, and the files that it consists of by their path in it, which grow with it."""
    from zarr import create_group  # half a second, and readers do without it
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    return create_group(MemoryStore(files), zarr_format=3), files


def add_plain(group: Any, name: str, values: np.ndarray) -> None:
    """Add an array (N, ...) uncompressed and in one chunk: the file is the array's bytes."""
    group.create_array(
        name, data=values, chunks=values.shape, compressors=None, filters=None, config={"write_empty_chunks": True}
    )


def write_files(path: Path, files: Mapping[str, Any]) -> None:
    """Write the files of a group to the folder `path`, which may hold further ones."""
    for name, data in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as f:
            f.write(data.as_buffer_like())

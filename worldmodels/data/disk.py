"""Files that are whole or absent after a crash, and one sentence for what a disk refuses."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from worldmodels.data.checksums import BLANK, KEY, marked_json
from worldmodels.types import UserError


@contextmanager
def atomic(path: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, to write a file or a folder to; it gets its name, durably, when the block ends.

    Raises:
        FileExistsError: without `replace`, where the file is there already; it stays as it is.
    """
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
    remove(tmp)
    try:
        yield tmp
        sync(tmp)
        os.replace(tmp, path) if replace else os.link(tmp, path)
        sync_entry(path.parent)
    finally:
        remove(tmp)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, would survive a loss of power."""
    for folder, _, files in os.walk(path):
        for name in files:
            sync_entry(os.path.join(folder, name))
        sync_entry(folder)
    if path.is_file():
        sync_entry(path)


def sync_entry(path: str | Path) -> None:
    """The same for one file, or for the names in one folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path) -> Any:
    """The content of a JSON file, without its checksum if it carries one.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is damaged.
    """
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except ValueError as e:
        raise damaged(path, e) from e
    if isinstance(value, dict):
        value.pop(KEY, None)
    return value


def write_json(path: Path, value: Mapping[str, Any], replace: bool = True, checksum: bool = False) -> None:
    """Write a JSON file; without `replace` one that is there stays. In a store it carries its own `checksum`."""
    text = json.dumps({KEY: BLANK, **value} if checksum else value, indent=2) + "\n"
    with atomic(path, replace) as tmp:
        tmp.write_bytes(marked_json(text.encode()) if checksum else text.encode())


def is_url(path: object) -> bool:
    """Whether a store's path is an address such as https://..., and not one on the disk."""
    return "://" in str(path)


def on_disk(path: object) -> Path:
    """Where something is to be written.

    Raises:
        UserError: it is a URL.
    """
    if is_url(path):
        raise UserError(f"{path} is a URL, and what lies behind one can only be read; give a folder on the disk")
    return Path(str(path))


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where there is none.

    Raises:
        UserError: it cannot be made.
    """
    try:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as e:  # in /proc and the like
        raise UserError(f"no folder can be made at {path}; give another one") from e


def lock(path: Path) -> IO[str]:
    """Become the only writer; the lock goes with the process, however it ends.

    Raises:
        UserError: another one holds it.
    """
    import fcntl  # not on Windows, where stores can still be read

    file = open(path, "a")  # noqa: SIM115 (held as long as the store)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise UserError(f"another process is writing to the store {path.parents[1]}; wait until it is done") from e
    return file


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for this folder, and leave no file behind."""
    import fcntl

    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one sentence.

    Raises:
        UserError: the disk is full, access is denied, or `path` is not a folder.
    """
    try:
        yield
    except OSError as e:
        if sentence := refusal(e, path):
            raise UserError(sentence) from e
        raise


def refusal(e: OSError, path: Path | None = None) -> str | None:
    """What a disk's error means and how to mend it, or None where it is not one that a user can mend."""
    where = e.filename or path
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        mend = "nothing stored is lost: free some space and run the same command again"
        return f"the disk{f' of {path or where}' if path or where else ''} is full; {mend}"
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to use {where}; mend its rights or give another folder"
    if e.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{where} is a file where a folder is needed; give another folder"
    return None


def damaged(path: str | Path, why: object) -> UserError:
    """What to raise where stored bytes are not what was written."""
    return UserError(f"the stored file {path} is damaged ({why}); restore it from a copy, or make the store again")

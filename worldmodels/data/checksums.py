"""Checksums that a store's files carry, so that `worldmodels verify` finds any flipped byte.

All are crc32c, as in Zarr's own shards. A JSON file holds its own as the first entry of the name `crc32c`, in 8 hex
digits, taken over the file's bytes with zeros in their place. A .npz file (a zip) holds its own as the archive's
comment, taken over the bytes before it. Further files are listed with size and checksum in a JSON file beside them.
"""

import re
from pathlib import Path

from google_crc32c import extend
from google_crc32c import value as crc32c

KEY, BLANK = "crc32c", "0" * 8
_MARK = re.compile(rb'("crc32c": ")([0-9a-f]{8})"')
_PIECE = 2**22  # bytes read at a time


def marked_json(text: bytes) -> bytes:
    """JSON whose first entry `crc32c` is `BLANK`, with its checksum there.

    Raises:
        ValueError: there is no such entry.
    """
    found = _MARK.search(text)
    if found is None or found[2] != BLANK.encode():
        raise ValueError(f"this JSON has no entry {KEY!r} with the value {BLANK!r} to hold its checksum")
    return _with_digits(text, found, f"{crc32c(text):08x}".encode())


def json_matches(text: bytes) -> bool | None:
    """Whether JSON as it lies on the disk is as it was written; None where it carries no checksum."""
    found = _MARK.search(text)
    return None if found is None else int(found[2], 16) == crc32c(_with_digits(text, found, BLANK.encode()))


def _with_digits(text: bytes, found: re.Match[bytes], digits: bytes) -> bytes:
    return text[: found.start(2)] + digits + text[found.end(2) :]


def mark_zip(path: Path) -> None:
    """Give a zip file, which must have no comment yet, its checksum as its comment."""
    with open(path, "r+b") as f:  # the last two bytes of a zip file are the length of its comment
        f.seek(-2, 2)
        f.write(len(BLANK).to_bytes(2, "little"))
    digits = f"{measure(path)[1]:08x}"
    with open(path, "ab") as f:
        f.write(digits.encode())


def zip_matches(path: Path) -> bool | None:
    """Whether a zip file is as it was written; None where it carries no checksum."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        f.seek(max(0, size - 22))
        tail = f.read()
    if tail.startswith(b"PK\5\6") and tail.endswith(b"\0\0"):  # it ends with a record that announces no comment
        return None
    return tail[-8:] == f"{measure(path, size - 8)[1]:08x}".encode()


def measure(path: Path, stop: int | None = None) -> tuple[int, int]:
    """Size in bytes and crc32c of a file, or of its first `stop` bytes, in constant memory."""
    size, crc = 0, 0
    with open(path, "rb") as f:
        while piece := f.read(_PIECE if stop is None else max(0, min(_PIECE, stop - size))):
            size, crc = size + len(piece), extend(crc, piece)
    return size, crc


def file_table(folder: Path) -> dict[str, list[int]]:
    """Size and crc32c of each file below `folder` but for those in the folder itself, by its path from there."""
    files = sorted(p for p in folder.glob("*/**/*") if p.is_file())
    return {p.relative_to(folder).as_posix(): list(measure(p)) for p in files}

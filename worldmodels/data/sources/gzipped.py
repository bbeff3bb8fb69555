"""Arrays that `np.save` wrote to gzip files, local or remote, read row by row; their headers are not believed."""

import io
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any
from warnings import catch_warnings

import numpy as np

from worldmodels.data.sources.reading import bad
from worldmodels.types import UserError

BLOCK = 2**20  # bytes that are read at a time, and at most decompressed at a time
_PACKED = 2**14  # bytes that are decompressed at a time


@contextmanager
def sentences(path: object) -> Iterator[None]:
    """One sentence for whatever goes wrong while bytes of `path` are read; keep the block that it guards small.

    Raises:
        UserError: the file is missing, truncated, damaged or out of reach.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as e:
        raise bad(str(path), f"it is missing or out of reach{f' ({e.__cause__})' if e.__cause__ else ''}") from e
    except EOFError as e:
        raise bad(str(path), "the file is truncated; fetch it again") from e
    except ImportError as e:
        raise bad(
            str(path), f'what reads such addresses is not installed ({e}): pip install "worldmodels[cloud]"'
        ) from e
    except Exception as e:  # zlib, gzip, numpy's header parser and every backend of fsspec have errors of their own
        raise bad(str(path), f"it cannot be read ({str(e).partition(chr(10))[0] or type(e).__name__})") from e


class Gunzip:
    """The content of a gzip file of one member. With less between zlib and the caller it is faster than gzip.GzipFile.

    Args:
        file: what is decompressed.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._zlib = file, zlib.decompressobj(wbits=31)  # 31: with the header and the checksum of gzip

    def read(self, size: int = BLOCK, /) -> bytes:
        """The next bytes, `size` at most, or fewer; none where the content ends, and agrees with its checksum.

        Raises:
            EOFError: the file is truncated.
            zlib.error: it is damaged.
        """
        data = b""
        while size and not data and not self._zlib.eof:
            packed = self._zlib.unconsumed_tail or self._file.read(_PACKED)
            data = self._zlib.decompress(packed, size)  # which may have kept some, even where nothing more is packed
            if not packed and not data and not self._zlib.eof:
                raise EOFError
        return data


class Rows:
    """The rows of one array, in order, from the stream that follows its header.

    Args:
        stream: what the rows are read from.
        path: named in messages.
        shape: of the array.
        dtype: of the array.
    """

    def __init__(self, stream: Gunzip, path: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self._stream, self._path, self._dtype, self._row = shape, stream, path, dtype, 0
        self._row_bytes = dtype.itemsize * math.prod(shape[1:])

    def into(self, out: np.ndarray) -> None:
        """Read the next rows into `out` (n, ...), C-contiguous.

        Raises:
            UserError: the file ends before them, or is damaged.
        """
        flat, filled = out.reshape(-1).view(np.uint8), 0
        for data in self._blocks(len(out)):
            flat[filled : filled + len(data)] = np.frombuffer(data, np.uint8)
            filled += len(data)

    def read(self, n: int) -> np.ndarray:
        """The next `n` rows, (n, ...)."""
        out = np.empty((n, *self.shape[1:]), self._dtype)
        self.into(out)
        return out

    def skip_to(self, row: int) -> None:
        """Read and forget the rows before `row`."""
        for _ in self._blocks(row - self._row):
            pass

    def _blocks(self, rows: int) -> Iterator[bytes]:
        left = rows * self._row_bytes
        while left > 0:
            with sentences(self._path):
                data = self._stream.read(min(left, BLOCK))
            if not data:
                raise bad(self._path, f"the file ends before row {self._row + rows} of {self.shape[0]}")
            left -= len(data)
            yield data
        self._row += max(0, rows)

    def finish(self) -> None:
        """Pass over the rows that are left and see that the file ends there with the checksum that it names.

        Raises:
            UserError: it does not.
        """
        self.skip_to(self.shape[0])
        with sentences(self._path):
            if self._stream.read(1):
                raise bad(self._path, f"the file holds more than the {self.shape[0]} rows of its header")


@contextmanager
def opened(fs: Any, path: str, dtype: Any, shape: Sequence[int | None]) -> Iterator[Rows]:
    """The rows of a gzipped `.npy` file, once its header is seen to say what is expected.

    Args:
        fs: fsspec filesystem of the file.
        path: of the file in it.
        dtype: of the array, exactly.
        shape: of the array; None stands for a length that the caller checks before any row is read.

    Raises:
        UserError: the file is missing, damaged or of another dtype or shape.
    """
    # One request that streams, where the backend offers it: not every server has ranges.
    streaming = {"block_size": 0} if "http" in fs.protocol else {}
    with ExitStack() as stack:
        with sentences(path):
            raw = stack.enter_context(fs.open(path, "rb", **streaming))
            stream = Gunzip(io.BufferedReader(raw, BLOCK))
            if (version := np.lib.format.read_magic(stream)) != (1, 0):  # later ones may have headers of gigabytes
                raise bad(path, f"it is a .npy file of version {version}, not (1, 0)")
            with catch_warnings(action="ignore"):  # as of a header that Python 2 wrote
                found, fortran, kind = np.lib.format.read_array_header_1_0(stream)
        same = len(found) == len(shape) and all(want in (None, n) for n, want in zip(found, shape, strict=True))
        if kind != dtype or fortran or not same:
            want = tuple("any" if n is None else n for n in shape)
            raise bad(path, f"it holds {kind} {found}, not {np.dtype(dtype)} {want}".replace("'", ""))
        yield Rows(stream, path, found, kind)


def read_array(fs: Any, path: str, dtype: Any, shape: Sequence[int]) -> np.ndarray:
    """The whole of a small array.

    Raises:
        UserError: as `opened`, or the file ends before or after its last row.
    """
    with opened(fs, path, dtype, shape) as rows:
        out = np.empty(shape, dtype)
        rows.into(out if shape else out[None])
        if shape:
            rows.finish()
        return out

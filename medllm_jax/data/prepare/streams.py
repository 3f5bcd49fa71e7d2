"""Opening files: decompressed streams and .parquet files; damaged content and failing storage are different errors."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from etils import epath

from medllm_jax.data.prepare.files import compression_of
from medllm_jax.errors import UserError
from medllm_jax.storage.remote import open_buffered

if TYPE_CHECKING:
    import pyarrow.parquet

_BUFFER = 2**20


class DamagedError(Exception):
    """A zstd stream cannot be decompressed to its end."""


# What reading a compressed stream raises where its content is damaged or cut short.
STREAM_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, DamagedError)


class WatchedFile:
    """A file for pyarrow, which raises OSError for damaged content too; ``failed``: reading the file itself did."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.failed = False

    def read(self, size: int = -1) -> bytes:
        self.failed = True
        content = self._file.read(size)
        self.failed = False
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def open_stream(file: str) -> Iterator[io.BufferedIOBase]:
    """The decompressed content of a file; reading raises one of STREAM_DAMAGE where that is not possible."""
    with open_buffered(epath.Path(file), _BUFFER) as buffered:
        match compression_of(file):
            case "gzip":
                yield gzip.GzipFile(fileobj=buffered)
            case "zstd":
                yield io.BufferedReader(_Zstandard(buffered))
            case _:
                yield buffered


class _Zstandard(io.RawIOBase):
    """The content of the frames of a zstd file; raises DamagedError where they are damaged or cut short."""

    def __init__(self, file: IO[bytes]):
        import pyarrow as pa

        self._file = WatchedFile(file)
        self._stream = pa.CompressedInputStream(pa.PythonFile(self._file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except OSError as error:
            if self._file.failed:
                raise
            raise DamagedError from error


def open_parquet(file: str, stream: WatchedFile) -> "pyarrow.parquet.ParquetFile":
    """Opens a .parquet file; UserError where the stream is not one."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        if stream.failed:
            raise
        raise UserError(f"{file} cannot be opened as a parquet file: copy or make it again") from error

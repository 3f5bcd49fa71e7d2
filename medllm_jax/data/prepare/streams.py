"""Opening files: decompressed streams and .parquet files; damaged content and failing storage are different errors."""

import bz2
import contextlib
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from etils import epath

from medllm_jax.data.prepare.files import POINTER_BYTES, compression_of, refuse_pointer
from medllm_jax.errors import UserError
from medllm_jax.storage.remote import open_buffered

if TYPE_CHECKING:
    import pyarrow.parquet

_BUFFER = 2**20


# Compressed bytes that are decompressed at once: few where they become much, so that a line of a million equal
# characters takes no more memory than others. At the highest ratio of any format 4096 become about 128 MiB.
_COMPRESSED_BLOCKS = (16, 4096)
_MUCH = 2**17
_MAX_WINDOW = 2**30  # bytes of memory that a compressed stream may ask for: zstd's --long=30


# What pyarrow raises for a .parquet file that is none, or damaged; its own errors are of these kinds too.
PARQUET_DAMAGE = (OSError, ValueError, LookupError, TypeError, NotImplementedError, OverflowError)


class DamagedError(Exception):
    """A compressed stream cannot be decompressed to its end; the message says why."""


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
def open_stream(file: str) -> "Iterator[io.BufferedReader[Any]]":
    """The decompressed content of a file; reading raises DamagedError where that is not possible.

    Raises UserError for a file that only points to its content.
    """
    with open_buffered(epath.Path(file), _BUFFER) as buffered:
        refuse_pointer(file, buffered.peek(POINTER_BYTES)[:POINTER_BYTES])
        compression = compression_of(file)
        yield buffered if compression is None else io.BufferedReader(_Decompressed(buffered, compression), _MUCH)


class _Decompressed(io.RawIOBase):
    """The content of a file of one compressed stream or several, one after the other.

    Raises DamagedError where one is damaged, cut short, followed by something else, or needs too much memory.
    """

    def __init__(self, file: IO[bytes], compression: str):
        self._file = file
        self._compression = compression
        self._stream: Any = None
        self._block = b""  # compressed
        self._block_bytes = _COMPRESSED_BLOCKS[0]
        self._content = memoryview(b"")  # decompressed, and not yet read
        self._streams = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content and self._decompress():
            pass
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _decompress(self) -> bool:
        """Decompresses a block; False at the end of the file."""
        self._block = self._block or self._file.read(self._block_bytes)
        if not self._block:
            if self._stream is not None:
                raise DamagedError("is damaged or cut short")
            return False
        if self._stream is None and self._streams:
            self._block = self._block.lstrip(b"\0")  # programs fill blocks with zeros
            if not self._block:
                return True
        try:
            if self._stream is None:
                self._stream = _decompressor(self._compression)
                self._streams += 1
            self._content = memoryview(self._stream.decompress(self._block))
        except Exception as error:  # each library has its own, raised for the content alone: nothing is read here
            raise DamagedError(self._reason(error)) from error
        size = self._block_bytes // 2 if len(self._content) > _MUCH else 2 * self._block_bytes
        self._block, self._block_bytes = b"", min(max(size, _COMPRESSED_BLOCKS[0]), _COMPRESSED_BLOCKS[1])
        if self._stream.eof:
            self._block, self._stream = self._stream.unused_data, None
        return True

    def _reason(self, error: Exception) -> str:
        if "too much memory" in str(error) or "Memory usage limit" in str(error):
            return f"needs more than {_MAX_WINDOW // 2**30} GiB of memory (compress it with --long=30 or less)"
        return "has something else after its end" if self._streams > 1 else "is damaged or cut short"


def _decompressor(compression: str) -> Any:
    match compression:
        case "gzip":
            return zlib.decompressobj(wbits=31)
        case "zstd":
            import zstandard

            return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
        case "xz":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_WINDOW)
        case _:
            return bz2.BZ2Decompressor()


def open_parquet(file: str, stream: WatchedFile) -> "pyarrow.parquet.ParquetFile":
    """Opens a .parquet file; UserError where the stream is not one."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
    except PARQUET_DAMAGE as error:
        if stream.failed:
            raise
        stream.seek(0)
        refuse_pointer(file, stream.read(POINTER_BYTES))
        raise UserError(f"{file} cannot be opened as a parquet file: copy or make it again") from error

"""How input files are read: found, cut into slices for many workers, and read row by row in bounded memory.

Kinds of file: ``.jsonl`` (one object a line) and ``.txt`` (one document a file), each also with ``.gz`` or ``.zst``
appended, and ``.parquet``. All may be local or under gs://.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple, Self

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.remote import is_remote

OnBad = Literal["error", "skip"]
Inputs = str | epath.PathLike | Sequence[str | epath.PathLike]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", *(f".jsonl{suffix}" for suffix in _COMPRESSIONS))
TEXT_FILES = (".txt", *(f".txt{suffix}" for suffix in _COMPRESSIONS))
PARQUET = (".parquet",)
ROW_FILES = (*JSON_LINES, *PARQUET)  # what ``read_rows`` reads
DOCUMENT_FILES = (*JSON_LINES, *TEXT_FILES, *PARQUET)  # what ``read_documents`` reads

_BLOCK = 2**20
_BATCH_ROWS = 256  # of a parquet row group, turned into Python values at a time


class Slice(NamedTuple):
    """What one worker reads of a file, in one go.

    file: path or gs:// URI. start, end: of a .jsonl file the first byte, at which a line begins, and one past the last;
    of a .parquet file row groups likewise; of other files 0 and the file's size. first_line: number, from 1, of the
    first line or row. bytes: how much of the file it is, as stored, for balance and progress.
    """

    file: str
    start: int
    end: int
    first_line: int
    bytes: int


class Inventory(NamedTuple):
    """A file's size in bytes, its sha256 and its slices in order; an empty file has none."""

    file: str
    bytes: int
    sha256: str
    slices: tuple[Slice, ...]


def manifest_of(inventories: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a store keeps of its input, from inventories as dicts: each file, and a checksum of all of them.

    checksum: sha256 over the files' own, sorted; neither their names nor their place count.
    """
    files = [{name: inventory[name] for name in ("file", "bytes", "sha256")} for inventory in inventories]
    digests = "".join(sorted(f"{file['sha256']}\n" for file in files))
    return {"checksum": hashlib.sha256(digests.encode()).hexdigest(), "files": files}


class ReadOptions(NamedTuple):
    """text_field: the field or column that holds a document's text. max_bytes: the most bytes that a line (with its
    end), a parquet cell or a .txt file may have. on_bad: what to do about a row that cannot be used."""

    text_field: str = "text"
    max_bytes: int = 2**26
    on_bad: OnBad = "error"


class Document(NamedTuple):
    """A document and where it stands, "file" or "file:line"."""

    text: str
    where: str


class Dropped:
    """What was left out, by reason: how many, and where the first ones stand. Never the text itself."""

    KEEP = 10

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, reason: str, where: str) -> None:
        self._add(reason, 1, [where])

    def merge(self, other: Self) -> None:
        """Adds what another one counted; its places come after those that are here."""
        for reason, count in other.counts.items():
            self._add(reason, count, other.first[reason])

    def _add(self, reason: str, count: int, places: Sequence[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        first = self.first.setdefault(reason, [])
        first += places[: self.KEEP - len(first)]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """reason -> {"count": int, "first": ["file:line", ...]}, as store.json holds it."""
        return {reason: {"count": count, "first": self.first[reason]} for reason, count in self.counts.items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Mapping[str, Any]]) -> Self:
        """What ``as_dict`` was called on."""
        dropped = cls()
        for reason, entry in content.items():
            dropped._add(reason, entry["count"], entry["first"])
        return dropped

    def __str__(self) -> str:
        parts = (f"{count} {reason} (first at {self.first[reason][0]})" for reason, count in self.counts.items())
        return ", ".join(parts) or "nothing"


def reject(where: str, reason: str, on_bad: OnBad, dropped: Dropped) -> None:
    """A row that cannot be used: UserError naming place and reason, or counted when ``on_bad`` is "skip"."""
    if on_bad == "error":
        raise UserError(f"{where}: {reason}; correct the row, or have such rows skipped and counted")
    dropped.add(reason, where)


def text_problem(value: Any) -> str | None:
    """Why a value cannot be used as text, or None."""
    if not isinstance(value, str):
        return "not a string"
    if not value.strip():
        return "empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "not valid Unicode (a lone surrogate)"
    return None


# --- finding ---------------------------------------------------------------------------------------------------------


def find_files(inputs: Inputs, suffixes: Sequence[str]) -> list[epath.Path]:
    """The files with one of ``suffixes`` among files, folders (searched through) and globs; ordered, each once.

    Raises UserError for an input that does not exist or holds no such file.
    """
    kinds = ", ".join(suffixes)
    files: dict[str, epath.Path] = {}
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        inputs = [inputs]
    for item in inputs:
        path = epath.Path(item)
        found = _files_under(path)
        if found == [path] and not path.name.endswith(tuple(suffixes)):
            raise UserError(f"{path} is not a file of a kind that is read here ({kinds})")
        if not found and _has_wildcard(str(path)):
            found = _glob(path)
        elif not found and not path.exists():
            raise UserError(f"{path} does not exist")
        found = [file for file in found if file.name.endswith(tuple(suffixes))]
        if not found:
            raise UserError(f"no file of a kind that is read here ({kinds}) at {path}")
        files.update((str(file), file) for file in found)
    return list(files.values())


def _files_under(path: epath.Path) -> list[epath.Path]:
    """The file itself, or the visible files of a folder and the folders in it, in order; none where nothing is."""
    if is_remote(path):
        return _remote_files(path, glob=False)
    if path.is_dir():
        visible = (entry for entry in path.iterdir() if not entry.name.startswith("."))
        return [file for entry in sorted(visible) for file in _files_under(entry)]
    return [path] if path.exists() else []


def _glob(pattern: epath.Path) -> list[epath.Path]:
    if "**" in pattern.parts:
        raise UserError(f"{pattern}: `**` is not understood; give the folder itself, it is searched through")
    if is_remote(pattern):
        return _remote_files(pattern, glob=True)
    base = _fixed_part(pattern)
    return [file for match in sorted(base.glob(str(pattern.relative_to(base)))) for file in _files_under(match)]


def _remote_files(path: epath.Path, glob: bool) -> list[epath.Path]:
    """``_files_under`` a path, or all matches of a glob, in object storage.

    Asks for whole listings, each a request for a thousand files and more; asking what an entry is costs one apiece.
    """
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(str(path))
    entries = filesystem.glob(root, detail=True) if glob else filesystem.find(root, detail=True)
    for name in [name for name, entry in entries.items() if entry["type"] == "directory"]:
        entries |= filesystem.find(name, detail=True)
    base = _fixed_part(path) if glob else path
    scheme = str(path).partition("://")[0]
    files = [epath.Path(f"{scheme}://{name}") for name, entry in entries.items() if entry["type"] == "file"]
    visible = (file for file in files if not any(part.startswith(".") for part in file.relative_to(base).parts))
    return sorted(visible, key=lambda file: file.parts)


def _fixed_part(pattern: epath.Path) -> epath.Path:
    """The folder that a glob looks in."""
    return epath.Path(*itertools.takewhile(lambda part: not _has_wildcard(part), pattern.parts))


def _has_wildcard(text: str) -> bool:
    return not set(text).isdisjoint("*?[")


# --- inventory -------------------------------------------------------------------------------------------------------


def take_inventory(file: str | epath.PathLike, slice_bytes: int) -> Inventory:
    """Reads a file once, for its digest and for slices of about ``slice_bytes`` bytes.

    Slices of a .jsonl file begin and end with lines, those of a .parquet file with row groups; what cannot be read from
    the middle is one slice. Raises UserError for a .parquet file that is none.
    """
    if slice_bytes < 1:
        raise ValueError(f"slice_bytes is {slice_bytes}")
    path = epath.Path(file)
    digest = hashlib.sha256()
    size = 0
    line = 1
    starts = [(0, 1)]  # the first byte of each slice, and its line
    cut_at_lines = path.name.endswith(".jsonl")
    with path.open("rb") as stream:
        block = bytearray(_BLOCK)
        while length := stream.readinto(block):
            digest.update(memoryview(block)[:length])
            if cut_at_lines:
                done = 0
                # The first line end at or after the last byte of a slice of the right size ends it.
                while (last := starts[-1][0] + slice_bytes - 1 - size) < length:
                    end = block.find(b"\n", max(last, 0), length) + 1
                    if not end:
                        break
                    line += block.count(b"\n", done, end)
                    done = end
                    starts.append((size + end, line))
                line += block.count(b"\n", done, length)
            size += length
        if size and path.name.endswith(PARQUET):
            slices = _parquet_slices(str(path), stream, slice_bytes)
        else:
            ends = [start for start, _ in starts[1:]] + [size]
            slices = [
                Slice(str(path), start, end, line, end - start)
                for (start, line), end in zip(starts, ends, strict=True)
                if end > start
            ]
    return Inventory(str(path), size, digest.hexdigest(), tuple(slices))


def _parquet_slices(file: str, stream: BinaryIO, slice_bytes: int) -> list[Slice]:
    metadata = _open_parquet(file, _Watched(stream)).metadata
    slices: list[Slice] = []
    row = 1
    current = Slice(file, 0, 0, 1, 0)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        stored = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        current = current._replace(end=number + 1, bytes=current.bytes + stored)
        row += group.num_rows
        if current.bytes >= slice_bytes or number + 1 == metadata.num_row_groups:
            slices.append(current)
            current = Slice(file, number + 1, number + 1, row, 0)
    return slices


# --- reading ---------------------------------------------------------------------------------------------------------


def read_files(
    inputs: Inputs, options: ReadOptions, dropped: Dropped, columns: Sequence[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of all inputs (see ``find_files``) of the kinds in ROW_FILES, in order; see ``read_rows``."""
    for file in find_files(inputs, ROW_FILES):
        size = file.stat().length
        yield from read_rows(Slice(str(file), 0, size, 1, size), options, dropped, columns)


def read_rows(
    slice: Slice, options: ReadOptions, dropped: Dropped, columns: Sequence[str] | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a slice of a file of the kinds in ROW_FILES, each with its "file:line"; blank lines are not rows.

    columns: those that are read of a .parquet file, by default all; an object of a .jsonl file is always whole. Memory
    holds one line, or one row group as it is stored and some rows of it.

    Raises UserError for a bad row and for a file that is damaged or cut short. With on_bad "skip" either is counted
    in ``dropped``, and what could be read of the file is kept; of a damaged gzip stream that may be a few lines that
    were not written so, since its checksum comes last. A .parquet file without one of the columns is always an error.
    """
    if slice.file.endswith(PARQUET):
        yield from _parquet_rows(slice, options, dropped, columns)
        return
    for line, where in _lines(slice, options, dropped):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            reject(where, "not UTF-8", options.on_bad, dropped)
        except (ValueError, RecursionError):
            reject(where, "not valid JSON", options.on_bad, dropped)
        else:
            if isinstance(row, dict):
                yield row, where
            else:
                reject(where, "not a JSON object", options.on_bad, dropped)


def read_documents(slice: Slice, options: ReadOptions, dropped: Dropped) -> Iterator[Document]:
    """The documents of a slice of a file of the kinds in DOCUMENT_FILES; errors and memory as with ``read_rows``."""
    for value, where in _texts(slice, options, dropped):
        problem = text_problem(value)
        if problem:
            reject(where, f"text is {problem}", options.on_bad, dropped)
        else:
            yield Document(value, where)


def _texts(slice: Slice, options: ReadOptions, dropped: Dropped) -> Iterator[tuple[Any, str]]:
    if slice.file.endswith(TEXT_FILES):
        yield from _text_of_file(slice.file, options, dropped)
        return
    for row, where in read_rows(slice, options, dropped, [options.text_field]):
        if options.text_field in row:
            yield row[options.text_field], where
        else:
            reject(where, f"no field `{options.text_field}`", options.on_bad, dropped)


def _text_of_file(file: str, options: ReadOptions, dropped: Dropped) -> Iterator[tuple[str, str]]:
    try:
        with _open(file) as stream:
            content = stream.read(options.max_bytes + 1)
    except _DAMAGE as error:
        _reject_rest(file, 0, error, options.on_bad, dropped)
        return
    if len(content) > options.max_bytes:
        reject(file, _too_long(options), options.on_bad, dropped)
        return
    try:
        yield content.decode("utf-8-sig"), file
    except UnicodeDecodeError:
        reject(file, "not UTF-8", options.on_bad, dropped)


def _lines(slice: Slice, options: ReadOptions, dropped: Dropped) -> Iterator[tuple[bytes, str]]:
    """The lines that are not blank, each with its "file:line"."""
    number = slice.first_line - 1
    position = slice.start
    end = math.inf if _compression(slice.file) else slice.end
    try:
        with _open(slice.file) as stream:
            if position:
                stream.seek(position)
            while position < end and (line := stream.readline(options.max_bytes + 1)):
                position += len(line)
                too_long = len(line) > options.max_bytes
                rest = line
                while too_long and rest and not rest.endswith(b"\n"):
                    rest = stream.readline(_BLOCK)
                    position += len(rest)
                number += 1
                if too_long:
                    reject(f"{slice.file}:{number}", _too_long(options), options.on_bad, dropped)
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
                if line.strip():
                    yield line, f"{slice.file}:{number}"
    except _DAMAGE as error:
        _reject_rest(slice.file, number, error, options.on_bad, dropped)


def _parquet_rows(
    slice: Slice, options: ReadOptions, dropped: Dropped, columns: Sequence[str] | None
) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow as pa

    number = slice.first_line - 1
    with epath.Path(slice.file).open("rb") as raw:
        stream = _Watched(raw)
        table = _open_parquet(slice.file, stream)
        there = table.schema_arrow.names
        for column in columns or ():
            if column not in there:
                raise UserError(f"{slice.file} has no column `{column}`; it has {', '.join(there)}")
        try:
            for group in range(slice.start, min(slice.end, table.num_row_groups)):
                # Row groups one by one: asked for several, it may hold them all.
                for batch in table.iter_batches(_BATCH_ROWS, [group], columns, use_threads=False):
                    for row in _python_rows(batch):
                        number += 1
                        where = f"{slice.file}:{number}"
                        if row is None:
                            reject(where, "not UTF-8", options.on_bad, dropped)
                        elif any(_is_longer(value, options.max_bytes) for value in row.values()):
                            reject(where, _too_long(options), options.on_bad, dropped)
                        else:
                            yield row, where
        except (OSError, pa.ArrowInvalid) as error:
            if stream.failed:
                raise
            _reject_rest(slice.file, number, error, options.on_bad, dropped)


def _python_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a pyarrow record batch, None for one that is not UTF-8, which no file promises."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _is_longer(value: Any, max_bytes: int) -> bool:
    if not isinstance(value, str) or 4 * len(value) <= max_bytes:  # no character has more than four bytes
        return False
    return len(value.encode("utf-8", "surrogatepass")) > max_bytes


def _too_long(options: ReadOptions) -> str:
    return f"longer than {options.max_bytes} bytes"


def _reject_rest(file: str, line: int, error: Exception, on_bad: OnBad, dropped: Dropped) -> None:
    """What cannot be read of a file after its line (or row) ``line``, as in ``reject``."""
    compression = _compression(file)
    reason = f"the {f'{compression} stream' if compression else 'parquet file'} is damaged or cut short"
    if on_bad == "error":
        raise UserError(
            f"{file}: {reason} after line {line}; copy or make the file again, or have what cannot be read skipped "
            "and counted"
        ) from error
    dropped.add(reason, f"{file}:{line}")


def _compression(file: str) -> str | None:
    return next((name for suffix, name in _COMPRESSIONS.items() if file.endswith(suffix)), None)


@contextlib.contextmanager
def _open(file: str) -> Iterator[BinaryIO]:
    """What a file holds, decompressed; reading raises one of _DAMAGE where that is not possible."""
    with epath.Path(file).open("rb") as raw:
        # A buffer of our own: the lines of files under gs:// are otherwise looked for in Python.
        buffered = io.BufferedReader(raw, _BLOCK)
        match _compression(file):
            case "gzip":
                yield gzip.GzipFile(fileobj=buffered)
            case "zstd":
                yield io.BufferedReader(_Zstandard(buffered))
            case None:
                yield buffered


class _DamagedError(Exception):
    """A zstd stream cannot be decompressed to its end."""


_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, _DamagedError)


class _Watched:
    """A file for pyarrow, which raises OSError for damaged content too; ``failed`` says that it was the file itself."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.failed = False

    def read(self, size: int = -1) -> bytes:
        self.failed = True
        content = self._file.read(size)
        self.failed = False
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Zstandard(io.RawIOBase):
    """What the frames of a zstd file hold; raises _DamagedError where they are damaged or cut short."""

    def __init__(self, file: BinaryIO):
        import pyarrow as pa

        self._file = _Watched(file)
        self._stream = pa.CompressedInputStream(pa.PythonFile(self._file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except OSError as error:
            if self._file.failed:
                raise
            raise _DamagedError from error


def _open_parquet(file: str, stream: _Watched) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        if stream.failed:
            raise
        raise UserError(f"{file} cannot be opened as a parquet file: copy or make it again") from error

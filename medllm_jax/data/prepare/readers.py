"""Reading input files: record by record, or document by document, in bounded memory.

A record is an object of a .jsonl file or a row of a .parquet file, as a dict; a document is a text with its place.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from medllm_jax.data.prepare.files import (
    JSON_LISTS,
    RECORD_FILES,
    TEXT_FILES,
    Inputs,
    compression_of,
    find_files,
    is_kind,
)
from medllm_jax.data.prepare.inventory import ByteRange, FileRange, RowGroupRange, whole_file
from medllm_jax.data.prepare.json_list import begins_list, read_items
from medllm_jax.data.prepare.rejections import Reading, Rejected, RejectionCounts, reject
from medllm_jax.data.prepare.streams import PARQUET_DAMAGE, DamagedError, WatchedFile, open_parquet, open_stream
from medllm_jax.errors import UserError, quoted
from medllm_jax.storage.json_lines import LineError, parse_object, read_lines

_MOST_NAMES = 20  # of fields, in a message
_PEEKED = 4096  # bytes of a .json file, to see whether it is a list
_BATCH_ROWS = 256  # of a parquet row group, turned into Python values at a time


class ReadOptions(NamedTuple):
    """text_field: the field or column that holds a document's text. max_bytes: the most bytes that a line (with its
    end), a parquet cell or a .txt file may have. on_bad: what to do about a row that cannot be used; a damaged file
    stops where it is not "skip"."""

    text_field: str = "text"
    max_bytes: int = 2**26
    on_bad: Reading = "error"


class Document(NamedTuple):
    """A document and its place, "file" or "file:line"."""

    text: str
    where: str


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


def names_of(record: Iterable[str]) -> str:
    """The names of fields, as messages show them: no value is among them."""
    names = list(record)
    return ", ".join(
        [quoted(name, str, most=30) for name in names[:_MOST_NAMES]] + ["..."] * (len(names) > _MOST_NAMES)
    )


def read_all_records(
    inputs: Inputs, options: ReadOptions, rejections: RejectionCounts, fields: Collection[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of all inputs of the kinds in RECORD_FILES, and of .json files that are named, in order.

    See ``find_files`` and ``read_records``.

    fields: the columns that are read of .parquet files, where they are there; others are None.
    """
    for file in find_files(inputs, RECORD_FILES, RejectionCounts(), by_name=JSON_LISTS):
        part = whole_file(file)
        if isinstance(part, RowGroupRange):
            names = column_names(part.file)
            others = dict.fromkeys(name for name in names if name not in fields)
            for row, where in read_records(part, options, rejections, [name for name in names if name in fields]):
                yield others | row, where
        else:
            yield from read_records(part, options, rejections)


def column_names(file: str) -> list[str]:
    """The names of the columns of a .parquet file; UserError where it is none."""
    with epath.Path(file).open("rb") as raw:
        return open_parquet(file, WatchedFile(raw)).schema_arrow.names


def read_records(
    part: FileRange, options: ReadOptions, rejections: RejectionCounts, columns: Sequence[str] | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a range of a file of the kinds in RECORD_FILES, each with its "file:line"; blank lines are none.

    columns: those that are read of a .parquet file, by default all; an object of a .jsonl file is always whole. Memory
    holds one line, or one row group as it is stored and some rows of it.

    Raises UserError for a bad row and for a file that is damaged or cut short. With on_bad "skip" either is counted
    in ``rejections``, and what could be read of the file is kept; of a damaged gzip stream that may be a few lines that
    were not written so, since its checksum comes last. A .parquet file without one of the columns is always an error.
    """
    if isinstance(part, RowGroupRange):
        return _parquet_records(part, options, rejections, columns)
    return _json_records(part, options, rejections)


def read_documents(part: FileRange, options: ReadOptions, rejections: RejectionCounts) -> Iterator[Document]:
    """The documents of a range of a file of the kinds in DOCUMENT_FILES; errors and memory as with ``read_records``."""
    is_text = is_kind(part.file, TEXT_FILES)
    texts = _text_of_file(part.file, options, rejections) if is_text else _text_fields(part, options, rejections)
    for text, where in texts:
        if problem := text_problem(text):
            reject(Rejected(where, f"text is {problem}"), options.on_bad, rejections)
        else:
            yield Document(text, where)


def _text_fields(part: FileRange, options: ReadOptions, rejections: RejectionCounts) -> Iterator[tuple[Any, str]]:
    for record, where in read_records(part, options, rejections, [options.text_field]):
        if options.text_field in record:
            yield record[options.text_field], where
        else:
            name = "name the one that holds the text with --text-field (text_field in a config)"
            hint = f"it has {names_of(record)}: {name}" if record else ""
            reject(Rejected(where, f"no field `{options.text_field}`", hint=hint), options.on_bad, rejections)


def _text_of_file(file: str, options: ReadOptions, rejections: RejectionCounts) -> Iterator[tuple[str, str]]:
    try:
        with open_stream(file) as stream:
            content = stream.read(options.max_bytes + 1)
    except DamagedError as error:
        _reject_rest(file, 0, error, options.on_bad, rejections)
        return
    rejections.rows += 1
    if len(content) > options.max_bytes:
        reject(Rejected(file, _too_long(options)), options.on_bad, rejections)
        return
    try:
        yield content.decode("utf-8-sig"), file
    except UnicodeDecodeError:
        reject(Rejected(file, "not UTF-8"), options.on_bad, rejections)


def _json_records(
    part: ByteRange, options: ReadOptions, rejections: RejectionCounts
) -> Iterator[tuple[dict[str, Any], str]]:
    number = part.first_line - 1
    try:
        with open_stream(part.file) as stream:
            if part.start:
                stream.seek(part.start)
            size = math.inf if part.end is None or compression_of(part.file) else part.end - part.start
            lines = read_lines(
                stream, first_line=part.first_line, max_stream_bytes=size, max_line_bytes=options.max_bytes
            )
            place = f"{part.file}:{{}}"
            if is_kind(part.file, JSON_LISTS) and begins_list(stream.peek(_PEEKED)):
                lines, place = read_items(stream, options.max_bytes), f"{part.file}[{{}}]"
                size = math.inf
            for number, line in lines:
                where = place.format(number)
                if line is None or line.strip():
                    rejections.rows += 1
                if line is None:
                    reject(Rejected(where, _too_long(options)), options.on_bad, rejections)
                elif line.strip():
                    try:
                        record = parse_object(line)
                    except LineError as error:
                        reject(Rejected(where, error.reason), options.on_bad, rejections)
                    else:
                        yield record, where
            if not math.isinf(size) and stream.tell() < part.start + size:
                raise UserError(f"{part.file} has become shorter while it was read: prepare again")
    except DamagedError as error:
        _reject_rest(part.file, number, error, options.on_bad, rejections)


def _parquet_records(
    part: RowGroupRange, options: ReadOptions, rejections: RejectionCounts, columns: Sequence[str] | None
) -> Iterator[tuple[dict[str, Any], str]]:
    number = part.first_row - 1
    with epath.Path(part.file).open("rb") as raw:
        stream = WatchedFile(raw)
        table = open_parquet(part.file, stream)
        there = table.schema_arrow.names
        for column in columns or ():
            if column not in there:
                raise UserError(
                    f"{part.file} has no column `{column}`; it has {names_of(there)}: name the one that holds the text "
                    "with --text-field (text_field in a config)"
                )
        end = table.num_row_groups if part.end is None else part.end
        try:
            for group in range(part.start, end):
                # Row groups one by one: asked for several, it may hold them all.
                for batch in table.iter_batches(_BATCH_ROWS, [group], columns, use_threads=False):
                    for row in _python_rows(batch):
                        number += 1
                        rejections.rows += 1
                        where = f"{part.file}:{number}"
                        if row is None:
                            reject(Rejected(where, "not UTF-8"), options.on_bad, rejections)
                        elif any(_is_longer(value, options.max_bytes) for value in row.values()):
                            reject(Rejected(where, _too_long(options)), options.on_bad, rejections)
                        else:
                            yield row, where
        except PARQUET_DAMAGE as error:
            if stream.failed:
                raise
            _reject_rest(part.file, number, error, options.on_bad, rejections)


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


def _reject_rest(file: str, line: int, error: Exception, on_bad: Reading, rejections: RejectionCounts) -> None:
    """What cannot be read of a file after its line (or row) ``line``, as in ``reject``."""
    problem = str(error) if isinstance(error, DamagedError) else "is damaged or cut short"
    compression = compression_of(file)
    kind = "JSON list" if is_kind(file, JSON_LISTS) else "parquet file"
    reason = f"the {f'{compression} stream' if compression else kind} {problem}"
    if on_bad != "skip":
        raise UserError(
            f"{file}: {reason} after line {line}; copy or make the file again, or have what cannot be read skipped "
            "and counted with --on-bad skip"
        ) from error
    rejections.of_files += 1
    rejections.add(reason, f"{file}:{line}")

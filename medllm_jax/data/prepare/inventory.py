"""The inventory of input files: sizes, hashes, and the ranges that they can be read in by many workers."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import IO, Any, NamedTuple, Self

from etils import epath

from medllm_jax.data.prepare.files import PARQUET, PLAIN_LINES, is_kind, refuse_pointer
from medllm_jax.data.prepare.hub_dataset import origin_of
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.data.prepare.streams import WatchedFile, open_parquet

_BLOCK = 2**20  # bytes read at a time


class ByteRange(NamedTuple):
    """Bytes of a file that one worker reads in one go.

    file: path or gs:// URI. start, end: the first byte and one past the last; None: to the end of the file. Lines begin
    at both where lines are not compressed; other files are one range. first_line: number, from 1, of the first line.
    stored_bytes: their number, where the end is not known as storage states it.
    """

    file: str
    start: int
    end: int | None
    first_line: int
    stored_bytes: int


class RowGroupRange(NamedTuple):
    """Row groups of a .parquet file that one worker reads in one go.

    file: path or gs:// URI. start, end: the first row group and one past the last; None: to the end of the file.
    first_row: number, from 1, of the first row. stored_bytes: their size before compression.
    """

    file: str
    start: int
    end: int | None
    first_row: int
    stored_bytes: int


FileRange = ByteRange | RowGroupRange


class Inventory(NamedTuple):
    """A file's size in bytes, its sha256 (hex) and its ranges in order; an empty file has none."""

    file: str
    bytes: int
    sha256: str
    ranges: tuple[FileRange, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inventory that ``as_dict`` was called on, from JSON."""
        kind = RowGroupRange if is_kind(content["file"], PARQUET) else ByteRange
        ranges = tuple(kind(*fields) for fields in content["ranges"])
        return cls(content["file"], content["bytes"], content["sha256"], ranges)


def manifest_of(inventories: Iterable[Inventory], passed_over: RejectionCounts) -> dict[str, Any]:
    """What a store keeps of its input: name, size and sha256 of each file, a checksum of all, and what was not read;
    of rows of a dataset on the hub, which commit they are of.

    checksum: sha256 over the files' own, sorted; neither their names nor their place count.
    """
    files = []
    for each in inventories:
        origin = origin_of(each.file)
        files.append(
            {"file": each.file, "bytes": each.bytes, "sha256": each.sha256, **({"origin": origin} if origin else {})}
        )
    digests = "".join(sorted(f"{file['sha256']}\n" for file in files))
    checksum = hashlib.sha256(digests.encode()).hexdigest()
    return {"checksum": checksum, "files": files, "passed_over": passed_over.as_dict()}


def whole_file(file: epath.Path) -> FileRange:
    """All of a file."""
    size = file.stat().length
    if is_kind(file.name, PARQUET):
        return RowGroupRange(str(file), 0, None, 1, size)
    return ByteRange(str(file), 0, None, 1, size)


def take_inventory(file: str | epath.PathLike, range_bytes: int | None = None) -> Inventory:
    """Reads a file once, for its digest and for ranges of about ``range_bytes`` bytes; None: one range.

    Ranges of a .jsonl file begin and end with lines, those of a .parquet file with row groups; what cannot be read from
    the middle is one range. Raises UserError for a .parquet file that is none, and a file that points to its content.
    """
    if range_bytes is not None and range_bytes < 1:
        raise ValueError(f"range_bytes is {range_bytes}")
    path = epath.Path(file)
    digest = hashlib.sha256()
    cuts = _LineCuts(range_bytes if is_kind(path.name, PLAIN_LINES) else None)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            if not cuts.size:
                refuse_pointer(str(path), block)
            digest.update(block)
            cuts.add(block)
        if cuts.size and is_kind(path.name, PARQUET):
            ranges = _row_group_ranges(str(path), stream, range_bytes)
        else:
            ranges = cuts.ranges(str(path))
    return Inventory(str(path), cuts.size, digest.hexdigest(), tuple(ranges))


class _LineCuts:
    """Cuts a file, given block by block, at the ends of lines; range_bytes None: not at all."""

    def __init__(self, range_bytes: int | None):
        self._range_bytes = range_bytes
        self.size = 0
        self._line = 1
        self._starts = [(0, 1)]  # the first byte of each range, and its line

    def add(self, block: bytes) -> None:
        if self._range_bytes is not None:
            done = 0
            # The first line end at or after the last byte of a range of the right size ends it.
            while (last := self._starts[-1][0] + self._range_bytes - 1 - self.size) < len(block):
                end = block.find(b"\n", max(last, 0)) + 1
                if not end:
                    break
                self._line += block.count(b"\n", done, end)
                done = end
                self._starts.append((self.size + end, self._line))
            self._line += block.count(b"\n", done)
        self.size += len(block)

    def ranges(self, file: str) -> list[ByteRange]:
        ends = [start for start, _ in self._starts[1:]] + [self.size]
        return [
            ByteRange(file, start, end, line, end - start)
            for (start, line), end in zip(self._starts, ends, strict=True)
            if end > start
        ]


def _row_group_ranges(file: str, stream: IO[bytes], range_bytes: int | None) -> list[RowGroupRange]:
    metadata = open_parquet(file, WatchedFile(stream)).metadata
    ranges: list[RowGroupRange] = []
    start, stored, first_row, row = 0, 0, 1, 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        # (Asked for a column's own size, pyarrow ends the whole process where the file's metadata is damaged.)
        stored += group.total_byte_size
        row += group.num_rows
        is_last = number + 1 == metadata.num_row_groups
        if is_last or (range_bytes is not None and stored >= range_bytes):
            ranges.append(RowGroupRange(file, start, number + 1, first_row, stored))
            start, stored, first_row = number + 1, 0, row
    return ranges

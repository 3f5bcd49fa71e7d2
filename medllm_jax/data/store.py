"""The row store: packed rows of either kind, as one folder, local or gs://.

* ``rows``        zarr3 array int32 [N, 3, S]; channels tokens, segment_ids, branch_ids (see ``batch.py``). A shard
                  holds many rows; each row is compressed and carries a crc32c, so it is read alone and verified.
* ``store.json``  what the rows are (``StoreMetadata``), written last: a folder without it is not a store.
* ``reference/``  log-probabilities of pairs under a reference model (see ``preferences.py``).
"""

import contextlib
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tensorstore as ts
from etils import epath

from medllm_jax.data.batch import Kind
from medllm_jax.errors import UserError
from medllm_jax.remote import is_remote

FORMAT_VERSION = 1

_SHARD_BYTES = (
    64 * 2**20
)  # of uncompressed rows: what the writer holds in memory, once being filled and once being written
_MAX_SHARD_ROWS = 4096
_CACHE_BYTES = 256 * 2**20  # mostly shard indices: 16 bytes a row


@dataclasses.dataclass(frozen=True)
class StoreMetadata:
    """What ``store.json`` says of the rows.

    kind: "cpt" or "pairs"; examples: documents or pairs in the store; tokens: without padding;
    fill: tokens / (rows * sequence_length); pairs_per_row: the most that any row holds, 0 for documents;
    split_documents: documents longer than a row, which were cut; digest: sha256 over the rows' little-endian bytes in
    order; dropped: reason -> {"count": int, "first": ["file:line", ...]}.
    """

    kind: Kind
    sequence_length: int
    rows: int
    tokens: int
    fill: float
    examples: int
    split_documents: int
    pairs_per_row: int
    packing: str
    max_token_id: int
    vocab_size: int
    tokenizer_fingerprint: str
    eos_token_id: int | None
    digest: str
    dropped: dict[str, dict[str, Any]]
    format_version: int = FORMAT_VERSION


def kvstore_spec(path: epath.Path) -> dict[str, str]:
    """The TensorStore kvstore of a folder; UserError for a scheme other than a local path or gs://."""
    text = str(path)
    if text.startswith("gs://"):
        bucket, _, key = text.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{key.rstrip('/')}/"}
    if is_remote(path):
        raise UserError(f"{text}: stores live in a local folder or under gs://")
    return {"driver": "file", "path": f"{Path(text).resolve()}/"}


class RowStore:
    """A complete store, open for reading; safe to share between threads, and to pickle (it reopens itself)."""

    def __init__(self, path: epath.Path, metadata: StoreMetadata):
        self.path = path
        self.metadata = metadata
        self._array: ts.TensorStore | None = None

    @classmethod
    def open(cls, path: str | epath.PathLike) -> Self:
        """Opens a store; UserError where it is missing, incomplete, of another format, or not what store.json says."""
        path = epath.Path(path)
        store = cls(path, _read_metadata(path))
        expected = (store.metadata.rows, 3, store.metadata.sequence_length)
        try:
            found, dtype = tuple(store._rows().shape), store._rows().dtype
        except ValueError as error:
            raise UserError(f"the rows of store {path} cannot be opened: {_first_line(error)}") from error
        if found != expected or dtype != ts.int32:
            raise UserError(
                f"store {path} is damaged: its rows are {dtype.name} {list(found)}, "
                f"store.json says int32 {list(expected)}"
            )
        return store

    def __len__(self) -> int:
        return self.metadata.rows

    def __repr__(self) -> str:
        return f"RowStore({self.path}, {self.metadata.kind}, {len(self)} rows of {self.metadata.sequence_length})"

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows int32 [n, 3, S] at the given indices, in that order, repeats allowed.

        Raises IndexError out of range, and UserError naming the row where stored data is missing or damaged.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size == 0:
            return np.zeros((0, 3, self.metadata.sequence_length), np.int32)
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {self!r}")
        try:
            return self._rows()[indices].read().result()
        except ValueError as error:
            self._raise_for_row(indices, error)
            raise

    def _raise_for_row(self, indices: np.ndarray, error: ValueError) -> None:
        """Reads the rows of a failed read one by one, to name the first one that cannot be read."""
        for index in indices:
            try:
                self._rows()[int(index)].read().result()
            except ValueError as row_error:
                raise UserError(
                    f"row {index} of store {self.path} is damaged or missing; copy the store again or prepare it again "
                    f"({_first_line(row_error)})"
                ) from error

    def _rows(self) -> ts.TensorStore:
        if self._array is None:
            spec = {
                "driver": "zarr3",
                "kvstore": kvstore_spec(self.path / "rows"),
                "recheck_cached_metadata": "open",
                "recheck_cached_data": False,  # rows never change once store.json stands
                "fill_missing_data_reads": False,  # a lost shard must not read as rows of padding
            }
            # A context of its own: a store that is replaced and opened again must not find the old rows in a cache.
            context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
            self._array = ts.open(spec, open=True, read=True, context=context).result()
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None}  # an open handle does not travel to another process


def _read_metadata(path: epath.Path) -> StoreMetadata:
    file = path / "store.json"
    if not path.is_dir():
        raise UserError(f"no store at {path}: make one with `medllm data`")
    if not file.exists():
        raise UserError(
            f"{path} is not a complete store: it has no store.json, which is written last; prepare it again"
        )
    try:
        content = json.loads(file.read_bytes())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"store {path} has format version {version}, this program reads {FORMAT_VERSION}: prepare it again"
            )
        return StoreMetadata(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be understood ({_first_line(error)}): prepare the store again") from error


def check_compatible(
    store: RowStore,
    *,
    kind: Kind,
    vocab_size: int,
    sequence_length: int | None = None,
    tokenizer_fingerprint: str | None = None,
) -> None:
    """UserError, one line with every mismatch, where a store does not fit a run; a check that is None is left out.

    kind: what the run trains on; vocab_size: rows of the model's embedding table.
    """
    found = store.metadata
    problems = []
    if found.kind != kind:
        problems.append(f"store {store.path} holds {found.kind} rows, the run needs {kind}")
    if found.max_token_id >= vocab_size:
        problems.append(
            f"token id {found.max_token_id} is beyond the model's vocabulary of {vocab_size} in store {store.path}: "
            "prepare the store with the model's own tokenizer"
        )
    if sequence_length is not None and found.sequence_length != sequence_length:
        problems.append(
            f"store {store.path} has rows of {found.sequence_length} tokens, the run is set to {sequence_length}: "
            "change the run's sequence length or prepare the store again"
        )
    if tokenizer_fingerprint is not None and found.tokenizer_fingerprint != tokenizer_fingerprint:
        problems.append(
            f"store {store.path} was made with another tokenizer ({found.tokenizer_fingerprint[:12]}) than the model's "
            f"({tokenizer_fingerprint[:12]}): prepare the store again"
        )
    if problems:
        raise UserError("; ".join(problems))


class RowStoreWriter:
    """Writes a store, used as a context manager: ``append`` rows, then ``finish``; leaving without it removes all.

    A local store is written beside its place and renamed; one in object storage counts once its store.json is written.

    Raises UserError where ``output`` exists, unless it is a store and ``overwrite`` is set. What is left of a
    store that was never finished is replaced without asking.
    """

    def __init__(self, output: str | epath.PathLike, kind: Kind, sequence_length: int, *, overwrite: bool = False):
        self.path = epath.Path(output)
        self.kind: Kind = kind
        self.sequence_length = sequence_length
        self._overwrite = overwrite
        _check_replaceable(self.path, overwrite)
        if is_remote(self.path):
            self._folder = self.path
        else:
            self.path = epath.Path(Path(self.path).resolve())
            self._folder = self.path.parent / f".{self.path.name}.unfinished-{uuid.uuid4().hex[:8]}"
        self._shard_rows = max(1, min(_MAX_SHARD_ROWS, _SHARD_BYTES // (3 * 4 * sequence_length)))
        self._array: ts.TensorStore | None = None
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        self._written = 0
        self._pending: ts.Future | None = None
        self._digest = hashlib.sha256()
        self._tokens = 0
        self._max_token_id = 0
        self._max_segments = 0
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._finished:
            return
        if self._pending is not None:
            with contextlib.suppress(ValueError):  # the error that ends the writer is the one to report
                self._pending.result()
        if self._array is not None:
            _remove_store(self._folder)

    def append(self, rows: np.ndarray) -> None:
        """Adds rows int32 [n, 3, S]."""
        if rows.ndim != 3 or rows.shape[1:] != (3, self.sequence_length) or rows.dtype != np.int32:
            raise ValueError(f"rows are {rows.dtype} {rows.shape}, expected int32 [n, 3, {self.sequence_length}]")
        if not len(rows):
            return
        self._digest.update(np.ascontiguousarray(rows, "<i4").tobytes())
        self._tokens += int(np.count_nonzero(rows[:, 1]))
        self._max_token_id = max(self._max_token_id, int(rows[:, 0].max()))
        self._max_segments = max(self._max_segments, int(rows[:, 1].max()))
        self._buffer.append(rows)
        self._buffered += len(rows)
        if self._buffered >= self._shard_rows:
            rows = np.concatenate(self._buffer)
            while len(rows) >= self._shard_rows:
                self._write(rows[: self._shard_rows])
                rows = rows[self._shard_rows :]
            self._buffer, self._buffered = [rows], len(rows)

    def finish(
        self,
        *,
        examples: int,
        packing: str,
        vocab_size: int,
        tokenizer_fingerprint: str,
        eos_token_id: int | None,
        split_documents: int = 0,
        dropped: Mapping[str, dict[str, Any]] | None = None,
    ) -> StoreMetadata:
        """Writes what is left and then store.json, and puts the store in its place. ValueError without any row."""
        if self._buffered:
            self._write(np.concatenate(self._buffer))
            self._buffer, self._buffered = [], 0
        if self._array is None or self._pending is None:
            raise ValueError("a store needs at least one row")
        self._pending.result()
        rows = self._written
        self._array.resize(exclusive_max=[rows, 3, self.sequence_length], shrink_only=True).result()
        metadata = StoreMetadata(
            kind=self.kind,
            sequence_length=self.sequence_length,
            rows=rows,
            tokens=self._tokens,
            fill=self._tokens / (rows * self.sequence_length),
            examples=examples,
            split_documents=split_documents,
            pairs_per_row=self._max_segments if self.kind == "pairs" else 0,
            packing=packing,
            max_token_id=self._max_token_id,
            vocab_size=vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint,
            eos_token_id=eos_token_id,
            digest=self._digest.hexdigest(),
            dropped=dict(dropped or {}),
        )
        (self._folder / "store.json").write_text(
            json.dumps(dataclasses.asdict(metadata), indent=2, sort_keys=True) + "\n"
        )
        if self._folder != self.path:
            _check_replaceable(self.path, self._overwrite)  # again: another writer may have finished meanwhile
            _remove_store(self.path)
            self._folder.rename(self.path)
        self._finished = True
        return metadata

    def _write(self, rows: np.ndarray) -> None:
        """Starts writing one whole shard (or the last, shorter one), after the one before has been written."""
        if self._array is None:
            if is_remote(self._folder):
                _remove_store(self._folder)
            self._array = self._create()
        if self._pending is not None:
            self._pending.result()
        end = self._written + len(rows)
        if end > self._array.shape[0]:
            # Doubling keeps the number of times that the array's metadata is rewritten small.
            shape = [2 * self._array.shape[0], 3, self.sequence_length]
            self._array = self._array.resize(exclusive_max=shape, expand_only=True).result()
        self._pending = self._array[self._written : end].write(rows)
        self._written = end

    def _create(self) -> ts.TensorStore:
        little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        checksum = {"name": "crc32c"}
        compression = {"name": "zstd", "configuration": {"level": 3}}
        sharding = {
            "chunk_shape": [1, 3, self.sequence_length],
            "codecs": [little_endian, compression, checksum],
            "index_codecs": [little_endian, checksum],
        }
        shard_shape = [self._shard_rows, 3, self.sequence_length]
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore_spec(self._folder / "rows"),
            "metadata": {
                "shape": shard_shape,
                "data_type": "int32",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "fill_value": 0,
                "dimension_names": ["row", "channel", "token"],
            },
        }
        return ts.open(spec, create=True).result()


def _check_replaceable(path: epath.Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} exists and is a file: give a folder for the store")
    entries = {entry.name for entry in path.iterdir()}
    if "store.json" in entries:
        if not overwrite:
            raise UserError(f"store {path} exists: give another output, or ask for it to be overwritten")
    elif not entries <= {"rows"}:
        raise UserError(f"{path} exists and is not a store: give another output")


def _remove_store(path: epath.Path) -> None:
    """Removes a store; its store.json goes first, so that what is left of an interrupted removal is not a store."""
    (path / "store.json").unlink(missing_ok=True)
    if path.exists():
        path.rmtree()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

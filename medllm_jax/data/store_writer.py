"""Writing a store: shard by shard; it is there whole or not at all."""

import contextlib
import dataclasses
import hashlib
import io
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import tensorstore as ts
from etils import epath

from medllm_jax.data.batch import Kind
from medllm_jax.data.runs import mark
from medllm_jax.data.store import (
    ARRAY,
    ARRAY_METADATA,
    METADATA_FILE,
    TOKENS_PER_ROW,
    CorpusRows,
    StoreMetadata,
)
from medllm_jax.errors import UserError
from medllm_jax.storage.remote import is_folder, is_remote, kvstore_spec, remove_folder

# Uncompressed rows of a shard. The writer holds two in memory: one is filled while the other is written.
_SHARD_BYTES = 64 * 2**20
_MAX_SHARD_ROWS = 4096
_TOGETHER_BYTES = 2 * 2**20  # of appended rows; rows come one by one, and what is done with one costs as with many


@dataclasses.dataclass(frozen=True)
class CorpusFacts:
    """What must be told of a corpus beside its rows (see ``store.CorpusRows``)."""

    examples: int
    split_documents: int = 0
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class RowStoreWriter:
    """Writes a store, used as a context manager: ``append`` rows, then ``finish``.

    Leaving the context without ``finish`` removes all that was written. A local store is written beside its place and
    renamed; one in object storage counts once its store.json is written.

    Raises UserError where ``output`` exists, unless it is a store and ``overwrite`` is set. The remains of a store that
    was never finished are replaced without asking.
    """

    def __init__(self, output: str | epath.PathLike, kind: Kind, sequence_length: int, *, overwrite: bool = False):
        self.path = epath.Path(output)
        self.kind: Kind = kind
        self.sequence_length = sequence_length
        self._overwrite = overwrite
        check_replaceable(self.path, overwrite=overwrite)
        if is_remote(self.path):
            self._folder = self.path
        else:
            self.path = epath.Path(Path(self.path).resolve())
            self._folder = self.path.parent / f".{self.path.name}.unfinished-{uuid.uuid4().hex[:8]}"
        self._shard_rows = max(1, min(_MAX_SHARD_ROWS, _SHARD_BYTES // (4 * sequence_length)))
        self._waiting: list[np.ndarray] = []  # appended, and soon to be marked together
        self._together = max(1, min(self._shard_rows, _TOGETHER_BYTES // (3 * 4 * sequence_length)))
        self._array: ts.TensorStore | None = None
        self._shard = self._new_shard()  # the one being filled, and its rows so far
        self._filled = 0
        self._written = 0
        self._pending: ts.WriteFutures | None = None
        self._digest = hashlib.sha256()
        self._corpora: dict[str, list[np.ndarray]] = {}  # name -> tokens of each of its rows
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

    def append(self, rows: np.ndarray, corpus: str) -> None:
        """Adds rows int32 [n, 3, S] of a corpus; all rows of one corpus come one after the other.

        The rows must not change afterwards. ValueError for rows that no packing makes (see ``runs.mark``).
        """
        if rows.ndim != 3 or rows.shape[1:] != (3, self.sequence_length) or rows.dtype != np.int32:
            raise ValueError(f"rows are {rows.dtype} {rows.shape}, expected int32 [n, 3, {self.sequence_length}]")
        if corpus in self._corpora and corpus != next(reversed(self._corpora)):
            raise ValueError(f"rows of corpus {corpus} after those of another")
        if corpus not in self._corpora and self._waiting:
            self._add_waiting()
        if not len(rows):
            return
        self._corpora.setdefault(corpus, [])
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= self._together:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Puts the rows that wait, which are of the newest corpus, into the shard."""
        rows = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        self._waiting.clear()
        marked = mark(rows)
        self._digest.update(np.ascontiguousarray(rows, "<i4").tobytes())
        self._corpora[next(reversed(self._corpora))].append(np.count_nonzero(rows[:, 1], axis=-1).astype(np.int32))
        self._max_token_id = max(self._max_token_id, int(rows[:, 0].max()))
        self._max_segments = max(self._max_segments, int(rows[:, 1].max()))
        while len(marked):
            part = marked[: self._shard_rows - self._filled]
            self._shard[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            marked = marked[len(part) :]
            if self._filled == self._shard_rows:
                self._write()

    def _new_shard(self) -> np.ndarray:
        return np.empty((self._shard_rows, self.sequence_length), np.int32)  # takes memory as it is filled

    def finish(
        self,
        corpora: Mapping[str, CorpusFacts],
        *,
        packing: str,
        vocab_size: int,
        tokenizer_fingerprint: str,
        eos_token_id: int | None,
        dropped: Mapping[str, Mapping[str, Any]] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> StoreMetadata:
        """Writes the last rows and then store.json, and puts the store in its place.

        corpora: in the order of their rows; a corpus may have no rows. ValueError where the store would have none.
        """
        if self._waiting:
            self._add_waiting()
        if self._filled:
            self._write()
        if self._array is None or self._pending is None:
            raise ValueError("a store needs at least one row")
        if [name for name in corpora if name in self._corpora] != list(self._corpora):
            raise ValueError(f"rows are of {list(self._corpora)}, facts are of {list(corpora)}")
        self._pending.result()
        rows = self._written
        self._array.resize(exclusive_max=[rows, self.sequence_length], shrink_only=True).result()
        tokens_per_row = np.concatenate([part for parts in self._corpora.values() for part in parts])
        buffer = io.BytesIO()
        np.save(buffer, tokens_per_row)
        (self._folder / TOKENS_PER_ROW).write_bytes(buffer.getvalue())
        tokens = int(tokens_per_row.sum(dtype=np.int64))
        metadata = StoreMetadata(
            kind=self.kind,
            sequence_length=self.sequence_length,
            rows=rows,
            tokens=tokens,
            fill=tokens / (rows * self.sequence_length),
            corpora=tuple(self._corpus_rows(corpora)),
            pairs_per_row=(self._max_segments + 1) // 2 if self.kind != "cpt" else 0,
            packing=packing,
            shard_rows=self._shard_rows,
            max_token_id=self._max_token_id,
            vocab_size=vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint,
            eos_token_id=eos_token_id,
            digest=self._digest.hexdigest(),
            files={
                TOKENS_PER_ROW: hashlib.sha256(buffer.getvalue()).hexdigest(),
                ARRAY_METADATA: hashlib.sha256((self._folder / ARRAY_METADATA).read_bytes()).hexdigest(),
            },
            dropped=dict(dropped or {}),
            recipe=dict(recipe or {}),
        )
        text = metadata.to_json()
        (self._folder / METADATA_FILE).write_text(text)
        if self._folder != self.path:
            check_replaceable(self.path, overwrite=self._overwrite)  # again: another writer may have finished meanwhile
            _remove_store(self.path)
            self._folder.rename(self.path)
        self._finished = True
        return StoreMetadata.from_json(text.encode(), str(self.path / METADATA_FILE))  # as every reader will see it

    def _corpus_rows(self, corpora: Mapping[str, CorpusFacts]):
        first = 0
        for name, facts in corpora.items():
            parts = self._corpora.get(name, [])
            rows, tokens = sum(map(len, parts)), sum(int(part.sum(dtype=np.int64)) for part in parts)
            yield CorpusRows(name, first, rows, tokens, facts.examples, facts.split_documents, dict(facts.manifest))
            first += rows

    def _write(self) -> None:
        """Starts writing the full shard (or the last, shorter one), once the one before it is written."""
        if self._array is None:
            if is_remote(self._folder):
                _remove_store(self._folder)
            self._array = self._create()
        if self._pending is not None:
            self._pending.result()
        end = self._written + self._filled
        if end > self._array.shape[0]:
            # Doubling keeps the number of times that the array's metadata is rewritten small.
            shape = [2 * self._array.shape[0], self.sequence_length]
            self._array = self._array.resize(exclusive_max=shape, expand_only=True).result()
        # The shard never changes again, so it need not be copied before it is compressed.
        rows, self._shard, self._filled = self._shard[: self._filled], self._new_shard(), 0
        self._pending = self._array[self._written : end].write(rows, can_reference_source_data_indefinitely=True)
        self._written = end

    def _create(self) -> ts.TensorStore:
        little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        checksum = {"name": "crc32c"}
        # Bytes of one significance are put together: rows are then smaller than by zstd without that, and unpacking
        # costs next to nothing.
        blosc = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 4}
        compression = {"name": "blosc", "configuration": blosc}
        sharding = {
            "chunk_shape": [1, self.sequence_length],
            "codecs": [little_endian, compression, checksum],
            "index_codecs": [little_endian, checksum],
        }
        shard_shape = [self._shard_rows, self.sequence_length]
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore_spec(self._folder / ARRAY),
            "metadata": {
                "shape": shard_shape,
                "data_type": "int32",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "fill_value": 0,
                "dimension_names": ["row", "token"],
            },
        }
        # (open=True: a repeated request, after an answer that was lost, is no error.)
        return ts.open(spec, open=True, create=True).result()


def check_replaceable(path: epath.Path, *, overwrite: bool) -> None:
    """UserError where there is something at an output that must not be replaced."""
    if not path.exists():
        return
    if not is_folder(path):
        raise UserError(f"{path} exists and is a file: give a folder for the store")
    entries = {entry.name for entry in path.iterdir()}
    if METADATA_FILE in entries:
        if not overwrite:
            raise UserError(f"store {path} exists: give another output, or replace it with --overwrite")
    elif not entries <= {ARRAY, TOKENS_PER_ROW}:
        raise UserError(f"{path} exists and is not a store: give another output")


def _remove_store(path: epath.Path) -> None:
    """Removes a store; its store.json goes first, so that the remains of an interrupted removal are not a store."""
    (path / METADATA_FILE).unlink(missing_ok=True)
    remove_folder(path)

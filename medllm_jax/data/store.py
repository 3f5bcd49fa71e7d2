"""The row store: a folder of packed rows, local or gs://, and how it is read.

* ``rows``                zarr3 array int32 [N, S] of marked rows: tokens that say by themselves where segments and
                          branches begin (see ``runs.py``). A shard (a file) holds many rows; each row is compressed
                          and carries a crc32c, so it is read alone and verified. In format 3 it is int32 [N, 3, S],
                          channels tokens, segment_ids, branch_ids.
* ``tokens_per_row.npy``  int32 [N]: tokens of each row without padding.
* ``store.json``          what the rows are (``StoreMetadata``), written last: a folder without it is not a store.
* ``reference/``          log-probabilities of pairs under a reference model (see ``reference_log_probs.py``).

Every byte is checked: rows and shard indices have a crc32c each, store.json has hashes of the two other files of the
array, and a checksum of itself.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import tensorstore as ts
from etils import epath

from medllm_jax.config.schema_reader import build
from medllm_jax.data.batch import Kind
from medllm_jax.data.runs import channels, mark
from medllm_jax.data.tokenizer import same_tokenizer
from medllm_jax.errors import UserError
from medllm_jax.storage.faults import passes, words_of
from medllm_jax.storage.json_files import parse_json, read_bounded
from medllm_jax.storage.remote import is_folder, kvstore_spec

FORMAT_VERSION = 4
READ_VERSIONS = (3, 4)
METADATA_FILE = "store.json"
ARRAY = "rows"
ARRAY_METADATA = "rows/zarr.json"
TOKENS_PER_ROW = "tokens_per_row.npy"

_MAX_METADATA_BYTES = 2**30  # the manifest has a line for each file of the input

_VERIFIED_BYTES = 64 * 2**20  # of rows that are verified together

_COPY_AGAIN = "copy the store again or prepare it again"


@dataclasses.dataclass(frozen=True)
class CorpusRows:
    """A corpus in a store: rows ``first_row`` to ``first_row + rows``; they hold no other corpus.

    examples: documents or pairs; split_documents: documents longer than a row, which were cut; tokens: without padding;
    manifest: where it comes from and what was done to it (see ``prepare/corpus.py``).
    """

    name: str
    first_row: int
    rows: int
    tokens: int
    examples: int
    split_documents: int
    manifest: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class StoreMetadata:
    """The content of ``store.json``: what the rows are.

    kind: "cpt", "sft" or "pairs"; corpora: in the order of their rows; tokens: without padding;
    fill: tokens / (rows * sequence_length); pairs_per_row: the most pairs, or conversations, of a row, 0 for documents;
    shard_rows: rows in a shard; digest: sha256 over the little-endian bytes of the rows int32 [N, 3, S] in order, which
    is the same in every format;
    files: name -> sha256 of the files beside the shards; recipe: the settings that the rows were prepared with;
    dropped: reason -> {"count": int, "first": ["file:line", ...]}.
    """

    kind: Kind
    sequence_length: int
    rows: int
    tokens: int
    fill: float
    corpora: tuple[CorpusRows, ...]
    pairs_per_row: int
    packing: str
    shard_rows: int
    max_token_id: int
    vocab_size: int
    tokenizer_fingerprint: str
    eos_token_id: int | None
    digest: str
    files: Mapping[str, str]
    dropped: Mapping[str, Mapping[str, Any]]
    recipe: Mapping[str, Any]
    format_version: int = FORMAT_VERSION

    @property
    def examples(self) -> int:
        """Documents or pairs of all corpora."""
        return sum(corpus.examples for corpus in self.corpora)

    @property
    def split_documents(self) -> int:
        return sum(corpus.split_documents for corpus in self.corpora)

    def to_json(self) -> str:
        """The text of store.json, its checksum with it."""
        content = dataclasses.asdict(self)
        return json.dumps(content | {"checksum": _checksum(content)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, data: bytes, where: str = METADATA_FILE) -> Self:
        """Raises UserError where the text is not what ``to_json`` writes; where: its file."""
        content = parse_json(data, where)
        version = content.get("format_version")
        if version not in READ_VERSIONS:
            raise UserError(
                f"{where} has format version {str(version)[:20]}, this program reads "
                f"{' and '.join(map(str, READ_VERSIONS))}: prepare the store again"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise UserError(f"{where} cannot be understood (its checksum differs): {_COPY_AGAIN}")
        return build(cls, content, where)

    def __post_init__(self) -> None:
        """Raises UserError for numbers that no store has, or that contradict each other."""
        smallest = {"rows": 1, "sequence_length": 2, "shard_rows": 1, "vocab_size": 1}
        smallest |= {"tokens": 0, "pairs_per_row": 0, "max_token_id": 0}
        for name, least in smallest.items():
            if not least <= getattr(self, name) < 2**48:
                raise UserError(f"{name} is {getattr(self, name)}")
        first = 0
        for corpus in self.corpora:
            if (
                corpus.first_row != first
                or min(corpus.rows, corpus.tokens, corpus.examples, corpus.split_documents) < 0
            ):
                raise UserError(f"the rows of corpus {corpus.name[:60]!r} are not those that follow the corpus before")
            first += corpus.rows
        if first != self.rows or sum(corpus.tokens for corpus in self.corpora) != self.tokens:
            raise UserError("rows and tokens are not the sums of those of the corpora")
        if not 0 < self.tokens <= self.rows * self.sequence_length:
            raise UserError(f"{self.tokens} tokens are not what {self.rows} rows of {self.sequence_length} can hold")
        if not {ARRAY_METADATA, TOKENS_PER_ROW} <= self.files.keys():
            raise UserError("files lacks the hashes of the array's files")


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class RowStore:
    """A complete store, open for reading; safe to share between threads, and to pickle (it reopens itself)."""

    def __init__(self, path: epath.Path, metadata: StoreMetadata):
        self.path = path
        self.metadata = metadata
        self._array: ts.TensorStore | None = None

    @classmethod
    def open(cls, path: str | epath.PathLike) -> Self:
        """Opens a store; UserError where it is missing, incomplete, of another format, or unlike its store.json."""
        path = epath.Path(path)
        store = cls(path, _read_metadata(path))
        store._file(ARRAY_METADATA)
        try:
            store._rows()
        except ValueError as error:
            if passes(error):
                raise
            raise UserError(
                f"the array of store {path} cannot be opened ({_first_line(error)}); {_COPY_AGAIN}"
            ) from error
        expected = (store.metadata.rows, *store._row_shape)
        found, dtype = tuple(store._rows().shape), store._rows().dtype
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

    @property
    def _row_shape(self) -> tuple[int, ...]:
        length = self.metadata.sequence_length
        return (3, length) if self.metadata.format_version == 3 else (length,)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows int32 [n, 3, S] (channels tokens, segment_ids, branch_ids), as ``read_marked`` reads them."""
        stored = self._read(indices)
        return stored if self.metadata.format_version == 3 else channels(stored)

    def read_marked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Marked rows int32 [n, S] (see ``runs.py``) at the given indices, in that order, repeats allowed.

        Raises IndexError out of range, UserError naming store, shard and row where stored data is missing or damaged,
        and storage's own error where that cannot be reached.
        """
        stored = self._read(indices)
        return mark(stored) if self.metadata.format_version == 3 else stored

    def _read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        if indices.size == 0:
            return np.zeros((0, *self._row_shape), np.int32)
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {self!r}")
        try:
            return self._rows()[indices].read(order="C").result()
        except ValueError as error:
            problem = next(self.problems(indices), None)
            raise (error if problem is None else UserError(problem)) from error

    def problems(self, indices: Sequence[int] | np.ndarray) -> Iterator[str]:
        """What is wrong with each row that cannot be read, read one by one; storage's own error as for ``read``."""
        for index in map(int, indices):
            try:
                self._rows()[index].read().result()
            except ValueError as error:
                if passes(error):  # it says nothing about the row
                    raise
                reason = _first_line(error)
                yield (
                    f"row {index} of store {self.path} is damaged or missing (shard {self.shard_of(index)}); "
                    f"{_COPY_AGAIN} ({reason})"
                )

    def shard_of(self, row: int) -> str:
        """The file, relative to the store, that holds a row."""
        return "/".join((ARRAY, "c", str(row // self.metadata.shard_rows), *"0" * len(self._row_shape)))

    @functools.cached_property
    def tokens_per_row(self) -> np.ndarray:
        """int32 [N]: tokens of each row without padding. UserError where the file is missing or damaged."""
        tokens = array_of(self._file(TOKENS_PER_ROW), (len(self),), np.int32)
        if tokens is None or tokens.min() < 0 or tokens.sum(dtype=np.int64) != self.metadata.tokens:
            raise UserError(f"{TOKENS_PER_ROW} of store {self.path} is not what store.json says; {_COPY_AGAIN}")
        return tokens

    def _file(self, name: str) -> bytes:
        """The content of one of the files that store.json binds by a hash."""
        try:
            data = (self.path / name).read_bytes()
        except FileNotFoundError:
            raise UserError(f"store {self.path} has lost its {name}; {_COPY_AGAIN}") from None
        if hashlib.sha256(data).hexdigest() != self.metadata.files[name]:
            raise UserError(f"{name} of store {self.path} is damaged; {_COPY_AGAIN}")
        return data

    def _rows(self) -> ts.TensorStore:
        if self._array is None:
            spec = {
                "driver": "zarr3",
                "kvstore": kvstore_spec(self.path / ARRAY),
                "recheck_cached_metadata": "open",
                "recheck_cached_data": False,  # rows never change once store.json is written
                "fill_missing_data_reads": False,  # a lost shard must not read as rows of padding
            }
            # A context of its own: a store that is replaced and opened again must not find the old rows in a cache.
            context = ts.Context({"cache_pool": {"total_bytes_limit": self._cache_bytes()}})
            self._array = ts.open(spec, open=True, read=True, context=context).result()
        return self._array

    def _cache_bytes(self) -> int:
        """Enough that a shard's index (16 bytes a row) is still there when the next of its rows is read.

        No more: in a larger cache rows that will not be read for long take fresh memory, at twice the time of a read.
        """
        rows, row_bytes = len(self), 4 * math.prod(self._row_shape)
        shards = -(-rows // self.metadata.shard_rows)
        return 2 * (16 * rows + shards * row_bytes) + 16 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None}  # an open handle does not travel to another process


def _read_metadata(path: epath.Path) -> StoreMetadata:
    file = path / METADATA_FILE
    if not is_folder(path):
        raise UserError(f"no store at {path}: make one with `medllm data`")
    if not file.exists():
        raise UserError(
            f"{path} is not a complete store: it has no store.json, which is written last; prepare it again"
        )
    return StoreMetadata.from_json(read_bounded(file, _MAX_METADATA_BYTES), str(file))


def array_of(data: bytes, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """The array in the bytes of a .npy file; None where it is not of this shape and type, before any is made."""
    try:
        stream = io.BytesIO(data)
        if np.lib.format.read_magic(stream) != (1, 0):
            return None
        if np.lib.format.read_array_header_1_0(stream) != (shape, False, np.dtype(dtype)):
            return None
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # of bytes in memory: whatever is raised, they are no such array
        return None


def verify(path: str | epath.PathLike, progress: Callable[[int], None] = lambda rows: None) -> RowStore:
    """Reads all of a store against its checksums; progress is called with the rows read so far.

    Raises UserError naming the store, what is wrong with the first row that is damaged or missing, and other such rows.
    """
    store = RowStore.open(path)
    digest, damaged, max_token_id = hashlib.sha256(), [], 0
    tokens = np.zeros(len(store), np.int64)
    together = max(1, min(store.metadata.shard_rows, _VERIFIED_BYTES // (3 * 4 * store.metadata.sequence_length)))
    for start in range(0, len(store), together):
        indices = np.arange(start, min(start + together, len(store)))
        try:
            rows = store.read(indices)
        except UserError:
            damaged += [(row, problem) for row in indices.tolist() for problem in store.problems([row])]
        else:
            digest.update(np.ascontiguousarray(rows, "<i4").tobytes())
            max_token_id = max(max_token_id, int(rows[:, 0].max()))
            tokens[indices] = np.count_nonzero(rows[:, 1], axis=-1)
        progress(int(indices[-1]) + 1)
    if damaged:
        others = [str(row) for row, _ in damaged[1:]]
        more = f"; so are {len(others)} more rows: {', '.join(others[:10])}{', ...' * (len(others) > 10)}"
        raise UserError(damaged[0][1] + (more if others else ""))
    described = (store.metadata.digest, store.metadata.max_token_id)
    if (digest.hexdigest(), max_token_id) != described or not np.array_equal(tokens, store.tokens_per_row):
        raise UserError(f"the rows of store {path} are whole, and not those that store.json describes; {_COPY_AGAIN}")
    return store


def check_compatible(
    store: RowStore,
    *,
    kinds: Collection[Kind],
    vocab_size: int,
    sequence_length: int | None = None,
    tokenizer_fingerprint: str | None = None,
) -> None:
    """UserError, one line with every mismatch, where a store does not fit a run; a check that is None is left out.

    kinds: those that the run can train on; vocab_size: rows of the model's embedding table.
    """
    found = store.metadata
    problems = []
    if found.kind not in kinds:
        problems.append(f"store {store.path} holds {found.kind} rows, the run needs {' or '.join(kinds)}")
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
    if tokenizer_fingerprint is not None and not same_tokenizer(found.tokenizer_fingerprint, tokenizer_fingerprint):
        problems.append(
            f"store {store.path} was made with another tokenizer ({found.tokenizer_fingerprint[:12]}) than the model's "
            f"({tokenizer_fingerprint[:12]}): prepare the store again"
        )
    if problems:
        raise UserError("; ".join(problems))


def _first_line(error: Exception) -> str:
    return words_of(error) or type(error).__name__

"""One or more stores as one sequence of rows, and how much of it a run has seen."""

import dataclasses
import functools
import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from etils import epath

from medllm_jax.data.batch import Kind
from medllm_jax.data.store import CorpusRows, RowStore
from medllm_jax.data.tokenizer import same_tokenizer
from medllm_jax.errors import UserError


class Rows:
    """The rows of all stores, one store after the other; a row's id is its place among them.

    corpora: those of all stores in order, ``first_row`` a row id. Safe to share between threads, and to pickle.

    Raises UserError where the stores differ in kind, sequence length or tokenizer, or have a corpus of the same name.
    """

    def __init__(self, stores: Sequence[RowStore]):
        if not stores:
            raise UserError("no store is given: rows come from at least one")
        self.stores = tuple(stores)
        self._starts = np.cumsum([0, *map(len, stores)])  # the first row id of each store, then the number of rows
        self.corpora: tuple[CorpusRows, ...] = tuple(
            dataclasses.replace(corpus, first_row=int(start) + corpus.first_row)
            for store, start in zip(stores, self._starts, strict=False)
            for corpus in store.metadata.corpora
        )
        _check_alike(self.stores)

    @classmethod
    def open(cls, paths: Sequence[str | epath.PathLike]) -> Self:
        """Opens the stores at some paths; UserError as for ``RowStore.open`` and where they do not go together."""
        return cls([RowStore.open(path) for path in paths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __str__(self) -> str:
        return f"{'store' if len(self.stores) == 1 else 'stores'} {', '.join(str(s.path) for s in self.stores)}"

    @property
    def kind(self) -> Kind:
        """Of pairs and conversations together it is pairs: those are then pairs without a rejected response."""
        kinds = {store.metadata.kind for store in self.stores}
        return "pairs" if "pairs" in kinds else kinds.pop()

    @property
    def sequence_length(self) -> int:
        return self.stores[0].metadata.sequence_length

    @property
    def pairs_per_row(self) -> int:
        """The most that any row holds."""
        return max(store.metadata.pairs_per_row for store in self.stores)

    @property
    def max_token_id(self) -> int:
        return max(store.metadata.max_token_id for store in self.stores)

    @property
    def digest(self) -> str:
        """Of one store its own; of several the sha256 of theirs in order."""
        digests = [store.metadata.digest for store in self.stores]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @functools.cached_property
    def tokens_per_row(self) -> np.ndarray:
        """int32 [N]: tokens of each row without padding. UserError where a store's file of them is damaged."""
        return np.concatenate([store.tokens_per_row for store in self.stores])

    def read_marked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Marked rows int32 [n, S] of some row ids, in order, repeats allowed: one request to each store concerned.

        Raises as ``RowStore.read_marked`` does.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {len(self)} in {self}")
        if len(self.stores) == 1:  # mostly so: what it reads needs no copy
            return self.stores[0].read_marked(indices)
        rows = np.empty((len(indices), self.sequence_length), np.int32)
        of_store = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(of_store):
            here = of_store == number
            rows[here] = self.stores[number].read_marked(indices[here] - self._starts[number])
        return rows

    def split(self, values: np.ndarray) -> list[tuple[RowStore, np.ndarray]]:
        """Each store, and the part of an array [N, ...] that belongs to its rows."""
        return list(zip(self.stores, np.split(values, self._starts[1:-1]), strict=True))


def _check_alike(stores: Sequence[RowStore]) -> None:
    first, seen = stores[0], {}
    for store in stores:
        for name, what in (
            ("kind", "rows of another kind"),
            ("sequence_length", "rows of another length"),
            ("tokenizer_fingerprint", "another tokenizer"),
        ):
            one, other = getattr(first.metadata, name), getattr(store.metadata, name)
            alike = same_tokenizer if name == "tokenizer_fingerprint" else operator.eq
            if not alike(one, other) and {one, other} != {"pairs", "sft"}:
                raise UserError(
                    f"stores {first.path} and {store.path} do not go together: the second has {what} "
                    f"({_short(other)}, the first {_short(one)}); prepare them alike"
                )
        for corpus in store.metadata.corpora:
            if corpus.name in seen:
                raise UserError(
                    f"stores {seen[corpus.name]} and {store.path} both have a corpus {corpus.name}: "
                    "leave one store out, or prepare it under another name"
                )
            seen[corpus.name] = store.path


def _short(value: str | int) -> str:
    return str(value)[:12]  # of a fingerprint, as much as tells it apart


class Seen:
    """How much of each corpus a run has read since its first step, over all hosts.

    counts: those of an earlier part of the run, to go on from.
    """

    def __init__(self, rows: Rows, counts: Mapping[str, int] | None = None):
        self._keys = [f"{what}/{corpus.name}" for what in ("rows", "tokens") for corpus in rows.corpora]
        self._first_rows = [corpus.first_row for corpus in rows.corpora]
        self._tokens_per_row = rows.tokens_per_row
        self._totals = np.array([counts[key] if counts else 0 for key in self._keys], np.int64).reshape(2, -1)

    def add(self, row_ids: np.ndarray) -> None:
        """Counts the rows of a global batch."""
        corpus = np.searchsorted(self._first_rows, row_ids, side="right") - 1
        np.add.at(self._totals[0], corpus, 1)
        np.add.at(self._totals[1], corpus, self._tokens_per_row[row_ids])

    @property
    def counts(self) -> dict[str, int]:
        """``rows/NAME`` and ``tokens/NAME`` (without padding) of each corpus: what a checkpoint keeps."""
        return dict(zip(self._keys, self._totals.ravel().tolist(), strict=True))

    @property
    def epochs(self) -> float:
        """Rows read, as a share of the rows there are."""
        return int(self._totals[0].sum()) / len(self._tokens_per_row)

"""What is done to one unit of a corpus: taking inventory, surveying, tokenising. Each is a job (see ``stages.py``).

A unit is some slices of files. Surveying and tokenising read the same documents of it in the same order, so a document
is known by its number; between the two, the duplicates among all units are found.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from medllm_jax.data.prepare.dedup import EXACT, KEPT, NEAR, signatures, text_digests
from medllm_jax.data.prepare.normalize import Form, normalise
from medllm_jax.data.prepare.pii import Scanner
from medllm_jax.data.prepare.pii_gate import Findings, Gate
from medllm_jax.data.prepare.reading import (
    Document,
    Dropped,
    ReadOptions,
    Slice,
    read_documents,
    reject,
    take_inventory,
)
from medllm_jax.data.prepare.statistics import TextStatistics, TokenStatistics
from medllm_jax.data.tokenizer import byte_pieces, encode_plain, load_tokenizer
from medllm_jax.storage.remote import is_remote

# A batch ends at either: enough to keep the libraries busy, little enough to hold.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1_000_000

_DUPLICATE = {KEPT: None, EXACT: "the text of an earlier document", NEAR: "nearly the text of an earlier document"}


class File(NamedTuple):
    """A file as it was listed; its size and time tell whether an inventory is still true."""

    path: str
    bytes: int
    modified: float


class Unit(NamedTuple):
    """Slices that one worker reads, one after the other, and what is in their files (sha256)."""

    slices: tuple[Slice, ...]
    sha256: tuple[str, ...]
    reading: ReadOptions


class Chosen(NamedTuple):
    """A unit, and which of its documents are kept: uint8 [documents], 0 for those; no file keeps all."""

    unit: Unit
    decisions: str | None
    sha256: str | None


class TakeInventory(NamedTuple):
    """Files -> the sha256 of each, and the slices that it is read in."""

    slice_bytes: int
    name: str = "inventory"

    def identity(self, files: tuple[File, ...]) -> Any:
        return [self.slice_bytes, files]

    def __call__(self, files: tuple[File, ...], output: epath.Path) -> dict[str, Any]:
        return {"files": [take_inventory(file.path, self.slice_bytes)._asdict() for file in files]}


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """How a document becomes the text that is kept: normalised, and left out when it is then too short."""

    form: Form
    min_characters: int

    def identity(self) -> Any:
        return [self.form, self.min_characters, unicodedata.unidata_version]

    def documents(self, unit: Unit, dropped: Dropped) -> Iterator[Document]:
        """The documents of a unit, cleaned; the same in every pass."""
        for part in unit.slices:
            for text, where in read_documents(part, unit.reading, dropped):
                cleaned = normalise(text, self.form)
                if not cleaned:
                    reject(where, "text is empty", unit.reading.on_bad, dropped)
                elif len(cleaned) < self.min_characters:
                    dropped.add(f"shorter than {self.min_characters} characters", where)
                else:
                    yield Document(cleaned, where)


@dataclasses.dataclass(frozen=True)
class Survey:
    """Unit -> what must be known of all documents before any is written: personal data, and what tells duplicates.

    Beside the result: ``.digests.npy`` uint64 [documents, 2], and where near duplicates are looked for
    ``.signatures.npy`` uint32 [documents, 128].
    """

    cleaning: Cleaning
    scanner: Scanner
    near: bool
    name = "survey"

    def identity(self, unit: Unit) -> Any:
        return [self.cleaning.identity(), self.scanner.fingerprint, self.near, unit]

    def __call__(self, unit: Unit, output: epath.Path) -> dict[str, Any]:
        dropped, findings = Dropped(), Findings()
        digests, sketches = [text_digests([])], [signatures([])]
        for batch in batched(self.cleaning.documents(unit, dropped)):
            texts = [document.text for document in batch]
            digests.append(text_digests(texts))
            if self.near:
                sketches.append(signatures(texts))
            for text, where in batch:
                findings.add(self.scanner, (text,), where)
        save_array(output, "digests", np.concatenate(digests))
        if self.near:
            save_array(output, "signatures", np.concatenate(sketches))
        return {"dropped": dropped.as_dict(), "personal_data": findings.as_dict()}


@dataclasses.dataclass(frozen=True)
class Tokenise:
    """Unit -> its kept documents as tokens: ``.tokens``, int32 little-endian, one document after the other, and
    ``.lengths.npy`` int32 [documents]."""

    cleaning: Cleaning
    gate: Gate
    tokenizer: str
    fingerprint: str
    ending: tuple[int, ...]
    name = "tokens"

    def identity(self, task: Chosen) -> Any:
        masking = self.gate.scanner.fingerprint if self.gate.mode == "mask" else None
        return [self.cleaning.identity(), masking, self.fingerprint, self.ending, task.unit, task.sha256]

    def __call__(self, task: Chosen, output: epath.Path) -> dict[str, Any]:
        tokenizer, is_byte_piece = _tokenizer(self.tokenizer)
        text_statistics, token_statistics = TextStatistics(), TokenStatistics()
        lengths: list[int] = []
        dropped, digest = Dropped(), hashlib.sha256()
        with epath.Path(f"{output}.tokens").open("wb") as file:
            for batch in batched(self._kept(task, dropped)):
                texts = [document.text for document in batch]
                encoded = encode_plain(tokenizer, texts)
                sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
                tokens = np.fromiter(itertools.chain.from_iterable(encoded), "<i4", sizes.sum())
                text_statistics.add(texts)
                token_statistics.add(texts, tokens, sizes, is_byte_piece)
                ends = np.repeat(np.cumsum(sizes), len(self.ending))
                tokens = np.insert(tokens, ends, np.tile(np.array(self.ending, "<i4"), len(sizes)))
                file.write(tokens.data)
                digest.update(tokens.data)
                lengths += (sizes + len(self.ending)).tolist()
        save_array(output, "lengths", np.array(lengths, np.int32))
        return {
            "documents": len(lengths),
            "sha256": digest.hexdigest(),
            "dropped": dropped.as_dict(),
            "text": text_statistics.as_dict(),
            "tokens": token_statistics.as_dict(),
        }

    def _kept(self, task: Chosen, dropped: Dropped) -> Iterator[Document]:
        """The kept documents, masked; duplicates are counted in ``dropped``, the rest has been by the survey."""
        decisions = None if task.decisions is None else load_array(epath.Path(task.decisions), "decisions")
        for number, (text, where) in enumerate(self.cleaning.documents(task.unit, Dropped())):
            reason = None if decisions is None else _DUPLICATE[int(decisions[number])]
            if reason:
                dropped.add(reason, where)
            else:
                yield Document(self.gate.mask(text), where)


@functools.lru_cache(1)
def _tokenizer(path: str) -> tuple[Any, np.ndarray]:
    tokenizer = load_tokenizer(path)
    return tokenizer, byte_pieces(tokenizer)


def batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Lists of documents, bounded in number and in characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def units_of(slices: Sequence[tuple[Slice, str]], reading: ReadOptions, unit_bytes: int) -> Iterator[Unit]:
    """Slices, with the sha256 of their files, in units of about ``unit_bytes``; the same for the same input."""
    held: list[tuple[Slice, str]] = []
    size = 0
    for part in slices:
        held.append(part)
        size += part[0].bytes
        if size >= unit_bytes:
            yield Unit(*map(tuple, zip(*held, strict=True)), reading)
            held, size = [], 0
    if held:
        yield Unit(*map(tuple, zip(*held, strict=True)), reading)


def save_array(output: epath.Path, name: str, array: np.ndarray) -> str:
    """Writes ``OUTPUT.name.npy``; returns ``output`` as text."""
    with epath.Path(f"{output}.{name}.npy").open("wb") as file:
        np.save(file, array, allow_pickle=False)
    return str(output)


def load_array(output: epath.Path, name: str) -> np.ndarray:
    """What ``save_array`` wrote; mapped from the file where it is local, so that only what is used is in memory."""
    path = epath.Path(f"{output}.{name}.npy")
    if not is_remote(path):
        return np.load(str(path), mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)

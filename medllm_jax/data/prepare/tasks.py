"""The jobs of preparing a corpus, and their tasks: taking inventory, surveying, tokenising (see ``jobs.py``).

Surveying and tokenising read the same documents of a `ReadTask` in the same order, so a document is known by its
number; between the two, the duplicates among the documents of all tasks are found.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from medllm_jax.data.prepare.dedup import EXACT, KEPT, NEAR, signatures, text_digests
from medllm_jax.data.prepare.inventory import FileRange, take_inventory
from medllm_jax.data.prepare.normalize import Form, normalise
from medllm_jax.data.prepare.pii import Scanner
from medllm_jax.data.prepare.pii_gate import PiiFindings, PiiGate
from medllm_jax.data.prepare.readers import Document, ReadOptions, read_documents
from medllm_jax.data.prepare.rejections import Rejected, RejectionCounts, reject
from medllm_jax.data.prepare.statistics import TextStatistics, TokenStatistics
from medllm_jax.data.tokenizer import byte_pieces, encode_plain, load_tokenizer
from medllm_jax.storage.remote import is_remote

# A batch ends at either: enough to keep the libraries busy, little enough to hold.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1_000_000

_DUPLICATE = {KEPT: None, EXACT: "the text of an earlier document", NEAR: "nearly the text of an earlier document"}


class ListedFile(NamedTuple):
    """A file as a listing shows it; its size and time tell whether an inventory still holds."""

    path: str
    bytes: int
    modified: float


class ReadTask(NamedTuple):
    """Ranges of files that one worker reads, one after the other, and the sha256 of their files."""

    ranges: tuple[FileRange, ...]
    sha256: tuple[str, ...]
    options: ReadOptions


class TokenizeTask(NamedTuple):
    """The documents of a ReadTask, and which of them are kept.

    decisions: path of an array (see ``load_array``) uint8 [documents], one of ``dedup.KEPT``, ``EXACT`` and ``NEAR``
    each; None keeps all. decisions_sha256: of the array.
    """

    documents: ReadTask
    decisions: str | None
    decisions_sha256: str | None


@dataclasses.dataclass(frozen=True)
class TakeInventory:
    """Files -> the sha256 of each, and the ranges that it is read in."""

    range_bytes: int
    name = "inventory"

    def identity(self, task: tuple[ListedFile, ...]) -> Any:
        return ["ranges", self.range_bytes, task]

    def __call__(self, task: tuple[ListedFile, ...], output: epath.Path) -> dict[str, Any]:
        return {"files": [take_inventory(file.path, self.range_bytes).as_dict() for file in task]}


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """How a document becomes the text that is kept: normalised, and left out when it is then too short."""

    form: Form
    min_characters: int

    def identity(self) -> Any:
        return [self.form, self.min_characters, unicodedata.unidata_version]

    def documents(self, task: ReadTask, rejections: RejectionCounts) -> Iterator[Document]:
        """The documents of a task, cleaned; the same in every pass."""
        for part in task.ranges:
            for text, where in read_documents(part, task.options, rejections):
                cleaned = normalise(text, self.form)
                if not cleaned:
                    reject(Rejected(where, "text is empty"), task.options.on_bad, rejections)
                elif len(cleaned) < self.min_characters:
                    rejections.add(f"shorter than {self.min_characters} characters", where)
                else:
                    yield Document(cleaned, where)


@dataclasses.dataclass(frozen=True)
class Survey:
    """ReadTask -> what must be known of all documents before any is written: personal data, and what tells duplicates.

    Beside the result: ``.digests.npy`` uint64 [documents, 2], and where near duplicates are looked for
    ``.signatures.npy`` uint32 [documents, 128].
    """

    cleaning: Cleaning
    scanner: Scanner
    near: bool
    name = "survey"

    def identity(self, task: ReadTask) -> Any:
        return ["rows, NFC", self.cleaning.identity(), self.scanner.fingerprint, self.near, task]

    def __call__(self, task: ReadTask, output: epath.Path) -> dict[str, Any]:
        rejections, findings = RejectionCounts(), PiiFindings()
        digests, sketches = [text_digests([])], [signatures([])]
        for batch in batched(self.cleaning.documents(task, rejections)):
            texts = [document.text for document in batch]
            digests.append(text_digests(texts))
            if self.near:
                sketches.append(signatures(texts))
            for text, where in batch:
                findings.add(self.scanner, (text,), where)
        save_array(output, "digests", np.concatenate(digests))
        if self.near:
            save_array(output, "signatures", np.concatenate(sketches))
        return {
            "rows": rejections.rows,
            "of_files": rejections.of_files,
            "dropped": rejections.as_dict(),
            "stopping": rejections.stopping,
            "personal_data": findings.as_dict(),
        }


@dataclasses.dataclass(frozen=True)
class Tokenise:
    """TokenizeTask -> its kept documents as tokens: ``.tokens``, int32 little-endian, one document after the other, and
    ``.lengths.npy`` int32 [documents]."""

    cleaning: Cleaning
    gate: PiiGate
    tokenizer: str
    fingerprint: str
    ending: tuple[int, ...]
    name = "tokens"

    def identity(self, task: TokenizeTask) -> Any:
        masking = self.gate.scanner.fingerprint if self.gate.mode == "mask" else None
        return [self.cleaning.identity(), masking, self.fingerprint, self.ending, task.documents, task.decisions_sha256]

    def __call__(self, task: TokenizeTask, output: epath.Path) -> dict[str, Any]:
        tokenizer, is_byte_piece = _tokenizer(self.tokenizer)
        text_statistics, token_statistics = TextStatistics(), TokenStatistics()
        lengths: list[int] = []
        rejections, digest = RejectionCounts(), hashlib.sha256()
        with epath.Path(f"{output}.tokens").open("wb") as file:
            for batch in batched(self._kept(task, rejections)):
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
            "dropped": rejections.as_dict(),
            "text": text_statistics.as_dict(),
            "tokens": token_statistics.as_dict(),
        }

    def _kept(self, task: TokenizeTask, rejections: RejectionCounts) -> Iterator[Document]:
        """The kept documents, masked; duplicates are counted in ``rejections``, the survey has counted the rest."""
        decisions = None if task.decisions is None else load_array(epath.Path(task.decisions), "decisions")
        for number, (text, where) in enumerate(self.cleaning.documents(task.documents, RejectionCounts())):
            reason = None if decisions is None else _DUPLICATE[int(decisions[number])]
            if reason:
                rejections.add(reason, where)
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


def read_tasks(ranges: Iterable[tuple[FileRange, str]], options: ReadOptions, task_bytes: int) -> Iterator[ReadTask]:
    """Ranges, with the sha256 of their files, in tasks of about ``task_bytes``; the same for the same input."""
    group: list[tuple[FileRange, str]] = []
    size = 0
    for part, sha256 in ranges:
        group.append((part, sha256))
        size += part.stored_bytes
        if size >= task_bytes:
            yield _read_task(group, options)
            group, size = [], 0
    if group:
        yield _read_task(group, options)


def _read_task(group: Sequence[tuple[FileRange, str]], options: ReadOptions) -> ReadTask:
    return ReadTask(tuple(part for part, _ in group), tuple(sha256 for _, sha256 in group), options)


def save_array(output: epath.Path, name: str, array: np.ndarray) -> str:
    """Writes ``OUTPUT.name.npy``; returns ``output`` as text."""
    with epath.Path(f"{output}.{name}.npy").open("wb") as file:
        np.save(_Writer(file), array, allow_pickle=False)
    return str(output)


class _Writer:
    """Hands on what NumPy writes: to a real file it would write past Python, and never hear that the disk is full."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def write(self, data: bytes) -> None:
        self._file.write(data)


def load_array(output: epath.Path, name: str) -> np.ndarray:
    """What ``save_array`` wrote; mapped from the file where it is local, so that only what is used is in memory."""
    path = epath.Path(f"{output}.{name}.npy")
    if not is_remote(path):
        return np.load(str(path), mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)

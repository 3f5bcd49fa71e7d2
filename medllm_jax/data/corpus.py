"""Documents: from text files to a packed store for continued pretraining.

Accepted: ``.jsonl`` and ``.jsonl.gz`` with a string field ``text`` a line, and ``.txt`` with one document a file.
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from etils import epath

from medllm_jax.data.packing import best_fit, concatenate_and_split, document_segment, pieces
from medllm_jax.data.store import StoreMetadata
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter
from medllm_jax.data.tokenizer import encode_plain, fingerprint, load_tokenizer
from medllm_jax.errors import UserError

OnBad = Literal["error", "skip"]
Packing = Literal["best_fit", "split"]
Inputs = str | epath.PathLike | Sequence[str | epath.PathLike]
Progress = Callable[[int, int], None]  # (documents or pairs, tokens) so far

T = TypeVar("T")

JSON_LINES = (".jsonl", ".jsonl.gz")
_TEXT = (".txt",)

# A batch for the tokenizer ends at either: enough to keep its threads busy, little enough to hold.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4_000_000


class Document(NamedTuple):
    """A document and where it stands, "file" or "file:line"."""

    text: str
    where: str


class Dropped:
    """What was left out of a store, by reason: how many, and where the first ones stand. Never the text itself."""

    KEEP = 10

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.first.setdefault(reason, [])
        if len(places) < self.KEEP:
            places.append(where)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """reason -> {"count": int, "first": ["file:line", ...]}, as store.json holds it."""
        return {reason: {"count": count, "first": self.first[reason]} for reason, count in self.counts.items()}

    def __str__(self) -> str:
        parts = (f"{count} {reason} (first at {self.first[reason][0]})" for reason, count in self.counts.items())
        return ", ".join(parts) or "nothing"


def reject(where: str, reason: str, on_bad: OnBad, dropped: Dropped) -> None:
    """A row that cannot be used: UserError naming place and reason, or counted when ``on_bad`` is "skip"."""
    if on_bad == "error":
        raise UserError(f"{where}: {reason}; correct the row, or have such rows skipped and counted")
    dropped.add(reason, where)


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
        if path.exists():
            if not path.is_dir() and not path.name.endswith(tuple(suffixes)):
                raise UserError(f"{path} is not a file of a kind that is read here ({kinds})")
            found = _under(path, suffixes)
        elif set(str(item)) & set("*?["):
            found = [file for match in _glob(path) for file in _under(match, suffixes)]
        else:
            raise UserError(f"{path} does not exist")
        if not found:
            raise UserError(f"no file of a kind that is read here ({kinds}) at {path}")
        files.update((str(file), file) for file in found)
    return list(files.values())


def _under(path: epath.Path, suffixes: Sequence[str]) -> list[epath.Path]:
    """The file itself, or the files of a folder and the folders in it; hidden ones and other kinds are left out."""
    if path.is_dir():
        visible = (entry for entry in path.iterdir() if not entry.name.startswith("."))
        return [file for entry in sorted(visible) for file in _under(entry, suffixes)]
    return [path] if path.name.endswith(tuple(suffixes)) else []


def _glob(pattern: epath.Path) -> list[epath.Path]:
    if "**" in pattern.parts:
        raise UserError(f"{pattern}: `**` is not understood; give the folder itself, it is searched through")
    fixed = itertools.takewhile(lambda part: not set(part) & set("*?["), pattern.parts)
    base = epath.Path(*fixed)
    return sorted(base.glob(str(pattern.relative_to(base))))


def read_json_lines(file: epath.Path, on_bad: OnBad, dropped: Dropped) -> Iterator[tuple[dict[str, Any], str]]:
    """The JSON objects of a .jsonl or .jsonl.gz file, each with its "file:line"; blank lines are not rows.

    Raises UserError for a bad row (or counts it, see ``reject``), and for a file whose compression is damaged.
    """
    for where, line in _lines(file):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            reject(where, "not UTF-8", on_bad, dropped)
        except (ValueError, RecursionError):
            reject(where, "not valid JSON", on_bad, dropped)
        else:
            if isinstance(row, dict):
                yield row, where
            else:
                reject(where, "not a JSON object", on_bad, dropped)


def _lines(file: epath.Path) -> Iterator[tuple[str, bytes]]:
    where = str(file)
    with file.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
        try:
            for number, line in enumerate(stream, 1):
                where = f"{file}:{number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
                if line.strip():
                    yield where, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file} is damaged after {where}: its gzip stream cannot be read to the end") from error


def text_problem(value: Any) -> str | None:
    """Why a JSON value cannot be used as text, or None."""
    if not isinstance(value, str):
        return "not a string"
    if not value.strip():
        return "empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "not valid Unicode (a lone surrogate)"
    return None


def read_documents(inputs: Inputs, on_bad: OnBad, dropped: Dropped) -> Iterator[Document]:
    """The documents of all inputs (see ``find_files``), in order, one in memory at a time.

    Raises UserError naming file and line of a row that is no document; with on_bad "skip" it is counted in ``dropped``.
    """
    for file in find_files(inputs, (*JSON_LINES, *_TEXT)):
        for value, where in _values(file, on_bad, dropped):
            problem = text_problem(value)
            if problem:
                reject(where, f"text is {problem}", on_bad, dropped)
            else:
                yield Document(value, where)


def _values(file: epath.Path, on_bad: OnBad, dropped: Dropped) -> Iterator[tuple[Any, str]]:
    if file.name.endswith(JSON_LINES):
        for row, where in read_json_lines(file, on_bad, dropped):
            if "text" in row:
                yield row["text"], where
            else:
                reject(where, "no field `text`", on_bad, dropped)
        return
    try:
        yield file.read_bytes().decode("utf-8-sig"), str(file)
    except UnicodeDecodeError:
        reject(str(file), "not UTF-8", on_bad, dropped)


def prepare_corpus(
    inputs: Inputs,
    tokenizer_dir: str | epath.PathLike,
    output: str | epath.PathLike,
    sequence_length: int,
    *,
    packing: Packing = "best_fit",
    on_bad: OnBad = "error",
    append_eos: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> StoreMetadata:
    """Documents to a store of rows of ``sequence_length`` tokens; returns what ``store.json`` says.

    Each document is tokenised as plain text and ends with the tokenizer's end-of-sequence token (``append_eos``).
    packing "best_fit": a document is cut only when it is longer than a row (counted as ``split_documents``), and
    rows keep some padding; "split": rows are full, and documents are cut wherever a row ends. Either way each piece is
    a segment that sees only itself.

    progress is called now and then with the documents and tokens read so far. Memory holds one batch of documents and
    the rows being packed. Nothing is left at ``output`` on failure.

    Raises UserError for bad input rows (unless on_bad is "skip"), an input without documents, a tokenizer without the
    end-of-sequence token, and an output that exists (unless ``overwrite``).
    """
    check_sequence_length(sequence_length)
    with RowStoreWriter(output, "cpt", sequence_length, overwrite=overwrite) as writer:
        tokenizer = load_tokenizer(tokenizer_dir)
        ending = [eos_of(tokenizer, tokenizer_dir)] if append_eos else []
        dropped = Dropped()
        documents = _Tokenized(read_documents(inputs, on_bad, dropped), tokenizer, ending, sequence_length, progress)
        if packing == "split":
            rows = concatenate_and_split(documents, sequence_length)
        else:
            parts = (part for document in documents for part in pieces(document, sequence_length))
            rows = best_fit(map(document_segment, parts), sequence_length)
        for row in rows:
            writer.append(row[None], "corpus")
        if not documents.count:
            raise UserError(f"no document to prepare in {inputs}; left out: {dropped}")
        return writer.finish(
            {"corpus": CorpusFacts(documents.count, documents.longer_than_a_row)},
            packing=packing,
            vocab_size=len(tokenizer),
            tokenizer_fingerprint=fingerprint(tokenizer_dir),
            eos_token_id=tokenizer.eos_token_id,
            dropped=dropped.as_dict(),
        )


class _Tokenized:
    """Iterates over the token ids, int32 [n], of documents, and counts them on the way."""

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: Any,
        ending: Sequence[int],
        sequence_length: int,
        progress: Progress | None,
    ):
        self.count = 0
        self.tokens = 0
        self.longer_than_a_row = 0
        self._documents = documents
        self._tokenizer = tokenizer
        self._ending = ending
        self._sequence_length = sequence_length
        self._progress = progress

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in batched(self._documents, lambda document: len(document.text)):
            for ids in encode_plain(self._tokenizer, [document.text for document in batch]):
                tokens = np.asarray([*ids, *self._ending], np.int32)
                self.count += 1
                self.tokens += len(tokens)
                self.longer_than_a_row += len(tokens) > self._sequence_length
                yield tokens
            if self._progress is not None:
                self._progress(self.count, self.tokens)


def batched(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of items for one call of the tokenizer, bounded in number and in characters."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def check_sequence_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise UserError(f"the sequence length is {sequence_length}: a row needs at least 2 tokens to predict one")


def eos_of(tokenizer: Any, tokenizer_dir: str | epath.PathLike) -> int:
    """The id of the end-of-sequence token; UserError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {tokenizer_dir} has no end-of-sequence token: set eos_token in its config")
    return tokenizer.eos_token_id

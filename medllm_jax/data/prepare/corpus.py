"""Documents: from raw text to a packed store for continued pretraining.

The jobs, each over tasks that run in parallel and are never done twice (see ``jobs.py`` and ``tasks.py``):

1. inventory   every file's sha256 and where it can be cut
2. survey      every document: cleaned, scanned for personal data, digested; nothing is written of the texts
   ... here the personal data gate stops, and duplicates are found among all documents
3. tokens      the documents that are kept

Then rows are packed, corpus by corpus, into the store.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from etils import epath

from medllm_jax.data.packing import best_fit, concatenate_and_split, document_segment, pieces
from medllm_jax.data.prepare.dedup import DocumentHashes, find_duplicates
from medllm_jax.data.prepare.files import DOCUMENT_FILES, find_files
from medllm_jax.data.prepare.hub_dataset import local_inputs
from medllm_jax.data.prepare.inventory import Inventory, manifest_of
from medllm_jax.data.prepare.jobs import Executor, Progress, TaskOutput, in_this_process, run_job
from medllm_jax.data.prepare.normalize import Form
from medllm_jax.data.prepare.pii_gate import PiiFindings, PiiGate, PiiMode
from medllm_jax.data.prepare.readers import ReadOptions
from medllm_jax.data.prepare.rejections import OnBad, Rejected, RejectionCounts, refuse, reject
from medllm_jax.data.prepare.statistics import TextStatistics, TokenStatistics
from medllm_jax.data.prepare.tasks import (
    Cleaning,
    ListedFile,
    ReadTask,
    Survey,
    TakeInventory,
    Tokenise,
    TokenizeTask,
    load_array,
    read_tasks,
    save_array,
)
from medllm_jax.data.store import StoreMetadata
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter, check_replaceable
from medllm_jax.data.tokenizer import eos_of, fingerprint, load_tokenizer
from medllm_jax.errors import UserError, quoted
from medllm_jax.ranges import Characters, MaxBytes, Ranged, SequenceLength, Share, SimilarityThreshold
from medllm_jax.storage.lease import sole_writer
from medllm_jax.storage.remote import remove_folder

Packing = Literal["best_fit", "split"]

# The stages of a preparation, as progress names them: in words, and what is counted. Each corpus is packed for itself.
STAGES = {
    "inventory": ("looking at files", "files"),
    "survey": ("reading documents", "bytes"),
    "duplicates": ("looking for duplicates", "documents"),
    "tokens": ("tokenising", "documents"),
    "packing": ("packing rows", "documents"),
}

# Input of one task: large enough that a task is worth its start, small enough to hold a task's tokens in memory.
_TASK_BYTES = 4 * 2**20
# Input of one task of the inventory, which makes only a hash and some places of it.
_INVENTORY_BYTES, _INVENTORY_FILES = 256 * 2**20, 256
_READ_TOKENS = 2**21  # held at a time while packing


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One corpus: where its files are, and its manifest, which is kept with the store.

    Attributes:
        name: its name in mixes and metrics
        input: files, folders or globs, local or gs://, or hf://datasets/OWNER/NAME (see hub_dataset.py)
        text_field: field or column that holds the text, in .jsonl and .parquet
        provenance: its origin
        licence: the terms of its use
        processing: its processing before, such as raw, cleaned, translated, synthetic
        contact: a person or address for questions
        checksum: the checksum that the input must have; `sha256sum FILES | cut -d' ' -f1 | sort | sha256sum` prints it
    """

    name: str
    input: str | tuple[str, ...]
    text_field: str = "text"
    provenance: str = ""
    licence: str = ""
    processing: str = ""
    contact: str = ""
    checksum: str | None = None

    def __post_init__(self):
        if not self.name or set(self.name) & set("/ \t\n"):
            raise UserError(f"a corpus is named {quoted(self.name)}: give a name without white space and slashes")


@dataclasses.dataclass(frozen=True)
class Recipe(Ranged):
    """How documents become rows.

    Attributes:
        sequence_length: tokens in a row
        packing: best_fit keeps documents whole where they fit in a row; split fills every row and cuts at its end
        append_eos: each document ends with the end-of-sequence token
        on_bad: what to do about a document that cannot be used: error stops, skip leaves it out and counts it
        normalise: Unicode form, beside line ends and control characters: none, nfc, or nfkc where it keeps the meaning
        min_characters: shorter documents are left out
        max_bytes: of one line or text; what is longer cannot be used
        duplicates: keep all, leave out exact ones, or near ones too; the first is kept
        near_threshold: share of equal 5-grams (Jaccard similarity) from which texts are near duplicates
        pii: personal data: fail stops where it is found, mask replaces it, report only counts it
        pii_rate: share of a corpus' documents that may have findings before fail stops
        pii_patterns: files with more patterns
    """

    sequence_length: SequenceLength = 4096
    packing: Packing = "best_fit"
    append_eos: bool = True
    on_bad: OnBad = "error"
    normalise: Form = "none"
    min_characters: Characters = 1
    max_bytes: MaxBytes = 2**26
    duplicates: Literal["keep", "exact", "near"] = "exact"
    near_threshold: SimilarityThreshold = 0.8
    pii: PiiMode = "fail"
    pii_rate: Share = 0.0
    pii_patterns: tuple[str, ...] = ()


@sole_writer("output", beside=True)
def prepare_corpus(
    corpora: Sequence[Corpus],
    tokenizer_dir: str | epath.PathLike,
    output: str | epath.PathLike,
    recipe: Recipe = Recipe(),
    *,
    overwrite: bool = False,
    executor: Executor = in_this_process,
    progress: Progress = lambda job, done, total: None,
) -> StoreMetadata:
    """Prepares a store of rows from documents; returns the content of ``store.json``, which has the whole report.

    Each document is tokenised as plain text and ends with the tokenizer's end-of-sequence token. A document longer than
    a row is cut (counted as ``split_documents``); each piece is a segment that sees only itself. Rows hold one corpus
    each, in the order given. The same input and recipe give the same rows, whatever the executor.

    One program at a time prepares an output (`lease.sole_writer`); on how many machines is the executor's affair.
    Work in progress is kept beside the output, in ``.NAME.preparing``: the same call after an interruption or an error
    resumes the preparation. executor: where the tasks run (see ``jobs.py``).

    Raises UserError for input that cannot be used (unless on_bad is "skip"), a corpus without documents, personal data
    above the stated rate, a checksum that differs, a tokenizer without the end-of-sequence token, and an output that
    exists (unless ``overwrite``). Nothing is left at ``output`` then.
    """
    output = epath.Path(output)
    check_replaceable(output, overwrite=overwrite)
    corpora = [dataclasses.replace(corpus, input=_input_of(corpus)) for corpus in corpora]
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer_fingerprint = fingerprint(tokenizer_dir, tokenizer)
    ending = (eos_of(tokenizer, tokenizer_dir),) if recipe.append_eos else ()
    gate = PiiGate(recipe.pii, recipe.pii_rate, recipe.pii_patterns)
    cleaning = Cleaning(recipe.normalise, recipe.min_characters)
    work = output.parent / f".{output.name}.preparing"

    prepared = _take_inventories(corpora, recipe.max_bytes, recipe.on_bad, work, executor, progress)

    tasks = [task for corpus in prepared for task in corpus.tasks]
    survey = Survey(cleaning, gate.scanner, near=recipe.duplicates == "near")
    surveyed = run_job(survey, tasks, work, executor, progress, [_bytes_of(task) for task in tasks])
    for corpus, outputs in _by_corpus(prepared, surveyed):
        corpus.add_survey(outputs)
    refuse(_merged(corpus.rejections for corpus in prepared), "bad")
    for corpus in prepared:
        corpus.check_documents()
        gate.check(corpus.name, corpus.findings)
    if recipe.duplicates == "keep":
        kept = [TokenizeTask(task, None, None) for task in tasks]
    else:
        threshold = recipe.near_threshold if recipe.duplicates == "near" else None
        documents = sum(corpus.findings.documents for corpus in prepared)
        progress("duplicates", 0, documents)
        kept = _without_duplicates(tasks, surveyed, threshold, work / "decisions")
        progress("duplicates", documents, documents)

    tokenise = Tokenise(cleaning, gate, str(tokenizer_dir), tokenizer_fingerprint, ending)
    tokenised = run_job(
        tokenise, kept, work, executor, progress, [output.result["personal_data"]["documents"] for output in surveyed]
    )

    with RowStoreWriter(output, "cpt", recipe.sequence_length, overwrite=overwrite) as writer:
        for corpus, outputs in _by_corpus(prepared, tokenised):
            corpus.add_tokens(outputs)
            for row in _pack(outputs, recipe.packing, recipe.sequence_length, corpus, progress):
                writer.append(row[None], corpus.name)
        metadata = writer.finish(
            {corpus.name: corpus.facts() for corpus in prepared},
            packing=recipe.packing,
            vocab_size=len(tokenizer),
            tokenizer_fingerprint=tokenizer_fingerprint,
            eos_token_id=tokenizer.eos_token_id,
            dropped=_merged(corpus.rejections for corpus in prepared).as_dict(),
            recipe=dataclasses.asdict(recipe) | {"pii_fingerprint": gate.scanner.fingerprint},
        )
    remove_folder(work)
    return metadata


# --- the steps of the preparation ------------------------------------------------------------------------------------


@dataclasses.dataclass
class _PreparedCorpus:
    """A corpus while it is prepared; all that is known of it ends in the store's manifest."""

    corpus: Corpus
    input: dict[str, Any]
    tasks: list[ReadTask]
    rejections: RejectionCounts
    findings: PiiFindings = dataclasses.field(default_factory=PiiFindings)
    kept: int = 0
    longer_than_a_row: int = 0
    text: TextStatistics = dataclasses.field(default_factory=TextStatistics)
    tokens: TokenStatistics = dataclasses.field(default_factory=TokenStatistics)

    @property
    def name(self) -> str:
        return self.corpus.name

    def add_survey(self, outputs: Sequence[TaskOutput]) -> None:
        for result, _ in outputs:
            self.rejections.merge(RejectionCounts.from_dict(result["dropped"], result["rows"], result["of_files"]))
            self.rejections.stopping = result.get("stopping", {}) | self.rejections.stopping
            self.findings.merge(result["personal_data"])

    def check_documents(self) -> None:
        if not self.findings.documents:
            raise UserError(f"no document to prepare in {self.corpus.input}; left out: {self.rejections}")

    def add_tokens(self, outputs: Sequence[TaskOutput]) -> None:
        for result, _ in outputs:
            self.kept += result["documents"]
            self.rejections.merge(RejectionCounts.from_dict(result["dropped"]))
            self.text.merge(TextStatistics.from_dict(result["text"]))
            self.tokens.merge(TokenStatistics.from_dict(result["tokens"]))

    def facts(self) -> CorpusFacts:
        self.rejections.check_kept(self.kept, f"corpus {self.name}")
        stated = ("provenance", "licence", "processing", "contact")
        manifest = {field: getattr(self.corpus, field) for field in stated} | {
            **self.input,
            "rows": self.rejections.rows,
            "dropped": self.rejections.as_dict(),
            "personal_data": self.findings.as_dict(),
            "text": self.text.as_dict(),
            "tokens": self.tokens.as_dict(),
        }
        return CorpusFacts(self.kept, self.longer_than_a_row, manifest)


def _take_inventories(
    corpora: Sequence[Corpus],
    max_bytes: int,
    on_bad: OnBad,
    work: epath.Path,
    executor: Executor,
    progress: Progress,
) -> list[_PreparedCorpus]:
    """The corpora's files and tasks; UserError for a name that is used twice, a bad file or a wrong checksum."""
    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names):
        raise UserError(f"corpora share a name: {', '.join(names)}")
    passed_over = [RejectionCounts() for _ in corpora]
    found = [find_files(corpus.input, DOCUMENT_FILES, over) for corpus, over in zip(corpora, passed_over, strict=True)]
    with ThreadPoolExecutor(16) as pool:  # in a bucket, a request each
        listed = list(pool.map(_listed, [path for paths in found for path in paths]))
    groups = list(_grouped(listed))
    outputs = run_job(TakeInventory(_TASK_BYTES), groups, work, executor, progress, [len(group) for group in groups])
    inventories = iter([Inventory.from_dict(each) for result, _ in outputs for each in result["files"]])
    prepared = []
    for corpus, paths, over in zip(corpora, found, passed_over, strict=True):
        own = list(itertools.islice(inventories, len(paths)))
        rejections = RejectionCounts()
        for inventory in own:
            if not inventory.ranges:
                reject(Rejected(inventory.file, "the file is empty"), on_bad, rejections)
                rejections.of_files += 1
        ranges = [(part, inventory.sha256) for inventory in own for part in inventory.ranges]
        options = ReadOptions(corpus.text_field, max_bytes, "collect" if on_bad == "error" else on_bad)
        manifest = manifest_of(own, over)
        prepared.append(_PreparedCorpus(corpus, manifest, list(read_tasks(ranges, options, _TASK_BYTES)), rejections))
        if corpus.checksum not in (None, manifest["checksum"]):
            raise UserError(
                f"the input of corpus {corpus.name} has the checksum {manifest['checksum']}, its manifest says "
                f"{corpus.checksum}: give the files that the manifest is of, or correct the manifest"
            )
    return prepared


def _input_of(corpus: Corpus) -> str | tuple[str, ...]:
    if isinstance(corpus.input, str):
        return local_inputs([corpus.input])[0]
    return tuple(local_inputs(corpus.input))


def _grouped(files: Sequence[ListedFile]) -> Iterator[tuple[ListedFile, ...]]:
    """Files in groups, each worth a task: many small ones, or a large one."""
    group: list[ListedFile] = []
    for file in files:
        group.append(file)
        if len(group) == _INVENTORY_FILES or sum(file.bytes for file in group) >= _INVENTORY_BYTES:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _bytes_of(task: ReadTask) -> int:
    return sum(part.stored_bytes for part in task.ranges)


def _listed(file: epath.Path) -> ListedFile:
    stat = file.stat()
    return ListedFile(str(file), stat.length, stat.mtime)


def _merged(parts: Iterable[RejectionCounts]) -> RejectionCounts:
    merged = RejectionCounts()
    for part in parts:
        merged.merge(part)
    return merged


def _by_corpus(
    prepared: Sequence[_PreparedCorpus], outputs: Sequence[TaskOutput]
) -> Iterator[tuple[_PreparedCorpus, Sequence[TaskOutput]]]:
    start = 0
    for corpus in prepared:
        yield corpus, outputs[start : start + len(corpus.tasks)]
        start += len(corpus.tasks)


def _without_duplicates(
    tasks: Sequence[ReadTask], surveyed: Sequence[TaskOutput], near_threshold: float | None, folder: epath.Path
) -> list[TokenizeTask]:
    """The tasks with what is kept of each; near_threshold None: only exact duplicates are left out."""
    hashes = [
        DocumentHashes(
            functools.partial(load_array, output.path, "digests"),
            None if near_threshold is None else functools.partial(load_array, output.path, "signatures"),
        )
        for output in surveyed
    ]
    found = find_duplicates(hashes, near_threshold)
    return [_keep(task, decisions, folder) for task, decisions in zip(tasks, found, strict=True)]


def _keep(task: ReadTask, decisions: np.ndarray, folder: epath.Path) -> TokenizeTask:
    if not decisions.any():
        return TokenizeTask(task, None, None)
    digest = hashlib.sha256(decisions.tobytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    return TokenizeTask(task, save_array(folder / digest[:24], "decisions", decisions), digest)


def _pack(
    outputs: Sequence[TaskOutput],
    packing: Packing,
    sequence_length: int,
    corpus: _PreparedCorpus,
    progress: Progress,
) -> Iterator[np.ndarray]:
    """Rows int32 [3, S] of a corpus; one task's tokens and the open rows are in memory."""

    def documents() -> Iterator[np.ndarray]:
        done = 0
        for output in outputs:
            for tokens in _token_documents(output):
                corpus.longer_than_a_row += len(tokens) > sequence_length
                yield tokens
            done += output.result["documents"]
            progress(f"packing {corpus.name}", done, corpus.kept)

    if packing == "split":
        return concatenate_and_split(documents(), sequence_length)
    parts = (part for document in documents() for part in pieces(document, sequence_length))
    return best_fit(map(document_segment, parts), sequence_length)


def _token_documents(output: TaskOutput) -> Iterator[np.ndarray]:
    """The token ids, int32 [n], of a task's documents; UserError where they are not those that were written."""
    ends = np.cumsum(load_array(output.path, "lengths"), dtype=np.int64)
    digest = hashlib.sha256()
    file = epath.Path(f"{output.path}.tokens")
    with file.open("rb") as stream:
        first = 0  # document
        while first < len(ends):
            start = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, start + _READ_TOKENS, side="right")))
            data = stream.read(4 * int(ends[last - 1] - start))
            digest.update(data)
            yield from np.split(np.frombuffer(data, "<i4"), ends[first : last - 1] - start)
            first = last
    if digest.hexdigest() != output.result["sha256"]:
        raise UserError(f"{file} is damaged: remove {file.parent}, and prepare again")

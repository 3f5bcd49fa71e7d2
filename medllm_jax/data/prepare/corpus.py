"""Documents: from raw text to a packed store for continued pretraining.

The stages, each in units that run in parallel and are never done twice (see ``stages.py`` and ``units.py``):

1. inventory   every file's sha256 and where it can be cut
2. survey      every document: cleaned, scanned for personal data, digested; nothing is written of the texts
   ... here the personal data gate stops, and duplicates are found among all documents
3. tokens      the documents that are kept
4. packing     rows, corpus by corpus, into the store
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from etils import epath

from medllm_jax.data.packing import best_fit, check_sequence_length, concatenate_and_split, document_segment, pieces
from medllm_jax.data.prepare.dedup import Surveyed, find_duplicates
from medllm_jax.data.prepare.jobs import Done, Engine, Progress, here, run_stage
from medllm_jax.data.prepare.normalize import Form
from medllm_jax.data.prepare.pii_gate import Findings, Gate
from medllm_jax.data.prepare.reading import (
    DOCUMENT_FILES,
    Dropped,
    OnBad,
    ReadOptions,
    Slice,
    find_files,
    manifest_of,
    reject,
)
from medllm_jax.data.prepare.statistics import TextStatistics, TokenStatistics
from medllm_jax.data.prepare.tasks import (
    Chosen,
    Cleaning,
    File,
    Survey,
    TakeInventory,
    Tokenise,
    Unit,
    load_array,
    save_array,
    units_of,
)
from medllm_jax.data.store import StoreMetadata
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter, check_replaceable
from medllm_jax.data.tokenizer import eos_of, fingerprint, load_tokenizer
from medllm_jax.errors import UserError
from medllm_jax.storage.remote import remove_folder

# Of input: what one task reads. Large enough that a task is worth its start, small enough to hold a task's tokens.
_UNIT_BYTES = 4 * 2**20
_INVENTORY_BYTES, _INVENTORY_FILES = 256 * 2**20, 256  # likewise, of which only a hash and some places are wanted
_READ_TOKENS = 2**21  # held at a time while packing


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One corpus: where its files are, and its manifest, which is kept with the store.

    Attributes:
        name: what it is called in mixes and metrics
        input: files, folders or globs, local or gs://
        text_field: field or column that holds the text, in .jsonl and .parquet
        provenance: where it comes from
        licence: under which terms it may be used
        processing: what was done to it before, such as raw, cleaned, translated, synthetic
        contact: whom to ask
        checksum: what the input must be; `sha256sum FILES | cut -d' ' -f1 | sort | sha256sum` prints it
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
            raise UserError(f"a corpus is named {self.name!r}: give a name without white space and slashes")


@dataclasses.dataclass(frozen=True)
class Recipe:
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
        pii: personal data: fail stops where it is found, mask replaces it, report goes on
        pii_rate: share of a corpus' documents with findings up to which fail goes on
        pii_patterns: files with more patterns
    """

    sequence_length: int = 4096
    packing: Literal["best_fit", "split"] = "best_fit"
    append_eos: bool = True
    on_bad: OnBad = "error"
    normalise: Form = "none"
    min_characters: int = 1
    max_bytes: int = 2**26
    duplicates: Literal["keep", "exact", "near"] = "exact"
    near_threshold: float = 0.8
    pii: Literal["fail", "mask", "report"] = "fail"
    pii_rate: float = 0.0
    pii_patterns: tuple[str, ...] = ()

    def __post_init__(self):
        check_sequence_length(self.sequence_length)
        if self.min_characters < 1 or self.max_bytes < 1:
            raise UserError("min_characters and max_bytes must be positive")
        if not 0 < self.near_threshold <= 1:
            raise UserError(f"near_threshold is {self.near_threshold}: give a share above 0, at most 1")


def prepare_corpus(
    corpora: Sequence[Corpus],
    tokenizer_dir: str | epath.PathLike,
    output: str | epath.PathLike,
    recipe: Recipe = Recipe(),
    *,
    overwrite: bool = False,
    engine: Engine = here,
    progress: Progress = lambda stage, done, total: None,
) -> StoreMetadata:
    """Documents to a store of rows; returns what ``store.json`` says, which holds the report of all that was done.

    Each document is tokenised as plain text and ends with the tokenizer's end-of-sequence token. A document longer than
    a row is cut (counted as ``split_documents``); each piece is a segment that sees only itself. Rows hold one corpus
    each, in the order given. The same input and recipe give the same rows, whatever the engine.

    Work in progress is kept beside the output, in ``.NAME.preparing``: repeated after an interruption or an error, the
    preparation goes on where it was. engine: where the units run (see ``stages.py``).

    Raises UserError for input that cannot be used (unless on_bad is "skip"), a corpus without documents, personal data
    above the stated rate, a checksum that differs, a tokenizer without the end-of-sequence token, and an output that
    exists (unless ``overwrite``). Nothing is left at ``output`` then.
    """
    output = epath.Path(output)
    check_replaceable(output, overwrite=overwrite)
    tokenizer, tokenizer_fingerprint = load_tokenizer(tokenizer_dir), fingerprint(tokenizer_dir)
    ending = (eos_of(tokenizer, tokenizer_dir),) if recipe.append_eos else ()
    gate = Gate(recipe.pii, recipe.pii_rate, recipe.pii_patterns)
    cleaning = Cleaning(recipe.normalise, recipe.min_characters)
    work = output.parent / f".{output.name}.preparing"

    taken = _take_inventories(corpora, recipe, work, engine, progress)

    units = [unit for corpus in taken for unit in corpus.units]
    survey = Survey(cleaning, gate.scanner, near=recipe.duplicates == "near")
    surveyed = run_stage(survey, units, work, engine, progress)
    for corpus, done in _by_corpus(taken, surveyed):
        corpus.add_survey(done)
        gate.check(corpus.name, corpus.findings)
    chosen = _without_duplicates(taken, units, surveyed, recipe, work)

    tokenise = Tokenise(cleaning, gate, str(tokenizer_dir), tokenizer_fingerprint, ending)
    tokenised = run_stage(tokenise, chosen, work, engine, progress)

    with RowStoreWriter(output, "cpt", recipe.sequence_length, overwrite=overwrite) as writer:
        for corpus, done in _by_corpus(taken, tokenised):
            corpus.add_tokens(done)
            for row in _pack(done, recipe, corpus, progress):
                writer.append(row[None], corpus.name)
        metadata = writer.finish(
            {corpus.name: corpus.facts() for corpus in taken},
            packing=recipe.packing,
            vocab_size=len(tokenizer),
            tokenizer_fingerprint=tokenizer_fingerprint,
            eos_token_id=tokenizer.eos_token_id,
            dropped=_merged(corpus.dropped for corpus in taken).as_dict(),
            recipe=dataclasses.asdict(recipe) | {"pii_fingerprint": gate.scanner.fingerprint},
        )
    remove_folder(work)
    return metadata


# --- the parts of the story ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Taken:
    """A corpus on its way: what is known of it so far, all of which ends in the store's manifest."""

    corpus: Corpus
    input: dict[str, Any]
    units: list[Unit]
    dropped: Dropped
    findings: Findings = dataclasses.field(default_factory=Findings)
    kept: int = 0
    longer_than_a_row: int = 0
    text: TextStatistics = dataclasses.field(default_factory=TextStatistics)
    tokens: TokenStatistics = dataclasses.field(default_factory=TokenStatistics)

    @property
    def name(self) -> str:
        return self.corpus.name

    def add_survey(self, units: Sequence[Done]) -> None:
        for result, _ in units:
            self.dropped.merge(Dropped.from_dict(result["dropped"]))
            self.findings.merge(result["personal_data"])
        if not self.findings.documents:
            raise UserError(f"no document to prepare in {self.corpus.input}; left out: {self.dropped}")

    def add_tokens(self, units: Sequence[Done]) -> None:
        for result, _ in units:
            self.kept += result["documents"]
            self.dropped.merge(Dropped.from_dict(result["dropped"]))
            self.text.merge(TextStatistics.from_dict(result["text"]))
            self.tokens.merge(TokenStatistics.from_dict(result["tokens"]))

    def facts(self) -> CorpusFacts:
        stated = ("provenance", "licence", "processing", "contact")
        manifest = {field: getattr(self.corpus, field) for field in stated} | {
            **self.input,
            "dropped": self.dropped.as_dict(),
            "personal_data": self.findings.as_dict(),
            "text": self.text.as_dict(),
            "tokens": self.tokens.as_dict(),
        }
        return CorpusFacts(self.kept, self.longer_than_a_row, manifest)


def _take_inventories(
    corpora: Sequence[Corpus], recipe: Recipe, work: epath.Path, engine: Engine, progress: Progress
) -> list[_Taken]:
    """The corpora's files and units; UserError where a name, a file or a checksum is not as it must be."""
    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names):
        raise UserError(f"corpora share a name: {', '.join(names)}")
    found = [find_files(corpus.input, DOCUMENT_FILES) for corpus in corpora]
    with ThreadPoolExecutor(16) as pool:  # in a bucket, a request each
        listed = list(pool.map(_listed, [path for paths in found for path in paths]))
    done = run_stage(TakeInventory(_UNIT_BYTES), list(_grouped(listed)), work, engine, progress)
    inventories = iter([inventory for result, _ in done for inventory in result["files"]])
    taken = []
    for corpus, paths in zip(corpora, found, strict=True):
        own, slices, dropped = [], [], Dropped()
        reading = ReadOptions(corpus.text_field, recipe.max_bytes, recipe.on_bad)
        for path, inventory in zip(paths, inventories, strict=False):
            own.append(inventory)
            slices += [(Slice(*part), inventory["sha256"]) for part in inventory["slices"]]
            if not inventory["slices"]:
                reject(str(path), "the file is empty", recipe.on_bad, dropped)
        taken.append(_Taken(corpus, manifest_of(own), list(units_of(slices, reading, _UNIT_BYTES)), dropped))
        checksum = taken[-1].input["checksum"]
        if corpus.checksum not in (None, checksum):
            raise UserError(
                f"the input of corpus {corpus.name} has the checksum {checksum}, its manifest says "
                f"{corpus.checksum}: give the files that the manifest is of, or correct the manifest"
            )
    return taken


def _grouped(files: Sequence[File]) -> Iterator[tuple[File, ...]]:
    """Files in groups, each worth a task: many small ones, or a large one."""
    group: list[File] = []
    for file in files:
        group.append(file)
        if len(group) == _INVENTORY_FILES or sum(file.bytes for file in group) >= _INVENTORY_BYTES:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _listed(file: epath.Path) -> File:
    stat = file.stat()
    return File(str(file), stat.length, stat.mtime)


def _merged(parts: Iterable[Dropped]) -> Dropped:
    merged = Dropped()
    for part in parts:
        merged.merge(part)
    return merged


def _by_corpus(taken: Sequence[_Taken], done: Sequence[Done]) -> Iterator[tuple[_Taken, Sequence[Done]]]:
    start = 0
    for corpus in taken:
        yield corpus, done[start : start + len(corpus.units)]
        start += len(corpus.units)


def _without_duplicates(
    taken: Sequence[_Taken], units: Sequence[Unit], surveyed: Sequence[Done], recipe: Recipe, work: epath.Path
) -> list[Chosen]:
    """The units with what is kept of each; what is left out is counted."""
    if recipe.duplicates == "keep":
        return [Chosen(unit, None, None) for unit in units]
    near = recipe.duplicates == "near"
    seen = [
        Surveyed(
            functools.partial(load_array, done.output, "digests"),
            functools.partial(load_array, done.output, "signatures") if near else None,
        )
        for done in surveyed
    ]
    found = find_duplicates(seen, recipe.near_threshold if near else None)
    return [_choose(unit, decisions, work / "decisions") for unit, decisions in zip(units, found, strict=True)]


def _choose(unit: Unit, decisions: np.ndarray, folder: epath.Path) -> Chosen:
    if not decisions.any():
        return Chosen(unit, None, None)
    digest = hashlib.sha256(decisions.tobytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    return Chosen(unit, save_array(folder / digest[:24], "decisions", decisions), digest)


def _pack(units: Sequence[Done], recipe: Recipe, corpus: _Taken, progress: Progress) -> Iterator[np.ndarray]:
    """Rows int32 [3, S] of a corpus; one unit's tokens and the open rows are in memory."""

    def documents() -> Iterator[np.ndarray]:
        for number, unit in enumerate(units, 1):
            for tokens in _token_documents(unit):
                corpus.longer_than_a_row += len(tokens) > recipe.sequence_length
                yield tokens
            progress(f"packing {corpus.name}", number, len(units))

    if recipe.packing == "split":
        return concatenate_and_split(documents(), recipe.sequence_length)
    parts = (part for document in documents() for part in pieces(document, recipe.sequence_length))
    return best_fit(map(document_segment, parts), recipe.sequence_length)


def _token_documents(unit: Done) -> Iterator[np.ndarray]:
    """The token ids, int32 [n], of a unit's documents; UserError where they are not those that were written."""
    ends = np.cumsum(load_array(unit.output, "lengths"), dtype=np.int64)
    digest = hashlib.sha256()
    file = epath.Path(f"{unit.output}.tokens")
    with file.open("rb") as stream:
        first = 0  # document
        while first < len(ends):
            start = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, start + _READ_TOKENS, side="right")))
            data = stream.read(4 * int(ends[last - 1] - start))
            digest.update(data)
            yield from np.split(np.frombuffer(data, "<i4"), ends[first : last - 1] - start)
            first = last
    if digest.hexdigest() != unit.result["sha256"]:
        raise UserError(f"{file} is damaged: remove {file.parent}, and prepare again")

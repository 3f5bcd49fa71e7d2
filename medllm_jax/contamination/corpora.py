"""Whether an exam's questions stand in what a model was trained on: corpora as files, or stores of packed rows."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from medllm_jax.contamination.exams import Overlap
from medllm_jax.contamination.ngrams import GRAM
from medllm_jax.data.prepare.files import DOCUMENT_FILES, RECORD_FILES, find_files, is_kind
from medllm_jax.data.prepare.inventory import whole_file
from medllm_jax.data.prepare.readers import ReadOptions, read_documents, read_records
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.data.store import RowStore, check_compatible
from medllm_jax.data.tokenizer import fingerprint, load_tokenizer
from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Exam
from medllm_jax.evaluation.grading import Group, read_grades
from medllm_jax.evaluation.prompts import CONDITIONS
from medllm_jax.storage.remote import is_there, write_whole

_log = logging.getLogger(__name__)

_ROWS = 64  # of a store, decoded at a time


def contamination(
    exam: Exam,
    sources: Sequence[str],
    *,
    tokenizer: str | None = None,
    n: int = GRAM,
    threshold: float = 0.5,
    progress: Callable[[str, int], None] = lambda source, texts: None,
) -> dict[str, Any]:
    """What share of each question stands in corpora or stores; nothing of any text is in the result.

    Args:
      exam: the questions; points and golds play no part.
      sources: stores, or files, folders and globs of documents and rows (.jsonl, .txt, .parquet, compressed too), whose
        texts are all strings in them; local or gs://.
      tokenizer: the one that the stores were made with, if there are stores.
      n: characters of an n-gram.
      threshold: the share of a question's n-grams from which on it counts as overlapping.
      progress: called with the source and the number of its texts so far.

    Returns:
      For JSON: corpora, n, threshold, questions, too_short (questions without an n-gram, which can't be found),
      overlapping, share (of the questions), ids, by_year (of the ids), and shares (id -> share of n-grams found, where
      there is any).

    Raises:
      UserError: a source can't be read, or a store is of another tokenizer.
    """
    if not 0 < threshold <= 1 or n < 4:
        raise UserError(f"n is {n} and the threshold {threshold}: n is at least 4, and the threshold in (0, 1]")
    overlap = Overlap(exam.questions, n)
    for source in sources:
        texts = 0
        for texts, text in enumerate(_texts(source, tokenizer), 1):
            overlap.add(text)
            progress(source, texts)
        if not texts:
            raise UserError(f"{source}: there is no text in it")
    shares = overlap.shares()
    found = [question for question in exam.questions if shares[question.id] >= threshold]
    years = sorted({question.year for question in exam.questions if question.year is not None})
    return {
        "corpora": [epath.Path(source).name for source in sources],
        "n": n,
        "threshold": threshold,
        "questions": len(exam.questions),
        "too_short": overlap.too_short,
        "overlapping": len(found),
        "share": len(found) / len(exam.questions),
        "ids": [question.id for question in found],
        "by_year": {str(year): sum(question.year == year for question in found) for year in years},
        "shares": {key: round(share, 4) for key, share in shares.items() if share},
    }


def _texts(source: str, tokenizer: str | None) -> Iterator[str]:
    if (epath.Path(source) / "store.json").exists():
        yield from _texts_of_store(source, tokenizer)
        return
    options, rejections = ReadOptions(), RejectionCounts()
    passed_over = RejectionCounts()
    for file in find_files(source, DOCUMENT_FILES, passed_over):
        whole = whole_file(file)
        if is_kind(file.name, RECORD_FILES):
            for record, _ in read_records(whole, options, rejections):
                yield from _strings(record)
        else:
            yield from (document.text for document in read_documents(whole, options, rejections))
    if passed_over.total:
        _log.warning(f"{source}: passed over: {passed_over}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for each in value.values() for text in _strings(each))
    elif isinstance(value, list):
        yield from (text for each in value for text in _strings(each))


def _texts_of_store(source: str, tokenizer: str | None) -> Iterator[str]:
    """The segments of a store's rows; of pairs the prompt with each response."""
    if tokenizer is None:
        raise UserError(f"{source} is a store of tokens: give the --tokenizer that it was made with")
    store = RowStore.open(source)
    check_compatible(
        store,
        kinds=("cpt", "sft", "pairs"),
        vocab_size=store.metadata.vocab_size,
        tokenizer_fingerprint=fingerprint(tokenizer),
    )
    loaded = load_tokenizer(tokenizer)
    for start in range(0, len(store), _ROWS):
        segments = []
        for tokens, segment_ids, branch_ids in store.read(np.arange(start, min(start + _ROWS, len(store)))):
            for segment in np.unique(segment_ids[segment_ids > 0]):
                here = segment_ids == segment
                branches = (1, 2) if store.metadata.kind == "pairs" and (branch_ids[here] == 2).any() else (None,)
                for branch in branches:
                    wanted = here if branch is None else here & ((branch_ids == 0) | (branch_ids == branch))
                    segments.append(tokens[wanted].tolist())
        yield from loaded.batch_decode(segments)


def write_contamination(folder: epath.PathLike, found: Mapping[str, Any]) -> epath.Path:
    """contamination.json in a folder of exam results, where `medllm report` looks for it."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "contamination.json"
    write_whole(file, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return file


def accuracies_apart(folder: epath.PathLike, ids: Sequence[str]) -> Iterator[tuple[str, str, Group]]:
    """Condition, "overlapping" or "other", and the counts, of the grades in a folder of results, if there are any."""
    for condition in CONDITIONS:
        file = epath.Path(folder) / f"grades-{condition}.jsonl"
        if is_there(file):
            grades = read_grades(file)
            yield condition, "overlapping", Group.of([g for g in grades if g.id in set(ids)])
            yield condition, "other", Group.of([g for g in grades if g.id not in set(ids)])

"""The report of a store: its contents, their origin, and what was left out; all of it is in store.json."""

from collections.abc import Iterator, Mapping
from typing import Any

from medllm_jax.data.prepare.statistics import TextStatistics, TokenStatistics, format_statistics
from medllm_jax.data.store import CorpusRows, StoreMetadata
from medllm_jax.errors import UserError, first_line

_KINDS = {"cpt": "documents", "sft": "instructions", "pairs": "preference pairs"}
_STATED = ("provenance", "licence", "processing", "contact")


def report(metadata: StoreMetadata) -> str:
    """Markdown, for people. Places are "file:line"; it quotes no document.

    Raises UserError where a manifest is not what a preparation writes.
    """
    try:
        return "\n\n".join(_parts(metadata)) + "\n"
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        problem = f"{type(error).__name__}: {first_line(error, most=60)}"
        raise UserError(
            f"what store.json says of its input cannot be understood ({problem}): prepare it again"
        ) from error


def _parts(metadata: StoreMetadata) -> Iterator[str]:
    yield f"# Store of {_KINDS[metadata.kind]}"
    yield (
        f"{metadata.rows:,} rows of {metadata.sequence_length:,} tokens, {metadata.tokens:,} tokens in all, "
        f"{metadata.fill:.2%} full ({metadata.packing}); tokenizer {metadata.tokenizer_fingerprint[:12]} of "
        f"{metadata.vocab_size:,} tokens; rows {metadata.digest[:12]}."
    )
    if metadata.recipe:
        yield "Recipe: " + ", ".join(f"{name} {value}" for name, value in metadata.recipe.items()) + "."
    for corpus in metadata.corpora:
        yield from _corpus(corpus)
    yield from _left_out("Left out", metadata.dropped)


def _corpus(corpus: CorpusRows) -> Iterator[str]:
    about = corpus.manifest
    yield f"## {corpus.name}"
    yield (
        f"{corpus.examples:,} examples in {corpus.rows:,} rows, {corpus.tokens:,} tokens; "
        f"{corpus.split_documents:,} longer than a row were cut."
    )
    stated = [f"* {name}: {about[name] or 'not stated'}" for name in _STATED if name in about]
    if "files" in about:
        size = sum(file["bytes"] for file in about["files"])
        rows = f", {about['rows']:,} rows" if "rows" in about else ""
        stated.append(f"* input: {len(about['files']):,} files of {size:,} bytes{rows}, checksum {about['checksum']}")
        stated += [f"* {file['file']} holds {file['origin']}" for file in about["files"] if "origin" in file]
    if stated:
        yield "\n".join(stated)
    if "text" in about:
        yield format_statistics(TextStatistics.from_dict(about["text"]), TokenStatistics.from_dict(about["tokens"]))
    if "personal_data" in about:
        found = about["personal_data"]
        yield f"Personal data: findings in {found['flagged']:,} of {found['documents']:,} documents scanned."
        yield from _left_out("Findings", found["findings"])
    yield from _left_out("Files passed over", about.get("passed_over", {}))
    yield from _left_out("Left out", about.get("dropped", {}))


def _left_out(title: str, counts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if counts:
        lines = (f"* {entry['count']:,} {reason}: {', '.join(entry['first'])}" for reason, entry in counts.items())
        yield "\n".join([f"{title} (with the first places):", "", *lines])

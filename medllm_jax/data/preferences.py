"""Preference pairs: from JSON lines to a packed store for RPO.

A row of input has ``prompt``, ``chosen`` and ``rejected``: three plain strings, or three lists of chat messages
(``[{"role": ..., "content": ...}]``; the prompt ends with a user message, each response is one assistant message).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from etils import epath

from medllm_jax.data.gate import Findings, Gate
from medllm_jax.data.packing import Segment, best_fit, check_sequence_length, pair_segment
from medllm_jax.data.parts import Example, Messages, PartEncoder, messages_problem
from medllm_jax.data.reading import Dropped, Inputs, OnBad, ReadOptions, read_files, reject, text_problem
from medllm_jax.data.store import StoreMetadata
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter
from medllm_jax.data.tokenizer import fingerprint
from medllm_jax.errors import UserError

Side = str | Messages
Prompts = Literal["shared", "repeated"]

_SIDES = ("prompt", "chosen", "rejected")
_BATCH_PAIRS = 256  # for one call of the tokenizer
_SAME = "chosen and rejected are the same"


class Pair(NamedTuple):
    """A preference pair as it was read, all three plain or all three messages, and where it stands, "file:line"."""

    prompt: Side
    chosen: Side
    rejected: Side
    where: str


def read_pairs(inputs: Inputs, on_bad: OnBad, dropped: Dropped) -> Iterator[Pair]:
    """The pairs of all inputs (.jsonl, .parquet; see ``reading.find_files``), in order, one in memory at a time.

    Raises UserError naming file and line of a row that is no pair; with on_bad "skip" it is counted in ``dropped``.
    """
    for row, where in read_files(inputs, ReadOptions(on_bad=on_bad), dropped, _SIDES):
        problem = _pair_problem(row)
        if problem:
            reject(where, problem, on_bad, dropped)
        else:
            yield Pair(row["prompt"], row["chosen"], row["rejected"], where)


def _pair_problem(row: dict[str, Any]) -> str | None:
    """Why a row is not a usable pair, or None."""
    for side in _SIDES:
        if side not in row:
            return f"no field `{side}`"
    in_messages = [isinstance(row[side], list) for side in _SIDES]
    if any(in_messages) and not all(in_messages):
        return "prompt, chosen and rejected are not all strings or all chat messages"
    for side in _SIDES:
        problem = _side_problem(row[side], side) if all(in_messages) else text_problem(row[side])
        if problem:
            return f"{side} is {problem}"
    return _SAME if row["chosen"] == row["rejected"] else None


def _side_problem(messages: list[Any], side: str) -> str | None:
    if problem := messages_problem(messages):
        return problem
    roles = [message["role"] for message in messages]
    if side == "prompt":
        return None if roles and roles[-1] == "user" else "not a list of messages that ends with the user's"
    return None if roles == ["assistant"] else "not exactly one assistant message"


def prepare_pairs(
    inputs: Inputs,
    tokenizer_dir: str | epath.PathLike,
    output: str | epath.PathLike,
    sequence_length: int,
    *,
    pairs_per_row: int | None = None,
    max_prompt_tokens: int | None = None,
    prompts: Prompts = "shared",
    on_bad: OnBad = "error",
    on_long: OnBad = "error",
    gate: Gate = Gate(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda pairs: None,
) -> StoreMetadata:
    """Preference pairs to a store of rows of ``sequence_length`` tokens; returns what ``store.json`` says.

    Prompt and responses are tokenised apart, and each response ends with the tokenizer's end-of-sequence token. Plain
    strings are plain text; messages go through the tokenizer's chat template, the response being what it adds to the
    prompt. A pair is never cut; a row takes as many as fit, or at most ``pairs_per_row``. prompts: "shared" has each
    prompt once, for both responses; "repeated" has it again for the rejected one, which is the same to learn from and
    more to compute.

    on_bad: what to do about a row that is no pair. on_long: what to do about a pair longer than a row, or with a prompt
    of more than ``max_prompt_tokens``. "skip" counts them by reason, with the first line numbers. gate: what is done
    about personal data, which is looked for in all pairs before any is written. progress is called now and then with
    the pairs kept so far. Nothing is left at ``output`` on failure.

    Raises UserError for such rows otherwise, for messages where the tokenizer has no chat template, an input without
    pairs, a tokenizer without the end-of-sequence token, and an output that exists (unless ``overwrite``).
    """
    check_sequence_length(sequence_length)
    if pairs_per_row is not None and pairs_per_row < 1:
        raise UserError(f"pairs_per_row is {pairs_per_row}: a row needs at least one pair")
    with RowStoreWriter(output, "pairs", sequence_length, overwrite=overwrite) as writer:
        encoder = PartEncoder(tokenizer_dir)
        found, dropped = Findings(), Dropped()
        for pair in read_pairs(inputs, on_bad, Dropped()):
            found.add(gate.scanner, tuple(_texts(pair)), pair.where)
        gate.check("the pairs", found)
        count = 0

        def segments() -> Iterator[Segment]:
            nonlocal count
            pairs = (_masked(pair, gate) for pair in read_pairs(inputs, on_bad, dropped))
            for batch in iter(lambda: list(itertools.islice(pairs, _BATCH_PAIRS)), []):
                for where, encoded in _encode(encoder, batch, on_bad, dropped):
                    segment = pair_segment(*encoded, repeat_prompt=prompts == "repeated")
                    problem = _length_problem(encoded, segment, sequence_length, max_prompt_tokens)
                    if problem:
                        reject(where, problem, on_long, dropped)
                        continue
                    count += 1
                    yield segment
                progress(count)

        for row in best_fit(segments(), sequence_length, max_segments=pairs_per_row):
            writer.append(row[None], "pairs")
        if not count:
            raise UserError(f"no preference pair to prepare in {inputs}; left out: {dropped}")
        return writer.finish(
            {"pairs": CorpusFacts(count, manifest={"personal_data": found.as_dict()})},
            packing="pairs",
            vocab_size=len(encoder.tokenizer),
            tokenizer_fingerprint=fingerprint(tokenizer_dir),
            eos_token_id=encoder.tokenizer.eos_token_id,
            dropped=dropped.as_dict(),
        )


class _Encoded(NamedTuple):
    """Token ids, the responses with their end."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def _encode(
    encoder: PartEncoder, pairs: Iterable[Pair], on_bad: OnBad, dropped: Dropped
) -> Iterator[tuple[str, _Encoded]]:
    """(where, token ids) of each pair that can be encoded, in order; the others are rejected."""
    examples = []
    for pair in pairs:
        if encoder.holds_control_tokens(list(_texts(pair))):
            reject(pair.where, "a control token stands in the text (use chat messages)", on_bad, dropped)
            continue
        rendered = isinstance(pair.prompt, list)
        parts = _render(encoder, pair) if rendered else pair[:3]
        if parts is None:
            reject(pair.where, "the chat template cannot render the messages", on_bad, dropped)
        else:
            examples.append(Example(pair.where, parts, rendered))
    for example, (prompt, chosen, rejected) in zip(examples, encoder.encode(examples), strict=True):
        chosen, rejected = encoder.ended(chosen), encoder.ended(rejected)
        if chosen == rejected:
            reject(example.where, _SAME, on_bad, dropped)
        else:
            yield example.where, _Encoded(prompt, chosen, rejected)


def _render(encoder: PartEncoder, pair: Pair) -> tuple[str, str, str] | None:
    """Prompt and responses as the chat template writes them, or None where it refuses or rewrites the prompt."""
    prompt = encoder.render(pair.prompt, pair.where, prompt=True)
    full = [encoder.render(pair.prompt + response, pair.where) for response in (pair.chosen, pair.rejected)]
    if prompt is None or not all(text is not None and text.startswith(prompt) for text in full):
        return None
    # The line break that templates write after a turn comes after the model has stopped: no part of the response.
    chosen, rejected = (text.removeprefix(prompt).rstrip() for text in full)
    return prompt, chosen, rejected


def _texts(pair: Pair) -> Iterator[str]:
    for side in pair[:3]:
        if isinstance(side, str):
            yield side
        else:
            yield from (message["content"] for message in side)


def _masked(pair: Pair, gate: Gate) -> Pair:
    def mask(side: Side) -> Side:
        if isinstance(side, str):
            return gate.mask(side)
        return [message | {"content": gate.mask(message["content"])} for message in side]

    return pair._replace(prompt=mask(pair.prompt), chosen=mask(pair.chosen), rejected=mask(pair.rejected))


def _length_problem(
    encoded: _Encoded, segment: Segment, sequence_length: int, max_prompt_tokens: int | None
) -> str | None:
    if max_prompt_tokens is not None and len(encoded.prompt) > max_prompt_tokens:
        return f"the prompt is longer than {max_prompt_tokens} tokens"
    if len(segment.tokens) > sequence_length:
        return f"prompt, chosen and rejected together are longer than a row of {sequence_length} tokens"
    return None

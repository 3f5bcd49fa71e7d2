"""Preference pairs: from JSON lines to a packed store for RPO.

A row of input has ``prompt``, ``chosen`` and ``rejected``: three plain strings, or three lists of chat messages
(``[{"role": ..., "content": ...}]``; the prompt ends with a user message, each response is one assistant message).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from etils import epath

from medllm_jax.data.packing import Segment, pair_segment
from medllm_jax.data.prepare.examples import (
    ChatExample,
    ChatTemplate,
    Encoded,
    Example,
    ExampleWriter,
    TextExample,
    encode,
    ended,
    fitting,
    messages_problem,
    render,
)
from medllm_jax.data.prepare.files import Inputs
from medllm_jax.data.prepare.pii_gate import PiiGate
from medllm_jax.data.prepare.readers import ReadOptions, read_all_records, text_problem
from medllm_jax.data.prepare.rejections import OnBad, Rejected, RejectionCounts, reject
from medllm_jax.data.store import StoreMetadata
from medllm_jax.errors import UserError
from medllm_jax.storage.lease import sole_writer

Prompts = Literal["shared", "repeated"]

_SIDES = ("prompt", "chosen", "rejected")
_SAME = "chosen and rejected are the same"


def read_pairs(inputs: Inputs, on_bad: OnBad, rejections: RejectionCounts) -> Iterator[Example]:
    """The pairs of all inputs (.jsonl, .parquet; see ``files.find_files``), in order, one in memory at a time.

    Their sides are prompt, chosen and rejected. Raises UserError naming file and line of a row that is no pair; with
    on_bad "skip" it is counted in ``rejections``.
    """
    for row, where in read_all_records(inputs, ReadOptions(on_bad=on_bad), rejections, _SIDES):
        if problem := _pair_problem(row):
            reject(Rejected(where, problem), on_bad, rejections)
        else:
            kind = TextExample if isinstance(row["prompt"], str) else ChatExample
            yield kind(tuple(row[side] for side in _SIDES), where)


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


@sole_writer("output", beside=True)
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
    gate: PiiGate = PiiGate(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda pairs: None,
) -> StoreMetadata:
    """Prepares a store of rows of ``sequence_length`` tokens from pairs; returns the content of ``store.json``.

    Prompt and responses are tokenised separately, and each response ends with the tokenizer's end-of-sequence token.
    Plain strings are plain text; messages go through the tokenizer's chat template, and a response is what it adds to
    the prompt. A pair is never cut; a row takes as many as fit, or at most ``pairs_per_row``. prompts: "shared" has
    each prompt once, for both responses; "repeated" has it again for the rejected one, which gives the same loss and
    costs more.

    on_bad: what to do about a row that is no pair. on_long: what to do about a pair longer than a row, or with a prompt
    of more than ``max_prompt_tokens``. "skip" counts them by reason, with the first line numbers. gate: what is done
    about personal data, which is looked for in all pairs before any is written. progress is called now and then with
    the pairs kept so far. Nothing is left at ``output`` on failure.

    Raises UserError for such rows otherwise, for messages where the tokenizer has no chat template, an input without
    pairs, a tokenizer without the end-of-sequence token, and an output that exists (unless ``overwrite``).
    """
    if pairs_per_row is not None and pairs_per_row < 1:
        raise UserError(f"pairs_per_row is {pairs_per_row}: a row needs at least one pair")
    with ExampleWriter(
        "pairs",
        "pairs",
        inputs,
        tokenizer_dir,
        output,
        sequence_length,
        on_bad=on_bad,
        on_long=on_long,
        gate=gate,
        overwrite=overwrite,
    ) as writer:
        writer.scan(read_pairs(inputs, on_bad, RejectionCounts()))
        pairs = writer.masked(read_pairs(inputs, on_bad, writer.rejections))
        rendered = render(pairs, writer.template, _chat_parts)
        encoded = encode(rendered, writer.tokenizer)
        segments = _segments(
            encoded, writer.eos, sequence_length, max_prompt_tokens, repeat_prompt=prompts == "repeated"
        )
        return writer.write(
            segments,
            max_per_row=pairs_per_row,
            settings={"prompts": prompts, "pairs_per_row": pairs_per_row, "max_prompt_tokens": max_prompt_tokens},
            progress=progress,
        )


def _chat_parts(pair: ChatExample, template: ChatTemplate) -> tuple[str, str, str]:
    """Prompt and responses as the chat template writes them; raises NotRendered."""
    messages, chosen, rejected = pair.sides
    prompt = template.render(messages, pair.where, prompt=True)
    return (
        prompt,
        template.response(messages + chosen, prompt, pair.where),
        template.response(messages + rejected, prompt, pair.where),
    )


def _segments(
    pairs: Iterable[Encoded | Rejected],
    eos: int,
    sequence_length: int,
    max_prompt_tokens: int | None,
    *,
    repeat_prompt: bool,
) -> Iterator[Segment | Rejected]:
    """A segment of each pair, in order; each response ends with the end-of-sequence token."""
    for pair in pairs:
        if isinstance(pair, Rejected):
            yield pair
            continue
        prompt, chosen, rejected = pair.parts[0], ended(pair.parts[1], eos), ended(pair.parts[2], eos)
        if np.array_equal(chosen, rejected):
            yield Rejected(pair.where, _SAME)
        elif max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
            yield Rejected(pair.where, f"the prompt is longer than {max_prompt_tokens} tokens", too_long=True)
        else:
            segment = pair_segment(prompt, chosen, rejected, repeat_prompt=repeat_prompt)
            yield fitting(segment, sequence_length, pair.where, "prompt, chosen and rejected together are")

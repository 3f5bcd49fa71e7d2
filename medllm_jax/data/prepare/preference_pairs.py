"""Preference pairs: from JSON lines to a packed store for RPO.

A row of input has one of the forms in FORMS. The commonest: ``prompt``, ``chosen`` and ``rejected``, three plain
strings, or three lists of chat messages (``[{"role": ..., "content": ...}]``; the prompt ends with a user message, each
response is one assistant message).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from medllm_jax.data.packing import Segment, pair_segment
from medllm_jax.data.prepare.chat_messages import (
    Messages,
    NotUnderstood,
    read_messages,
    said,
    shared_beginning,
    with_system,
)
from medllm_jax.data.prepare.examples import (
    ChatExample,
    ChatTemplate,
    Encoded,
    Example,
    ExampleWriter,
    encode,
    ended,
    fitting,
    render,
)
from medllm_jax.data.prepare.files import Inputs
from medllm_jax.data.prepare.forms import Fields, Form, Forms, Sides, alpaca_prompt, read_rows, text_sides
from medllm_jax.data.prepare.hub_dataset import local_inputs
from medllm_jax.data.prepare.pii_gate import PiiGate
from medllm_jax.data.prepare.rejections import OnBad, Reading, Rejected, RejectionCounts
from medllm_jax.data.store import StoreMetadata
from medllm_jax.data.store_writer import check_replaceable
from medllm_jax.errors import UserError
from medllm_jax.storage.lease import sole_writer

Prompts = Literal["shared", "repeated"]

_SIDES = ("prompt", "chosen", "rejected")
_SAME = "chosen and rejected are the same"


def read_pairs(inputs: Inputs, on_bad: Reading, rejections: RejectionCounts) -> Iterator[Example]:
    """The pairs of all inputs (.jsonl, .parquet; see ``files.find_files``), in order, one in memory at a time.

    Their sides are prompt, chosen and rejected. Raises UserError naming file and line of a row that is no pair; with
    on_bad "skip" it is counted in ``rejections``.
    """
    return read_rows(inputs, pair_forms(), on_bad, rejections)


def _prompt_chosen_rejected(fields: Fields) -> Sides:
    prompt, *responses = (fields[side] for side in _SIDES)
    are_chats = [isinstance(response, list | dict) for response in responses]
    if not isinstance(prompt, list) and not any(are_chats):
        return _different(text_sides(fields, _SIDES))
    if isinstance(prompt, str) and all(are_chats):
        sides = _whole_chats(fields)
        if any(message == said("user", prompt) for message in sides[0]):
            return sides
    if not isinstance(prompt, list) or not all(are_chats):
        raise NotUnderstood("prompt, chosen and rejected are not all strings or all chat messages")
    return _chat("prompt", fields)


def _implicit(fields: Fields) -> Sides:
    responses = (fields["chosen"], fields["rejected"])
    if not all(isinstance(response, list) for response in responses):
        raise NotUnderstood("no field `prompt`", "name the field that holds the prompt with --columns prompt=FIELD")
    return _whole_chats(fields)


def _after_messages(fields: Fields) -> Sides:
    """``messages`` are the prompt, unless chosen and rejected bring it: then they repeat one of the two."""
    one, other = (read_messages(fields[side], side) for side in ("chosen", "rejected"))
    return _whole_chats(fields) if shared_beginning(one, other) else _chat("messages", fields)


def _after_conversations(fields: Fields) -> Sides:
    return _chat("conversations", fields)


def _alpaca(fields: Fields) -> Sides:
    return _different((alpaca_prompt(fields), *text_sides(fields, ("chosen", "rejected"))))


def _chat(prompt: str, fields: Fields) -> Sides:
    """A chat that ends with the user's message, and the two messages that may follow."""
    messages = with_system(read_messages(fields[prompt], prompt), fields.get("system"))
    if not messages or messages[-1]["role"] != "user":
        raise NotUnderstood(f"{prompt} is not a list of messages that ends with the user's")
    return _different((messages, _answer(fields, "chosen"), _answer(fields, "rejected")))


def _answer(fields: Fields, side: str) -> Messages:
    messages = read_messages(fields[side], side)
    if [message["role"] for message in messages] != ["assistant"]:
        raise NotUnderstood(f"{side} is not exactly one assistant message")
    return messages


def _whole_chats(fields: Fields) -> Sides:
    """Two chats that differ in their last message; the prompt is what they share."""
    chosen, rejected = _different(tuple(read_messages(fields[side], side) for side in ("chosen", "rejected")))
    shared = shared_beginning(chosen, rejected)
    if not shared or shared[-1]["role"] != "user":
        raise NotUnderstood("chosen and rejected do not begin with the same messages, up to one of the user's")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if [message["role"] for message in messages[len(shared) :]] != ["assistant"]:
            raise NotUnderstood(f"{side} is not exactly one assistant message after those that both begin with")
    return with_system(shared, fields.get("system")), chosen[len(shared) :], rejected[len(shared) :]


def _different(sides: Any) -> Any:
    """The sides; raises NotUnderstood where the responses, the last two, are the same."""
    if sides[-1] == sides[-2]:
        raise NotUnderstood(_SAME)
    return sides


_PLAIN = Form(
    "prompt, chosen, rejected", _SIDES, _prompt_chosen_rejected, ("system",), beside=("messages", "instruction")
)
FORMS = (
    _PLAIN,
    Form("ShareGPT", ("conversations", "chosen", "rejected"), _after_conversations, ("system",)),
    Form("Alpaca", ("instruction", "chosen", "rejected"), _alpaca, ("input", "system", "history")),
    Form("chat", ("messages", "chosen", "rejected"), _after_messages, ("system",)),
    Form("two chats", ("chosen", "rejected"), _implicit, ("system",)),
)


def pair_forms(columns: Mapping[str, str] = {}, *, chat: bool = False) -> Forms:
    """The forms of preference pairs; see `Forms`."""
    return Forms(FORMS, _PLAIN, columns=columns, chat=chat)


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
    columns: Mapping[str, str] = {},
    chat: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda pairs: None,
) -> StoreMetadata:
    """Prepares a store of rows of ``sequence_length`` tokens from pairs; returns the content of ``store.json``.

    Prompt and responses are tokenised separately, and each response ends with the tokenizer's end-of-sequence token.
    Plain strings are plain text; messages, and strings with ``chat``, go through the tokenizer's chat template, and a
    response is what it adds to the prompt. columns: field of a form -> the name that it has in these rows. A pair is
    never cut; a row takes as many as fit, or at most ``pairs_per_row``. prompts: "shared" has each prompt once, for
    both responses; "repeated" has it again for the rejected one, which gives the same loss and costs more.

    on_bad: what to do about a row that is no pair. on_long: what to do about a pair longer than a row, or with a prompt
    of more than ``max_prompt_tokens``. "skip" counts them by reason, with the first line numbers. gate: what is done
    about personal data, which is looked for in all pairs before any is written. progress is called now and then with
    the pairs kept so far. Nothing is left at ``output`` on failure.

    Raises UserError for such rows otherwise, for messages where the tokenizer has no chat template, an input without
    pairs, a tokenizer without the end-of-sequence token, and an output that exists (unless ``overwrite``).
    """
    if pairs_per_row is not None and pairs_per_row < 1:
        raise UserError(f"pairs_per_row is {pairs_per_row}: a row needs at least one pair")
    forms = pair_forms(columns, chat=chat)
    check_replaceable(epath.Path(output), overwrite=overwrite)  # before anything is downloaded
    inputs = local_inputs(inputs)
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
        pairs = writer.examples(functools.partial(read_rows, inputs, forms))
        rendered = render(pairs, writer.template, _chat_parts)
        encoded = encode(rendered, writer.tokenizer)
        segments = _segments(
            encoded, writer.eos, sequence_length, max_prompt_tokens, repeat_prompt=prompts == "repeated"
        )
        metadata = writer.write(
            segments,
            max_per_row=pairs_per_row,
            settings={
                "prompts": prompts,
                "pairs_per_row": pairs_per_row,
                "max_prompt_tokens": max_prompt_tokens,
                **forms.settings,
            },
            progress=progress,
        )
    forms.say_what_was_left_aside()
    return metadata


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
        else:
            segment = pair_segment(prompt, chosen, rejected, repeat_prompt=repeat_prompt)
            fitted = fitting(segment, sequence_length, pair.where, "prompt, chosen and rejected together are")
            if max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
                reason = f"the prompt is longer than {max_prompt_tokens} tokens"
                needs = fitted.needs if isinstance(fitted, Rejected) else ()
                yield Rejected(pair.where, reason, too_long=True, needs=(("--max-prompt-tokens", len(prompt)), *needs))
            else:
                yield fitted

"""Instructions with their responses: from JSON lines to a packed store for supervised fine-tuning.

A row of input has ``prompt`` and ``response``, two plain strings, or ``messages``, a chat (``[{"role": ..., "content":
...}]``) that ends with an assistant's message. What is learnt is every message of the assistant, and nothing else.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from medllm_jax.data.gate import Findings, Gate
from medllm_jax.data.packing import Segment, best_fit, check_sequence_length, instruction_segment
from medllm_jax.data.parts import Example, Messages, PartEncoder, messages_problem
from medllm_jax.data.reading import Dropped, Inputs, OnBad, ReadOptions, read_files, reject, text_problem
from medllm_jax.data.store import StoreMetadata
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter
from medllm_jax.data.tokenizer import fingerprint
from medllm_jax.errors import UserError

_BATCH = 256  # conversations for one call of the tokenizer


class Instruction(NamedTuple):
    """A conversation as it was read: (prompt, response), or messages. where: "file:line"."""

    texts: tuple[str, str] | Messages
    where: str


def read_instructions(inputs: Inputs, on_bad: OnBad, dropped: Dropped) -> Iterator[Instruction]:
    """The conversations of all inputs (.jsonl, .parquet; see ``reading.find_files``), in order, one at a time.

    Raises UserError naming file and line of a row that is none; with on_bad "skip" it is counted in ``dropped``.
    """
    for row, where in read_files(inputs, ReadOptions(on_bad=on_bad), dropped, ("prompt", "response", "messages")):
        if problem := _problem(row):
            reject(where, problem, on_bad, dropped)
        else:
            yield Instruction(row.get("messages") or (row["prompt"], row["response"]), where)


def _problem(row: dict[str, Any]) -> str | None:
    """Why a row is no conversation, or None."""
    messages = row.get("messages")
    if messages is None:
        for side in ("prompt", "response"):
            if row.get(side) is None:
                return f"no field `{side}`, and no `messages`"
            if problem := text_problem(row[side]):
                return f"{side} is {problem}"
        return None
    if not isinstance(messages, list) or not messages:
        return "messages is not a list of messages with role and content"
    if problem := messages_problem(messages):
        return f"messages is {problem}"
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant" or roles[0] == "assistant":
        return "messages does not begin with the system's or the user's and end with the assistant's"
    return None


def prepare_instructions(
    inputs: Inputs,
    tokenizer_dir: str | epath.PathLike,
    output: str | epath.PathLike,
    sequence_length: int,
    *,
    on_bad: OnBad = "error",
    on_long: OnBad = "error",
    gate: Gate = Gate(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda conversations: None,
) -> StoreMetadata:
    """Conversations to a store of rows of ``sequence_length`` tokens; returns what ``store.json`` says.

    What is given and what is learnt are tokenised apart, and the last response ends with the tokenizer's
    end-of-sequence token. Messages go through the tokenizer's chat template. A conversation is never cut, and a row
    takes as many as fit.

    on_bad: what to do about a row that is no conversation. on_long: about one longer than a row. "skip" counts them by
    reason, with the first line numbers. gate: what is done about personal data, which is looked for in all
    conversations before any is written. progress is called now and then with the conversations kept so far. Nothing is
    left at ``output`` on failure.

    Raises UserError for such rows otherwise, for messages where the tokenizer has no chat template, an input without
    conversations, a tokenizer without the end-of-sequence token, and an output that exists (unless ``overwrite``).
    """
    check_sequence_length(sequence_length)
    with RowStoreWriter(output, "sft", sequence_length, overwrite=overwrite) as writer:
        encoder = PartEncoder(tokenizer_dir)
        found, dropped = Findings(), Dropped()
        for instruction in read_instructions(inputs, on_bad, Dropped()):
            found.add(gate.scanner, tuple(_texts(instruction)), instruction.where)
        gate.check("the instructions", found)
        count = 0

        def segments() -> Iterator[Segment]:
            nonlocal count
            masked = (_masked(instruction, gate) for instruction in read_instructions(inputs, on_bad, dropped))
            for batch in iter(lambda: list(itertools.islice(masked, _BATCH)), []):
                for where, segment in _encode(encoder, batch, on_bad, dropped):
                    if len(segment.tokens) > sequence_length:
                        problem = f"prompt and responses are longer than a row of {sequence_length} tokens"
                        reject(where, problem, on_long, dropped)
                    else:
                        count += 1
                        yield segment
                progress(count)

        for row in best_fit(segments(), sequence_length):
            writer.append(row[None], "instructions")
        if not count:
            raise UserError(f"no instruction to prepare in {inputs}; left out: {dropped}")
        return writer.finish(
            {"instructions": CorpusFacts(count, manifest={"personal_data": found.as_dict()})},
            packing="instructions",
            vocab_size=len(encoder.tokenizer),
            tokenizer_fingerprint=fingerprint(tokenizer_dir),
            eos_token_id=encoder.tokenizer.eos_token_id,
            dropped=dropped.as_dict(),
        )


def _encode(
    encoder: PartEncoder, instructions: Iterable[Instruction], on_bad: OnBad, dropped: Dropped
) -> Iterator[tuple[str, Segment]]:
    """(where, segment) of each conversation that can be encoded, in order; the others are rejected."""
    examples = []
    for instruction in instructions:
        if encoder.holds_control_tokens(list(_texts(instruction))):
            reject(instruction.where, "a control token stands in the text (use chat messages)", on_bad, dropped)
            continue
        rendered = isinstance(instruction.texts, list)
        parts = _render(encoder, instruction) if rendered else instruction.texts
        if parts is None:
            reject(instruction.where, "the chat template cannot render the messages", on_bad, dropped)
        else:
            examples.append(Example(instruction.where, parts, rendered))
    for example, encoded in zip(examples, encoder.encode(examples), strict=True):
        *before, last = encoded
        turns = [*before, encoder.ended(last)]
        yield example.where, instruction_segment([(tokens, n % 2 == 1) for n, tokens in enumerate(turns)])


def _render(encoder: PartEncoder, instruction: Instruction) -> tuple[str, ...] | None:
    """Context and response in turn, as the chat template writes them; None where it refuses or rewrites a beginning."""
    messages, parts, written = instruction.texts, [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = encoder.render(messages[:number], instruction.where, prompt=True)
        after = encoder.render(messages[: number + 1], instruction.where)
        if before is None or after is None or not before.startswith(written) or not after.startswith(before):
            return None
        # The line break that templates write after a turn comes after the model has stopped: it is context.
        response = after.removeprefix(before).rstrip()
        parts += [before.removeprefix(written), response]
        written = before + response
    return tuple(parts)


def _texts(instruction: Instruction) -> Iterator[str]:
    if isinstance(instruction.texts, tuple):
        yield from instruction.texts
    else:
        yield from (message["content"] for message in instruction.texts)


def _masked(instruction: Instruction, gate: Gate) -> Instruction:
    if isinstance(instruction.texts, tuple):
        return instruction._replace(texts=tuple(map(gate.mask, instruction.texts)))
    return instruction._replace(texts=[m | {"content": gate.mask(m["content"])} for m in instruction.texts])

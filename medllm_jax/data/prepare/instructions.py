"""Instructions with their responses: from JSON lines to a packed store for supervised fine-tuning.

A row of input has ``prompt`` and ``response``, two plain strings, or ``messages``, a chat (``[{"role": ..., "content":
...}]``) that ends with an assistant's message. The model learns every message of the assistant, and nothing else.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from medllm_jax.data.packing import Segment, instruction_segment
from medllm_jax.data.prepare.examples import (
    ChatExample,
    ChatTemplate,
    Encoded,
    Example,
    ExampleWriter,
    NotRendered,
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
from medllm_jax.storage.lease import sole_writer

_FIELDS = ("prompt", "response", "messages")


def read_instructions(inputs: Inputs, on_bad: OnBad, rejections: RejectionCounts) -> Iterator[Example]:
    """The conversations of all inputs (.jsonl, .parquet; see ``files.find_files``), in order, one at a time.

    Their sides are prompt and response, or one chat. Raises UserError naming file and line of a row that is none; with
    on_bad "skip" it is counted in ``rejections``.
    """
    for row, where in read_all_records(inputs, ReadOptions(on_bad=on_bad), rejections, _FIELDS):
        if problem := _problem(row):
            reject(Rejected(where, problem), on_bad, rejections)
        elif row.get("messages") is not None:
            yield ChatExample((row["messages"],), where)
        else:
            yield TextExample((row["prompt"], row["response"]), where)


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


@sole_writer("output", beside=True)
def prepare_instructions(
    inputs: Inputs,
    tokenizer_dir: str | epath.PathLike,
    output: str | epath.PathLike,
    sequence_length: int,
    *,
    on_bad: OnBad = "error",
    on_long: OnBad = "error",
    gate: PiiGate = PiiGate(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda conversations: None,
) -> StoreMetadata:
    """Prepares a store of rows of ``sequence_length`` tokens from conversations; returns the content of ``store.json``.

    Context and responses are tokenised separately, and the last response ends with the tokenizer's
    end-of-sequence token. Messages go through the tokenizer's chat template. A conversation is never cut, and a row
    takes as many as fit.

    on_bad: what to do about a row that is no conversation. on_long: about one longer than a row. "skip" counts them by
    reason, with the first line numbers. gate: what is done about personal data, which is looked for in all
    conversations before any is written. progress is called now and then with the conversations kept so far. Nothing is
    left at ``output`` on failure.

    Raises UserError for such rows otherwise, for messages where the tokenizer has no chat template, an input without
    conversations, a tokenizer without the end-of-sequence token, and an output that exists (unless ``overwrite``).
    """
    with ExampleWriter(
        "sft",
        "instructions",
        inputs,
        tokenizer_dir,
        output,
        sequence_length,
        on_bad=on_bad,
        on_long=on_long,
        gate=gate,
        overwrite=overwrite,
    ) as writer:
        writer.scan(read_instructions(inputs, on_bad, RejectionCounts()))
        conversations = writer.masked(read_instructions(inputs, on_bad, writer.rejections))
        rendered = render(conversations, writer.template, _chat_parts)
        encoded = encode(rendered, writer.tokenizer)
        segments = _segments(encoded, writer.eos, sequence_length)
        return writer.write(segments, progress=progress)


def _chat_parts(conversation: ChatExample, template: ChatTemplate) -> list[str]:
    """Context and response in turn, as the chat template writes them; raises NotRendered."""
    (messages,) = conversation.sides
    parts: list[str] = []
    written = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:number], conversation.where, prompt=True)
        if not before.startswith(written):
            raise NotRendered("the chat template rewrites earlier messages when one follows")
        response = template.response(messages[: number + 1], before, conversation.where)
        parts += [before.removeprefix(written), response]
        written = before + response
    return parts


def _segments(
    conversations: Iterable[Encoded | Rejected], eos: int, sequence_length: int
) -> Iterator[Segment | Rejected]:
    """A segment of each conversation, in order: every other part is a response, and the last one ends."""
    for conversation in conversations:
        if isinstance(conversation, Rejected):
            yield conversation
            continue
        *before, last = conversation.parts
        turns = [(tokens, number % 2 == 1) for number, tokens in enumerate([*before, ended(last, eos)])]
        yield fitting(instruction_segment(turns), sequence_length, conversation.where, "prompt and responses are")

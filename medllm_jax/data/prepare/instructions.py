"""Instructions with their responses: from JSON lines to a packed store for supervised fine-tuning.

A row of input has one of the forms in FORMS: two plain strings, or a chat that ends with an assistant's message. The
model learns the response, or every message of the assistant, and nothing else.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from etils import epath

from medllm_jax.data.packing import Segment, instruction_segment
from medllm_jax.data.prepare.chat_messages import Messages, NotUnderstood, read_messages, with_system
from medllm_jax.data.prepare.examples import (
    ChatExample,
    ChatTemplate,
    Encoded,
    ExampleWriter,
    NotRendered,
    encode,
    ended,
    fitting,
    render,
)
from medllm_jax.data.prepare.files import Inputs
from medllm_jax.data.prepare.forms import (
    Fields,
    Form,
    Forms,
    Sides,
    alpaca_prompt,
    chat_sides,
    read_rows,
    text_sides,
)
from medllm_jax.data.prepare.hub_dataset import local_inputs
from medllm_jax.data.prepare.pii_gate import PiiGate
from medllm_jax.data.prepare.rejections import OnBad, Rejected
from medllm_jax.data.store import StoreMetadata
from medllm_jax.data.store_writer import check_replaceable
from medllm_jax.storage.lease import sole_writer


def _messages(fields: Fields) -> Sides:
    return _chat("messages", fields)


def _conversations(fields: Fields) -> Sides:
    return _chat("conversations", fields)


def _chat(side: str, fields: Fields) -> Sides:
    messages = read_messages(fields[side], side)
    if not messages:
        raise NotUnderstood(f"{side} is not a list of messages with role and content")
    if messages[-1]["role"] != "assistant" or messages[0]["role"] == "assistant":
        raise NotUnderstood(f"{side} does not begin with the system's or the user's and end with the assistant's")
    return (with_system(messages, fields.get("system")),)


def _prompt_and(response: str, fields: Fields) -> Sides:
    """Two strings, or a chat and how it goes on; of the latter, what goes on is learnt."""
    if isinstance(fields["prompt"], str) or isinstance(fields[response], str):
        return text_sides(fields, ("prompt", response))
    if not isinstance(fields["prompt"], list):
        return text_sides(fields, ("prompt",))
    prompt = with_system(read_messages(fields["prompt"], "prompt"), fields.get("system"))
    completion = read_messages(fields[response], response)
    if not prompt or prompt[-1]["role"] == "assistant" or prompt[0]["role"] == "assistant":
        raise NotUnderstood("prompt is not a list of messages that ends with the user's")
    if not completion or completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
        raise NotUnderstood(f"{response} does not begin and end with the assistant's messages")
    return prompt, completion


def _alpaca(fields: Fields) -> Sides:
    return alpaca_prompt(fields), *text_sides(fields, ("output",))


_PLAIN = Form("prompt and response", ("prompt", "response"), functools.partial(_prompt_and, "response"), ("system",))
FORMS = (
    Form("chat", ("messages",), _messages, ("system",), beside=("prompt", "response", "completion")),
    Form("ShareGPT", ("conversations",), _conversations, ("system",)),
    _PLAIN,
    Form("TRL", ("prompt", "completion"), functools.partial(_prompt_and, "completion"), ("system",)),
    Form("Alpaca", ("instruction", "output"), _alpaca, ("input", "system", "history")),
)


def instruction_forms(columns: Mapping[str, str] = {}, *, chat: bool = False) -> Forms:
    """The forms of instructions; see `Forms`."""
    missing = "no field `{}`, and no `messages`"
    return Forms(FORMS, _PLAIN, missing, columns=columns, chat=chat, as_chat=_as_one_chat)


def _as_one_chat(sides: Sides, fields: Fields) -> tuple[Messages, ...]:
    """A prompt and a response as one chat: the answers of its history are learnt, as those of any chat."""
    prompt, response = chat_sides(sides, fields)
    return (prompt + response,)


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
    columns: Mapping[str, str] = {},
    chat: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda conversations: None,
) -> StoreMetadata:
    """Prepares a store of rows of ``sequence_length`` tokens from conversations; returns the content of ``store.json``.

    Context and responses are tokenised separately, and the last response ends with the tokenizer's
    end-of-sequence token. Messages go through the tokenizer's chat template, and with ``chat`` strings do too. columns:
    field of a form -> the name that it has in these rows. A conversation is never cut, and a row takes as many as fit.

    on_bad: what to do about a row that is no conversation. on_long: about one longer than a row. "skip" counts them by
    reason, with the first line numbers. gate: what is done about personal data, which is looked for in all
    conversations before any is written. progress is called now and then with the conversations kept so far. Nothing is
    left at ``output`` on failure.

    Raises UserError for such rows otherwise, for messages where the tokenizer has no chat template, an input without
    conversations, a tokenizer without the end-of-sequence token, and an output that exists (unless ``overwrite``).
    """
    forms = instruction_forms(columns, chat=chat)
    check_replaceable(epath.Path(output), overwrite=overwrite)  # before anything is downloaded
    inputs = local_inputs(inputs)
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
        conversations = writer.examples(functools.partial(read_rows, inputs, forms))
        rendered = render(conversations, writer.template, _chat_parts)
        encoded = encode(rendered, writer.tokenizer)
        segments = _segments(encoded, writer.eos, sequence_length)
        metadata = writer.write(segments, settings=forms.settings, progress=progress)
    forms.say_what_was_left_aside()
    return metadata


def _chat_parts(conversation: ChatExample, template: ChatTemplate) -> list[str]:
    """Context and response in turn, as the chat template writes them; raises NotRendered."""
    prompt, *more = conversation.sides
    messages = prompt + [message for side in more for message in side]
    given = len(prompt) if more else 0  # where how it goes on stands apart, that alone is learnt
    parts: list[str] = []
    written = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < given:
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

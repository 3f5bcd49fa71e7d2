"""Examples of what to answer, instructions and preference pairs alike: from rows of text to a packed store.

An example has sides: a prompt and its responses, as plain strings or as chat messages. They are tokenised apart, so
that no token reaches from what a model is given into what it is to write.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from medllm_jax.data.batch import Kind
from medllm_jax.data.packing import Segment, best_fit, check_sequence_length
from medllm_jax.data.prepare.pii_gate import Findings, Gate
from medllm_jax.data.prepare.reading import (
    ROW_FILES,
    Dropped,
    Inputs,
    OnBad,
    find_files,
    manifest_of,
    reject,
    take_inventory,
    text_problem,
)
from medllm_jax.data.store import StoreMetadata
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter
from medllm_jax.data.tokenizer import (
    control_tokens,
    encode_plain,
    encode_rendered,
    eos_of,
    fingerprint,
    load_tokenizer,
)
from medllm_jax.errors import UserError

Messages = list[dict[str, str]]
Side = str | Messages

_ROLES = ("system", "user", "assistant")
_BATCH = 256  # examples for one call of the tokenizer
_WHOLE = 2**62  # bytes of a slice: files are not divided


class Example(NamedTuple):
    """An example as it was read, its sides all strings or all chat messages; where: "file:line"."""

    sides: tuple[Side, ...]
    where: str

    @property
    def in_messages(self) -> bool:
        return not isinstance(self.sides[0], str)

    def texts(self) -> tuple[str, ...]:
        """All that a person may have written."""
        if self.in_messages:
            return tuple(message["content"] for side in self.sides for message in side)
        return self.sides

    def masked(self, mask: Callable[[str], str]) -> "Example":
        if self.in_messages:
            sides = ([message | {"content": mask(message["content"])} for message in side] for side in self.sides)
            return self._replace(sides=tuple(sides))
        return self._replace(sides=tuple(map(mask, self.sides)))


class Refused(NamedTuple):
    """Why an example is left out; long: it is too long, and nothing else is wrong with it."""

    reason: str
    long: bool = False


class Format(NamedTuple):
    """What sets one kind of example apart.

    kind: of the store; name: of its one corpus; long: what is said of an example that is longer than a row;
    render: the parts of an example of messages as a chat template writes them, or None where it can't;
    segment: what the token ids of an example's parts make; settings: more that the rows depend on, for the recipe.
    """

    kind: Kind
    name: str
    long: str
    render: Callable[["PartEncoder", Example], Sequence[str] | None]
    segment: Callable[["PartEncoder", list[list[int]]], Segment | Refused]
    settings: Mapping[str, Any] = {}


def prepare_examples(
    form: Format,
    read: Callable[[Inputs, OnBad, Dropped], Iterator[Example]],
    inputs: Inputs,
    tokenizer_dir: str | epath.PathLike,
    output: str | epath.PathLike,
    sequence_length: int,
    *,
    most_in_a_row: int | None = None,
    on_bad: OnBad,
    on_long: OnBad,
    gate: Gate,
    overwrite: bool,
    progress: Callable[[int], None],
) -> StoreMetadata:
    """Examples to a store of rows; returns what ``store.json`` says. Nothing is left at ``output`` on failure.

    read: the examples of the inputs, which are read twice: personal data is looked for in all before any is written.
    Raises UserError as ``prepare_pairs`` and ``prepare_instructions`` say.
    """
    check_sequence_length(sequence_length)
    with RowStoreWriter(output, form.kind, sequence_length, overwrite=overwrite) as writer:
        encoder = PartEncoder(tokenizer_dir)
        inventories = [take_inventory(file, _WHOLE)._asdict() for file in find_files(inputs, ROW_FILES)]
        found, dropped = Findings(), Dropped()
        for example in read(inputs, on_bad, Dropped()):
            found.add(gate.scanner, example.texts(), example.where)
        gate.check(f"the {form.name}", found)
        count = 0

        def segments() -> Iterator[Segment]:
            nonlocal count
            masked = (example.masked(gate.mask) for example in read(inputs, on_bad, dropped))
            for batch in iter(lambda: list(itertools.islice(masked, _BATCH)), []):
                for where, made in encoder.segments(form, batch):
                    if isinstance(made, Segment) and len(made.tokens) > sequence_length:
                        made = Refused(f"{form.long} longer than a row of {sequence_length} tokens", long=True)
                    if isinstance(made, Refused):
                        reject(where, made.reason, on_long if made.long else on_bad, dropped)
                    else:
                        count += 1
                        yield made
                progress(count)

        for row in best_fit(segments(), sequence_length, max_segments=most_in_a_row):
            writer.append(row[None], form.name)
        if not count:
            raise UserError(f"no {form.name} to prepare in {inputs}; left out: {dropped}")
        return writer.finish(
            {form.name: CorpusFacts(count, manifest=manifest_of(inventories) | {"personal_data": found.as_dict()})},
            packing=form.name,
            vocab_size=len(encoder.tokenizer),
            tokenizer_fingerprint=fingerprint(tokenizer_dir),
            eos_token_id=encoder.tokenizer.eos_token_id,
            dropped=dropped.as_dict(),
            recipe={"sequence_length": sequence_length, "on_bad": on_bad, "on_long": on_long}
            | {"pii": gate.mode, "pii_rate": gate.rate, "pii_fingerprint": gate.scanner.fingerprint}
            | form.settings,
        )


def messages_problem(messages: list[Any]) -> str | None:
    """Why a list is no chat, whatever the order of its roles; None where it is one."""
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return "not a list of messages with role and content"
        if message["role"] not in _ROLES:
            return f"of an unknown role (known: {', '.join(_ROLES)})"
        problem = text_problem(message["content"])
        if problem:
            return f"a message whose content is {problem}"
    return None


class PartEncoder:
    """A tokenizer for the parts of examples; UserError where it has no end-of-sequence token."""

    def __init__(self, tokenizer_dir: str | epath.PathLike):
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self._dir = str(tokenizer_dir)
        self._eos = eos_of(self.tokenizer, tokenizer_dir)
        self._control = control_tokens(self.tokenizer)

    def segments(self, form: Format, examples: Sequence[Example]) -> Iterator[tuple[str, Segment | Refused]]:
        """(where, what it makes) of each example, in order; one call of the tokenizer for all of a sort."""
        parts = [self._parts(form, example) for example in examples]
        encoded = {}
        for in_messages, encode in ((False, encode_plain), (True, encode_rendered)):
            texts = [
                text
                for example, found in zip(examples, parts, strict=True)
                if example.in_messages == in_messages and not isinstance(found, Refused)
                for text in found
            ]
            encoded[in_messages] = iter(encode(self.tokenizer, texts))
        for example, found in zip(examples, parts, strict=True):
            if isinstance(found, Refused):
                yield example.where, found
            else:
                yield example.where, form.segment(self, [next(encoded[example.in_messages]) for _ in found])

    def _parts(self, form: Format, example: Example) -> Sequence[str] | Refused:
        # A control token written out is an accident, or an attempt to pass text that a template has rendered; it would
        # be tokenised as plain text, which is neither what was meant nor what the model will see.
        if any(token in text for text in example.texts() for token in self._control):
            return Refused("a control token stands in the text (use chat messages)")
        if not example.in_messages:
            return example.sides
        parts = form.render(self, example)
        return Refused("the chat template cannot render the messages") if parts is None else parts

    def render(self, messages: Messages, where: str, *, prompt: bool = False) -> str | None:
        """Messages as the tokenizer's chat template writes them, or None where it refuses.

        prompt: with the beginning of the assistant's turn. UserError where the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{where} has chat messages, and the tokenizer in {self._dir} has no chat template: "
                "use plain strings, or a tokenizer with a template"
            )
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except jinja2.TemplateError:
            return None

    def ended(self, response: list[int]) -> list[int]:
        """The response with its end-of-sequence token, which the template may already have written."""
        return response if response[-1:] == [self._eos] else [*response, self._eos]

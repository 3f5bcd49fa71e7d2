"""Examples of what to answer, instructions and preference pairs alike: from records to a packed store.

An example has sides: a prompt and its responses, as plain strings or as chat messages. Each passes through four steps,
as an iterator of what the step before gives, in bounded memory; what is rejected on the way passes on as `Rejected`:

    read     files -> Example       ``forms.read_rows``; ``ExampleWriter.examples`` looks for personal data, or masks it
    render   Example -> Rendered    its parts as text, by the chat template where they are messages
    encode   Rendered -> Encoded    the token ids of its parts
    segment  Encoded -> Segment     as the kind of example has it; ``ExampleWriter.write`` packs and stores them

Parts are tokenised separately, so that no token spans the end of a prompt and the beginning of a response.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from etils import epath

from medllm_jax.data.batch import Kind
from medllm_jax.data.packing import Segment, best_fit, check_sequence_length
from medllm_jax.data.prepare.chat_messages import Messages
from medllm_jax.data.prepare.files import JSON_LISTS, RECORD_FILES, Inputs, find_files
from medllm_jax.data.prepare.inventory import manifest_of, take_inventory
from medllm_jax.data.prepare.pii_gate import PiiFindings, PiiGate
from medllm_jax.data.prepare.rejections import OnBad, Reading, Rejected, RejectionCounts, refusal, refuse, reject
from medllm_jax.data.store import StoreMetadata
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter
from medllm_jax.data.tokenizer import (
    ChatTemplateError,
    control_tokens,
    encode_parts,
    eos_of,
    fingerprint,
    load_tokenizer,
    render_chat,
)
from medllm_jax.errors import UserError
from medllm_jax.terminal.progress import Counter

_TILE = 128  # tokens
_BATCH = 256  # examples for one call of the tokenizer


class TextExample(NamedTuple):
    """An example whose sides are strings; where: "file:line"."""

    sides: tuple[str, ...]
    where: str

    def texts(self) -> tuple[str, ...]:
        """All that a person may have written."""
        return self.sides

    def masked(self, mask: Callable[[str], str]) -> Self:
        return self._replace(sides=tuple(map(mask, self.sides)))


class ChatExample(NamedTuple):
    """An example whose sides are chat messages; where: "file:line"."""

    sides: tuple[Messages, ...]
    where: str

    def texts(self) -> tuple[str, ...]:
        """All that a person may have written."""
        return tuple(message["content"] for side in self.sides for message in side)

    def masked(self, mask: Callable[[str], str]) -> Self:
        sides = ([message | {"content": mask(message["content"])} for message in side] for side in self.sides)
        return self._replace(sides=tuple(sides))


Example = TextExample | ChatExample


class Rendered(NamedTuple):
    """The parts of an example as text; by_template: a chat template wrote them, so its control tokens are real."""

    parts: Sequence[str]
    by_template: bool
    where: str


class Encoded(NamedTuple):
    """The token ids of an example's parts, int32 [n] each."""

    parts: list[np.ndarray]
    where: str


# --- render ----------------------------------------------------------------------------------------------------------


class ChatTemplate:
    """The chat template of a tokenizer, if it has one.

    tokenizer_dir: where the tokenizer is from, for errors. control_tokens: what only a template may write.
    """

    def __init__(self, tokenizer: Any, tokenizer_dir: str | epath.PathLike):
        self.control_tokens = control_tokens(tokenizer)
        self._tokenizer = tokenizer
        self._dir = str(tokenizer_dir)

    def render(self, messages: Messages, where: str, *, prompt: bool = False) -> str:
        """Messages as the template writes them.

        prompt: with the beginning of the assistant's turn. Raises UserError where the tokenizer has no chat template,
        and NotRendered where the template fails, or leaves out a part of a message.
        """
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{where} has chat messages, and the tokenizer in {self._dir} has no chat template: "
                "use plain strings, or a tokenizer with a template"
            )
        try:
            text = render_chat(self._tokenizer, messages, generation_prompt=prompt)
        except ChatTemplateError as error:
            raise NotRendered(f"the chat template of {self._dir} {error}") from error
        # Templates may set white space as they like. Some cut what a model thinks from what it says.
        written = _without_space(text)
        for message in messages:
            if _without_space(message["content"]) not in written:
                raise NotRendered(f"the chat template leaves out a part of the {message['role']}'s message")
        return text

    def response(self, messages: Messages, prompt: str, where: str) -> str:
        """What the template adds to a rendered prompt for the message of the assistant that comes last.

        Raises NotRendered, also where the template does not go on from the prompt.
        """
        text = self.render(messages, where)
        if not text.startswith(prompt):
            before = self.render(messages[:-1], where)
            opening = prompt.removeprefix(before)
            if prompt.startswith(before) and text.startswith(before):
                raise NotRendered(f"the chat template opens an answer with {opening[:60]!r}, and this one otherwise")
            raise NotRendered("the chat template rewrites earlier messages when one follows")
        # The line break that templates write after a turn comes after the model has stopped: no part of the response.
        return text.removeprefix(prompt).rstrip()


class NotRendered(Exception):  # noqa: N818 (what is told of a row, beside others)
    """Messages cannot be rendered; the message is the reason."""


def _without_space(text: str) -> str:
    return "".join(text.split())


def render(
    examples: Iterable[Example],
    template: ChatTemplate,
    chat_parts: Callable[[ChatExample, ChatTemplate], Sequence[str]],
) -> Iterator[Rendered | Rejected]:
    """The parts of each example as text, in order.

    chat_parts: gives the parts of an example of messages as a template writes them; raises NotRendered.
    """
    for example in examples:
        # A control token written out is an accident, or an attempt to pass text that a template has rendered; it would
        # be tokenised as plain text, which is neither what was meant nor what the model will see.
        if any(token in text for text in example.texts() for token in template.control_tokens):
            yield Rejected(example.where, "a control token stands in the text (use chat messages)")
        elif isinstance(example, TextExample):
            yield Rendered(example.sides, False, example.where)
        else:
            try:
                yield Rendered(chat_parts(example, template), True, example.where)
            except NotRendered as problem:
                yield Rejected(example.where, str(problem))


# --- encode ----------------------------------------------------------------------------------------------------------


def encode(rendered: Iterable[Rendered | Rejected], tokenizer: Any) -> Iterator[Encoded | Rejected]:
    """The token ids of each example's parts, in order; the tokenizer is called for many examples at a time."""
    rendered = iter(rendered)
    while batch := list(itertools.islice(rendered, _BATCH)):
        token_ids = {
            by_template: iter(
                encode_parts(
                    tokenizer, [each.parts for each in _rendered(batch, by_template=by_template)], rendered=by_template
                )
            )
            for by_template in (False, True)
        }
        for each in batch:
            if isinstance(each, Rejected):
                yield each
            elif (parts := next(token_ids[each.by_template])) is None:
                yield Rejected(each.where, "the tokenizer puts a space between prompt and response, or takes one away")
            else:
                yield Encoded([np.array(ids, np.int32) for ids in parts], each.where)


def _rendered(batch: Sequence[Rendered | Rejected], *, by_template: bool) -> Iterator[Rendered]:
    return (each for each in batch if isinstance(each, Rendered) and each.by_template == by_template)


# --- segment ---------------------------------------------------------------------------------------------------------


def ended(response: np.ndarray, eos: int) -> np.ndarray:
    """A response, int32 [n], with its end-of-sequence token, which the template may already have written."""
    return response if response[-1:].tolist() == [eos] else np.append(response, np.int32(eos))


def fitting(segment: Segment, sequence_length: int, where: str, subject: str) -> Segment | Rejected:
    """The segment, rejected where it is longer than a row; subject: subject and verb of the reason, "the pair is"."""
    if len(segment.tokens) <= sequence_length:
        return segment
    # Kernels like rows of whole tiles: where the row had them, so does what is proposed.
    needed = len(segment.tokens) + (-len(segment.tokens) % _TILE if sequence_length % _TILE == 0 else 0)
    reason, needs = f"{subject} longer than a row of {sequence_length} tokens", (("--sequence-length", needed),)
    return Rejected(where, reason, too_long=True, needs=needs)


# --- write -----------------------------------------------------------------------------------------------------------


class ExampleWriter:
    """Writes a store of examples, used as a context manager: read the ``examples``, then ``write`` their segments.

    kind: of the store; name: of its one corpus, and what errors call the examples. on_bad, on_long: what to do about
    a rejected example, and about one that is too long. Nothing is left at ``output`` on failure.

    Raises UserError for a sequence length or an output that cannot be used, a tokenizer that cannot be loaded or has no
    end-of-sequence token, and inputs without a file.
    """

    def __init__(
        self,
        kind: Kind,
        name: str,
        inputs: Inputs,
        tokenizer_dir: str | epath.PathLike,
        output: str | epath.PathLike,
        sequence_length: int,
        *,
        on_bad: OnBad,
        on_long: OnBad,
        gate: PiiGate,
        overwrite: bool,
    ):
        check_sequence_length(sequence_length)
        self._rows = RowStoreWriter(output, kind, sequence_length, overwrite=overwrite)
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self.template = ChatTemplate(self.tokenizer, tokenizer_dir)
        self.eos = eos_of(self.tokenizer, tokenizer_dir)
        self.rejections = RejectionCounts()
        self._name, self._inputs, self._tokenizer_dir = name, inputs, tokenizer_dir
        self._sequence_length, self._on_bad, self._on_long = sequence_length, on_bad, on_long
        self._gate, self._findings = gate, PiiFindings()
        passed_over = RejectionCounts()
        found = [take_inventory(file) for file in find_files(inputs, RECORD_FILES, passed_over, by_name=JSON_LISTS)]
        for inventory in found:
            if not inventory.bytes:
                passed_over.add("empty", inventory.file)
        self._manifest = manifest_of(found, passed_over)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.__exit__(*error)

    def examples(self, read: "Callable[[Reading, RejectionCounts], Iterator[Example]]") -> Iterator[Example]:
        """The examples of a pass over the input, with personal data masked if the gate masks it.

        A first pass looks for personal data in all examples, and for rows that are none; UserError where the gate
        stops, and with all such rows where they are to be an error.
        """
        found, show = RejectionCounts(), Counter(f"{self._name} read and looked through", every_seconds=5)
        for example in read("collect" if self._on_bad == "error" else "skip", found):
            self._findings.add(self._gate.scanner, example.texts(), example.where)
            show(self._findings.documents)
        refuse(found, "bad")
        self._gate.check(f"the {self._name}", self._findings)
        return (example.masked(self._gate.mask) for example in read(self._on_bad, self.rejections))

    def write(
        self,
        segments: Iterable[Segment | Rejected],
        *,
        max_per_row: int | None = None,
        settings: Mapping[str, Any] = {},
        progress: Callable[[int], None],
    ) -> StoreMetadata:
        """Packs the segments into rows and writes the store; returns the content of ``store.json``.

        max_per_row: the most examples of a row. settings: more that the rows depend on, for the recipe. progress is
        called now and then with the examples kept so far. UserError for what is rejected, unless it is to be skipped,
        and where no example is left.
        """
        count = 0
        bad, too_long = RejectionCounts(), RejectionCounts()  # what stops

        def kept() -> Iterator[Segment]:
            nonlocal count
            for number, segment in enumerate(segments, 1):
                if isinstance(segment, Rejected):
                    if (self._on_long if segment.too_long else self._on_bad) == "skip":
                        reject(segment, "skip", self.rejections)
                    else:
                        reject(segment, "collect", too_long if segment.too_long else bad)
                elif not bad.total and not too_long.total:  # else nothing is written any more
                    count += 1
                    yield segment
                if number % _BATCH == 0:
                    progress(count)
            progress(count)

        for row in best_fit(kept(), self._sequence_length, max_segments=max_per_row):
            self._rows.append(row[None], self._name)
        bad.rows = too_long.rows = self.rejections.rows
        if stops := "; and ".join(filter(None, (refusal(bad, "bad"), refusal(too_long, "too long")))):
            raise UserError(stops)
        if not count:
            raise UserError(f"no {self._name} to prepare in {self._inputs}; left out: {self.rejections}")
        self.rejections.check_kept(count, f"the {self._name}")
        manifest = self._manifest | {"rows": self.rejections.rows, "personal_data": self._findings.as_dict()}
        recipe = {
            "sequence_length": self._sequence_length,
            "on_bad": self._on_bad,
            "on_long": self._on_long,
            "pii": self._gate.mode,
            "pii_rate": self._gate.rate,
            "pii_fingerprint": self._gate.scanner.fingerprint,
            **settings,
        }
        return self._rows.finish(
            {self._name: CorpusFacts(count, manifest=manifest)},
            packing=self._name,
            vocab_size=len(self.tokenizer),
            tokenizer_fingerprint=fingerprint(self._tokenizer_dir, self.tokenizer),
            eos_token_id=self.tokenizer.eos_token_id,
            dropped=self.rejections.as_dict(),
            recipe=recipe,
        )

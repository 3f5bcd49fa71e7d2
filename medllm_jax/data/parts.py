"""Examples in parts, prompts and responses in turn, plain or as chat messages: their faults and their tokens.

Parts are tokenised apart, so that no token reaches from what a model is given into what it is to write.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from medllm_jax.data.reading import text_problem
from medllm_jax.data.tokenizer import control_tokens, encode_plain, encode_rendered, eos_of, load_tokenizer
from medllm_jax.errors import UserError

Messages = list[dict[str, str]]

_ROLES = ("system", "user", "assistant")


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


@dataclasses.dataclass(frozen=True)
class Example:
    """Parts of an example as text; rendered: a chat template wrote them. where: "file:line"."""

    where: str
    parts: tuple[str, ...]
    rendered: bool


class PartEncoder:
    """A tokenizer for the parts of examples; UserError where it has no end-of-sequence token."""

    def __init__(self, tokenizer_dir: str | epath.PathLike):
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self._dir = str(tokenizer_dir)
        self._eos = eos_of(self.tokenizer, tokenizer_dir)
        self._control = control_tokens(self.tokenizer)

    def holds_control_tokens(self, texts: Sequence[str]) -> bool:
        """Whether one is written out in texts as they were read.

        That is an accident, or an attempt to pass text that a template has rendered; it would be tokenised as plain
        text, which is neither what was meant nor what the model will see.
        """
        return any(token in text for text in texts for token in self._control)

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

    def encode(self, examples: Sequence[Example]) -> list[list[list[int]]]:
        """Token ids of the parts of each example; one call of the tokenizer for all plain ones and one for the rest."""
        encoders = {False: encode_plain, True: encode_rendered}
        encoded = {
            rendered: iter(encode(self.tokenizer, [t for e in examples if e.rendered == rendered for t in e.parts]))
            for rendered, encode in encoders.items()
        }
        return [[next(encoded[example.rendered]) for _ in example.parts] for example in examples]

    def ended(self, response: list[int]) -> list[int]:
        """The response with its end-of-sequence token, which the template may already have written."""
        return response if response[-1:] == [self._eos] else [*response, self._eos]

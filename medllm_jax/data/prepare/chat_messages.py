"""Chat messages as others write them: ``role`` and ``content``, or ``from`` and ``value`` (ShareGPT)."""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from medllm_jax.data.prepare.readers import text_problem

Messages = list[dict[str, str]]

ROLES = ("system", "user", "assistant")


class NotUnderstood(Exception):  # noqa: N818 (what is told of a row, beside others)
    """A row can't be read as it is meant; the message is the reason. hint: see `Rejected`."""

    def __init__(self, reason: str, hint: str = ""):
        super().__init__(reason)
        self.hint = hint


class _Style(NamedTuple):
    """The keys of a message's role and content, and the roles, by their names there."""

    role: str
    content: str
    roles: Mapping[str, str]


_STYLES = (
    _Style("role", "content", {role: role for role in ROLES}),
    _Style(
        "from",
        "value",
        {
            "system": "system",
            "human": "user",
            "user": "user",
            "gpt": "assistant",
            "chatgpt": "assistant",
            "assistant": "assistant",
            "bard": "assistant",
            "bing": "assistant",
        },
    ),
)
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "tool_call", "tool_response")

# What changes the meaning of a message, each with the value that changes nothing. Others, such as ids and dates, say
# something about it, and are left aside.
_MEANINGFUL = {
    "tool_calls": None,
    "tool_call_id": None,
    "function_call": None,
    "tools": None,
    "reasoning_content": None,
    "reasoning": None,
    "thinking": None,
    "images": None,
    "audio": None,
    "weight": 1,
    "train": True,
    "prefix": False,
}
_NAME = re.compile(r"[A-Za-z_]{1,20}")


def is_nothing(value: Any) -> bool:
    """Whether a field says nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def read_messages(value: Any, side: str) -> Messages:
    """A list of messages, or one message, as messages of ``role`` and ``content``; there may be none.

    side: the field, for errors. Raises NotUnderstood for what is no message, a role that is not known, content that is
    no text, and a call of a tool.
    """
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise NotUnderstood(f"{side} is not a list of messages with role and content")
    return [_message(message, side) for message in messages]


def _message(message: Any, side: str) -> dict[str, str]:
    styles = [style for style in _STYLES if isinstance(message, dict) and {style.role, style.content} <= message.keys()]
    if not styles:
        raise NotUnderstood(f"{side} is not a list of messages with role and content")
    style = next((style for style in styles if message[style.role] is not None), styles[0])
    role = message[style.role]
    if not isinstance(role, str) or role not in style.roles:
        if role in _TOOL_ROLES:
            raise NotUnderstood(f"{side} has a turn of a tool (role `{role}`), which is not read")
        named = f"the role is `{role}`" if isinstance(role, str) and _NAME.fullmatch(role) else ""
        raise NotUnderstood(f"{side} is of an unknown role (known: {', '.join(style.roles)})", named)
    for key, harmless in _MEANINGFUL.items():
        if not is_nothing(message.get(key)) and message[key] != harmless:
            raise NotUnderstood(f"{side} is a message with `{key}`, which is not read")
    content = message[style.content]
    if problem := text_problem(content):
        raise NotUnderstood(f"{side} is a message whose content is {problem}")
    return {"role": style.roles[role], "content": content}


def said(role: str, content: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": content}


def with_system(messages: Messages, system: Any) -> Messages:
    """Messages with a system message that stands beside them; NotUnderstood where they have another one."""
    if is_nothing(system):
        return messages
    if problem := text_problem(system):
        raise NotUnderstood(f"system is {problem}")
    if not messages or messages[0]["role"] != "system":
        return [said("system", system), *messages]
    if messages[0]["content"] != system:
        raise NotUnderstood("`system` is not the system message that the chat begins with")
    return messages


def shared_beginning(one: Messages, other: Messages) -> Messages:
    """The messages that two chats begin with."""
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]

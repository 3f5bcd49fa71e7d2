"""Settings of others: understood, known to change nothing, or refused by name."""

import pytest

from medllm_jax.config.foreign import ForeignSettings, Key, anything
from medllm_jax.errors import UserError

TABLE = ForeignSettings(
    understood={"size": Key(int), "rate": Key(float, 0.5), "name": Key(str, None, nullable=True)},
    harmless={"kind": ("plain",), "note": anything, "window": lambda value, beside: value == beside["size"]},
    hints={"kind": "save it again as plain"},
)


def test_what_is_understood_and_what_changes_nothing():
    content = {"size": 8.0, "kind": "plain", "note": {"any": [1]}, "window": 8, "name": None}
    assert TABLE.read(content, "f") == {"size": 8, "rate": 0.5, "name": None}
    assert type(TABLE.read(content, "f")["size"]) is int


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 8.5}, "f: size is 8.5: a whole number is expected"),
        ({"size": True}, "f: size is True: a whole number is expected"),
        ({"size": None}, "f: size is None: a whole number is expected"),
        ({"size": "8"}, "f: size is '8': a whole number is expected"),
        ({"rate": 10**400}, "f: rate is a number of more than 60 digits"),
        ({"rate": float("nan")}, "f: rate is nan: a number is expected"),
        ({"name": 3}, "f: name is 3: text is expected"),
        ({"kind": "other"}, "f: kind is 'other': save it again as plain"),
        ({"window": 9}, "f: window is 9: what that asks for is not done here"),
        ({"new": None}, "f: new is None: this key is not known here"),
        ({"new\nline": 1}, "f: new line is 1: this key is not known here"),
        ({"new": [[[[0] * 99] * 99] * 99] * 99}, "f: new is [["),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError) as raised:
        TABLE.read({"size": 8} | changes, "f")
    text = str(raised.value)
    assert text.startswith(message)
    assert len(text) < 250 and "\n" not in text


def test_what_is_missing():
    with pytest.raises(UserError, match=r"^f: size is missing: a whole number is expected"):
        TABLE.read({}, "f")

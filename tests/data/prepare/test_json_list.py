"""A list of objects is read as its items are line by line, whatever stands in strings and wherever blocks end."""

import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.data.prepare import json_list
from medllm_jax.data.prepare.instructions import prepare_instructions
from medllm_jax.data.prepare.json_list import begins_list, read_items
from medllm_jax.data.prepare.streams import DamagedError
from medllm_jax.data.store import RowStore
from medllm_jax.errors import UserError
from tests.tiny import write_json_lines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\,[]{}\n肺'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"\\,]}', max_size=3), inner, max_size=3),
    max_leaves=6,
)


def items(text, most=10**6):
    return [item for _, item in read_items(io.BytesIO(text.encode()), most)]


@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 1, 4]), st.integers(1, 7), st.booleans())
def test_items_are_those_of_the_list(values, indent, block, escaped):
    text = json.dumps(values, indent=indent, ensure_ascii=escaped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "_BLOCK", block)
        assert [json.loads(item) for item in items(f"\ufeff {text}\n ")] == values


def test_an_item_that_is_too_long_is_known_and_the_next_is_read():
    text = json.dumps([{"a": "x" * 100}, {"a": 1}, {"b": "y" * 100}])
    assert [item and json.loads(item) for item in items(text, most=20)] == [None, {"a": 1}, None]


@pytest.mark.parametrize(("text", "problem"), [('[{"a": 1}', "has no end"), ("[1] 2", "is followed by something else")])
def test_a_list_that_is_none_is_known(text, problem):
    with pytest.raises(DamagedError, match=problem):
        items(text)


def test_what_begins_a_list():
    assert begins_list(b"\xef\xbb\xbf \n[") and not begins_list(b'{"a": [') and not begins_list(b"")


ROWS = [{"instruction": f"Question {n}?", "input": "", "output": f"Answer {n}, [so]."} for n in range(9)]


def rows_of(place, tokenizer, name, file, **options):
    prepare_instructions(file, tokenizer, place / name, 128, **options)
    store = RowStore.open(place / name)
    return store.read(range(len(store))).tolist()


def test_a_store_of_a_list_is_that_of_its_lines(world, tmp_path):
    lines = write_json_lines(tmp_path / "rows.jsonl", ROWS)
    expected = rows_of(tmp_path, world.tokenizer, "lines", lines)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "lines.json").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    for name in ("list.json", "list.json.gz", "lines.json"):
        assert rows_of(tmp_path, world.tokenizer, f"of {name}", tmp_path / name) == expected
    assert rows_of(tmp_path, world.tokenizer, "of a pattern", f"{tmp_path}/li*t.json") == expected


def test_a_folder_is_read_without_its_json_files(world, tmp_path):
    """Reports and settings lie beside data."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write_json_lines(folder / "rows.jsonl", ROWS)
    (folder / "report.json").write_text('{"pairs": 3}')
    assert rows_of(tmp_path, world.tokenizer, "store", folder)


def test_a_bad_item_has_its_place(world, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], {"instruction": "?"}, 7, ROWS[1]]))
    with pytest.raises(UserError, match=r"a\.json\[1\].*2 rows|2 .*a\.json\[1\]"):
        rows_of(tmp_path, world.tokenizer, "store", tmp_path / "a.json")
    assert rows_of(tmp_path, world.tokenizer, "store", tmp_path / "a.json", on_bad="skip")
    (tmp_path / "cut.json").write_text(json.dumps(ROWS)[:-1])
    with pytest.raises(UserError, match=r"cut\.json: the JSON list has no end"):
        rows_of(tmp_path, world.tokenizer, "cut", tmp_path / "cut.json")

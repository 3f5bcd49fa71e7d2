import gzip
import io

import pytest

from medllm_jax.errors import UserError
from medllm_jax.storage import json_lines
from medllm_jax.storage.json_lines import (
    Line,
    LineError,
    parse_object,
    parse_row,
    read_appended_rows,
    read_lines,
    read_rows,
)
from tests.gcs import Gcs
from tests.gcs_programs import run


def test_lines_end_at_newlines_alone():
    content = '\ufeff{"a": "x\u2028y"}\r\n\n[1]'.encode()
    lines = list(read_lines(io.BytesIO(content)))
    assert lines == [Line(1, '{"a": "x\u2028y"}\r\n'.encode()), Line(2, b"\n"), Line(3, b"[1]")]
    assert list(read_lines(io.BytesIO(b"a\nb\nc\n"), first_line=5, max_stream_bytes=3)) == [
        Line(5, b"a\n"),
        Line(6, b"b\n"),
    ]
    long = b"x" * (3 * 2**20) + b"\nab\n" + b"y" * 9
    assert list(read_lines(io.BytesIO(long), max_line_bytes=3)) == [Line(1, None), Line(2, b"ab\n"), Line(3, None)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff", "not UTF-8"),
        (b'{"secret', "not valid JSON"),
        (b"[" * 90_000, "not valid JSON"),
        (b"[1]", "not a JSON"),
    ],
)
def test_a_line_that_is_no_object_says_why(line, reason):
    with pytest.raises(LineError) as caught:
        parse_object(line)
    assert caught.value.reason.startswith(reason)
    with pytest.raises(UserError, match=r"^rows.jsonl:7: .*(UTF-8|JSON)") as shown:
        parse_row(line, "rows.jsonl:7")
    assert "\n" not in str(shown.value)


def test_rows_know_their_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": "a", "count": true}\n \n{"id": 3}\n')
    first, second = read_rows(file)
    assert first.get("id", str) == "a" and second.where == f"{file}:3" and second.get("name", str, "") == ""
    with pytest.raises(UserError, match=r"rows.jsonl:1: the field 'count' is true; a whole number was expected"):
        first.get("count", int)
    with pytest.raises(UserError, match=r"rows.jsonl:3: the field 'name' is missing; the row has id"):
        second.get("name", str)


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "_MOST_BYTES", 100)
    monkeypatch.setattr(json_lines, "_BLOCK", 10)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n{"id": "' + "x" * 1000 + '"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: the line has more than 0 MiB"):
        read_rows(file)


def test_a_torn_line_ends_a_file_that_is_appended_to(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_appended_rows(file) == ([], [])
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_appended_rows(file) == ([{"step": 1}, {"step": 2}], [])
    with pytest.raises(UserError, match=r"rows.jsonl:3: not JSON"):
        read_rows(file)


def test_of_a_file_that_is_appended_to_the_rest_of_what_can_be_read_is_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"step": 1}\n{"st\xffp": 2}\n[3]\n\n{}\n{"step": "6"}\n' + b"[" * 10**5 + b'\n{"step": 8}\n')
    assert read_appended_rows(file) == ([{"step": 1}, {"step": "6"}, {"step": 8}], [2, 3, 5, 7])
    assert read_appended_rows(file, lambda row: row.get("step") == 8) == ([{"step": 8}], [1, 2, 3, 5, 6, 7])


IN_STORAGE = """
from medllm_jax.errors import UserError
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.json_lines import read_appended_rows, read_rows

print([(row.fields, row.where) for row in read_rows("gs://bucket/rows.jsonl")])
print(read_appended_rows("gs://bucket/torn.jsonl"), read_appended_rows("gs://bucket/none.jsonl"))
for read in (read_rows, read_json):
    try:
        print(read("gs://bucket/packed.jsonl"))
    except UserError as error:
        print(str(error).partition(",")[0])
"""


def test_rows_in_a_bucket():
    with Gcs("bucket") as server:
        server.put("gs://bucket/rows.jsonl", b'{"id": 1}\n\n{"id": 2}')
        server.put("gs://bucket/torn.jsonl", b'{"id": 1}\n{"id"')
        server.put("gs://bucket/packed.jsonl", gzip.compress(b'{"id": 1}\n' * 100), content_encoding="gzip")
        output = run(server, "-c", IN_STORAGE)
    assert output.splitlines()[-4:] == [
        "[({'id': 1}, 'gs://bucket/rows.jsonl:1'), ({'id': 2}, 'gs://bucket/rows.jsonl:3')]",
        "AppendedRows(rows=[{'id': 1}], damaged=[]) AppendedRows(rows=[], damaged=[])",
        *2 * ["gs://bucket/packed.jsonl is stored with Content-Encoding: gzip"],
    ]

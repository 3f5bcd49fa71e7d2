import hashlib
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medllm_jax.data.prepare import inventory, streams
from medllm_jax.data.prepare.files import DOCUMENT_FILES
from medllm_jax.data.prepare.inventory import ByteRange, Inventory, take_inventory, whole_file
from medllm_jax.data.prepare.readers import ReadOptions, read_documents
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.errors import UserError
from medllm_jax.storage import json_lines
from tests.data.prepare.documents import TEXTS, documents_of, lines_of, texts_of


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["a", "b" * 9, "", " ", "c" * 40]), max_size=30), st.booleans(), st.data())
def test_ranges_are_the_file_cut_at_line_ends(tmp_path, monkeypatch, parts, ended, data):
    range_bytes, block = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 70))
    for module, name in ((inventory, "_BLOCK"), (json_lines, "_BLOCK"), (streams, "_BUFFER")):
        monkeypatch.setattr(module, name, block)
    content = "\n".join(json.dumps({"text": part}) if part.strip() else part for part in parts).encode()
    content += b"\n" * ended
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    found = take_inventory(file, range_bytes)
    assert found[:3] == (str(file), len(content), hashlib.sha256(content).hexdigest())
    assert b"".join(content[part.start : part.end] for part in found.ranges) == content
    for part in found.ranges:
        body = content[part.start : part.end]
        assert part.stored_bytes == len(body) > 0 and part.file == str(file)
        assert part.first_line == content[: part.start].count(b"\n") + 1
        assert part.end == len(content) or body.endswith(b"\n")
        assert b"\n" not in body[range_bytes - 1 : -1], "it ends with the first line that is long enough"
        assert part.end == len(content) or len(body) >= range_bytes
    whole = [(part, f"{file}:{number}") for number, part in enumerate(parts, 1) if part.strip()]
    assert documents_of(file, range_bytes)[0] == documents_of(file)[0] == whole
    some, rejections = documents_of(file, range_bytes, max_bytes=30, on_bad="skip")
    assert some == [document for document in whole if len(document[0]) < 10]
    assert rejections.total == len(whole) - len(some)


def test_ranges_of_parquet_are_row_groups(tmp_path):
    file = tmp_path / "rows.parquet"
    texts = [random.Random(n).randbytes(300).hex() for n in range(100)]
    pq.write_table(pa.table({"text": texts}), file, row_group_size=10, compression="none", use_dictionary=False)
    found = take_inventory(file, 15_000)
    assert [part[1:4] for part in found.ranges] == [(n, n + 3, 10 * n + 1) for n in (0, 3, 6)] + [(9, 10, 91)]
    assert 0.8 * found.bytes < sum(part.stored_bytes for part in found.ranges) < found.bytes == file.stat().st_size
    expected = [(text, f"{file}:{number}") for number, text in enumerate(texts, 1)]
    assert documents_of(file, 15_000)[0] == documents_of(file)[0] == expected
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    assert texts_of(file) == []
    for content in (b"PAR1", b"x" * 100, b"PAR1" + b"x" * 100 + b"PAR1"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"rows.parquet cannot be opened"):
            take_inventory(file, 100)


def test_other_files_are_one_range_and_empty_files_none(tmp_path):
    for suffix in DOCUMENT_FILES:
        file = tmp_path / f"file{suffix}"
        file.write_bytes(b"")
        assert take_inventory(file, 1) == (str(file), 0, hashlib.sha256().hexdigest(), ())
        if suffix not in (".jsonl", ".ndjson", ".parquet"):
            file.write_bytes(b"1\n2\n3\n")
            assert take_inventory(file, 2).ranges == (ByteRange(str(file), 0, 6, 1, 6),)


def test_an_inventory_travels_and_a_whole_file_is_one_range(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "rows.parquet", row_group_size=1)
    (tmp_path / "rows.jsonl").write_bytes(lines_of(TEXTS))
    for name in ("rows.parquet", "rows.jsonl"):
        file = epath.Path(tmp_path / name)
        found = take_inventory(file, 1)
        assert len(found.ranges) == len(TEXTS) and len(take_inventory(file).ranges) == 1
        assert Inventory.from_dict(json.loads(json.dumps(found.as_dict()))) == found
        read = [each.text for each in read_documents(whole_file(file), ReadOptions(), RejectionCounts())]
        assert read == texts_of(file) == TEXTS

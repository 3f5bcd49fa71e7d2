"""A file that grows holds the same in a folder and in a bucket."""

import pytest
from etils import epath

from medllm_jax.storage import append
from medllm_jax.storage.append import AppendedFile


@pytest.fixture(params=["disk", "bucket"])
def file(request, tmp_path, monkeypatch):
    """A file; that of a bucket is one on a disk that is written as in a bucket."""
    monkeypatch.setattr(append, "is_remote", lambda path: request.param == "bucket")
    return epath.Path(tmp_path / "lines.txt")


def test_lines_are_added_to_what_was_there(file):
    file.write_text("before\n")
    log = AppendedFile(file)
    log.flush()
    assert file.read_text() == "before\n"
    for number in range(3):
        log.add(f"{number} \u00e9\n".encode())
    log.flush()
    assert file.read_text() == "before\n0 \u00e9\n1 \u00e9\n2 \u00e9\n"


def test_content_replaces_what_was_there(file):
    file.write_text("torn li")
    log = AppendedFile(file, [b"a\n", b"b\n"])
    assert file.read_text() == "a\nb\n"
    log.add(b"c\n")
    log.flush()
    assert file.read_text() == "a\nb\nc\n"


@pytest.mark.parametrize("remote", [False, True])
def test_a_disk_has_a_line_at_once_and_a_bucket_after_the_flush(tmp_path, monkeypatch, remote):
    monkeypatch.setattr(append, "is_remote", lambda path: remote)
    log = AppendedFile(epath.Path(tmp_path / "lines.txt"))
    log.add(b"a\n")
    assert (tmp_path / "lines.txt").exists() == (not remote)
    log.flush()
    assert (tmp_path / "lines.txt").read_text() == "a\n"

"""A file that grows holds the same in a folder and in a bucket."""

import errno
import resource

import pytest
from etils import epath

from medllm_jax.storage import append
from medllm_jax.storage.append import AppendedFile, keep_damaged


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


def test_a_torn_last_line_is_left_alone(file):
    file.write_text("whole\ntor")
    log = AppendedFile(file)
    log.add(b"a\n")
    log.flush()
    log.add(b"b\n")
    log.flush()
    assert file.read_text() == "whole\ntor\na\nb\n"


def test_bytes_that_are_no_text_are_left_alone(file):
    file.write_bytes(b"\xff\n")
    log = AppendedFile(file)
    log.add(b"a\n")
    log.flush()
    assert file.read_bytes() == b"\xff\na\n"


def test_what_did_not_fit_is_written_whole_and_once_when_there_is_room(tmp_path):
    path = epath.Path(tmp_path / "lines.txt")
    log, limits = AppendedFile(path), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.add(b"first\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                log.add(b"second\n")
            assert caught.value.errno == errno.EFBIG and path.read_text() == "first\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.add(b"third\n")
    assert path.read_text() == "first\nsecond\nsecond\nthird\n"


def test_a_damaged_file_is_kept_under_another_name(tmp_path, capsys):
    path = epath.Path(tmp_path / "lines.txt")
    for content in ("one", "two"):
        path.write_text(content)
        keep_damaged(path, [])
        keep_damaged(path, [3, 7])
    assert [(tmp_path / f"lines.txt.damaged-{n}").read_text() for n in (1, 2)] == ["one", "two"]
    warning = capsys.readouterr().err.splitlines()
    assert len(warning) == 2 and "2 lines, the first of them line 3): it is kept as lines.txt.damaged-2" in warning[1]

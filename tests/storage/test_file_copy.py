"""Bytes from file to file: the same whether the kernel copies them or not."""

import errno
import os

import numpy as np
import pytest

from medllm_jax.storage import file_copy


def refusing(*_):
    raise OSError(errno.EXDEV, "not between these")


@pytest.fixture(params=["kernel", "refused", "unknown"])
def kernel(request, monkeypatch):
    if request.param == "refused":
        monkeypatch.setattr(os, "copy_file_range", refusing)
    elif request.param == "unknown":
        monkeypatch.delattr(os, "copy_file_range")


@pytest.fixture
def files(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8).tobytes()
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb+") as target:
        yield data, source.fileno(), target.fileno()


@pytest.mark.parametrize(("offset", "to", "size"), [(0, 0, 3 << 20), (17, 5, 2_000_003), (1, 4096, 1)])
def test_what_is_copied_is_what_stood_there(kernel, files, offset, to, size):
    data, source, target = files
    assert file_copy.copy_bytes(source, offset, target, to, size) == size
    expected = bytes(to) + data[offset : offset + size]
    assert os.pread(target, 4 << 20, 0) == expected
    assert b"".join(block.tobytes() for block in file_copy.blocks_of(target, to, size)) == expected[to:]


def test_a_source_that_ends_before_is_told_by_the_count(kernel, files):
    data, source, target = files
    assert file_copy.copy_bytes(source, len(data) - 10, target, 0, 100) == 10


def test_a_disk_that_is_full_is_not_taken_for_a_refusal(files, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="full"):
        file_copy.copy_bytes(files[1], 0, files[2], 0, 10)

"""A small model in Hugging Face's format, and as a run folder."""

import shutil
from pathlib import Path

import pytest

from tests.conversion.hf_folders import run
from tests.tiny_hf import make_hf_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tied bfloat16 checkpoint in one file."""
    return make_hf_folder(tmp_path_factory.mktemp("source") / "hf", dtype="bfloat16")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """`source` as a run folder."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    assert run("from-hf", source, folder) == 0
    return folder


@pytest.fixture
def broken(source, tmp_path):
    """A copy of `source` to break."""
    return Path(shutil.copytree(source, tmp_path / "broken"))

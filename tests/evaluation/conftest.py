"""Where the real exam may stand; the tests that read it are skipped where it does not."""

from pathlib import Path

import pytest

_IGAKUQA = Path(__file__).parents[3] / "shared" / "data" / "igakuqa"


@pytest.fixture
def igakuqa():
    """The folder of the real IgakuQA data, which is no part of this project."""
    if not (_IGAKUQA / "data").is_dir():
        pytest.skip(f"IgakuQA is not at {_IGAKUQA}")
    return _IGAKUQA

"""Python programs whose clients talk to the emulator of Google Cloud Storage."""

import subprocess
import sys
import tempfile
from typing import Any

import pytest

from tests.gcs import Gcs, environment
from tests.warm import WarmPython

# A fault leaves a buffer in a traceback, and these two versions crash when they collect it.
faults_crash_python = pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 2),
    reason="this Python crashes where an upload failed (CPython's issue 111049)",
)


class Python(WarmPython):
    """A Python process whose clients talk to an emulator."""

    def __init__(self, gcs: Gcs, *arguments: Any):
        # A file, because a process would stop at a pipe that nobody reads.
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115
        super().__init__(*arguments, stdout=self._printed, stderr=subprocess.STDOUT, environment=environment(gcs.url))

    def output(self) -> str:
        """All that it printed, once it has ended."""
        self.wait(timeout=300)
        self._printed.seek(0)
        return self._printed.read()


def run(gcs: Gcs, *arguments: Any) -> str:
    """What such a process printed; it must succeed."""
    process = Python(gcs, *arguments)
    output = process.output()
    assert process.returncode == 0, output
    return output

"""Runs the compiling process and reads its files."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medllm_jax.errors import UserError
from medllm_jax.planning.hlo import Memory, read_memory
from medllm_jax.terminal.progress import duration
from medllm_jax.terminal.version import install_line

PROGRAMS = {"train": ("train",), "reference": ("reference",), "generate": ("prefill", "decode")}
_PAUSE = 30.0  # seconds between two words of a compilation that goes on
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the TPUs are the compiler's alone
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other compilations may go on beside this one
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Compiled(NamedTuple):
    """One program.

    mesh: axis -> size; places: (x, y, z, slice) of each device, in the mesh's order; bytes: what the arguments are, as
    group -> bytes on one device; refused: the compiler's message if it says that the program can't run; hlo: as
    scheduled; finished: it was compiled to the end, and the hlo has the compiler's cycles; seconds: from the start of
    the process.
    """

    name: str
    mesh: dict[str, int]
    places: list[list[int]]
    bytes: dict[str, int]
    memory: Memory
    refused: str | None
    hlo: str
    finished: bool
    seconds: float


def require_compiler() -> None:
    """UserError where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"plan needs libtpu, the compiler for TPUs: {install_line('plan')}")


def compile_programs(
    request: dict[str, Any], *, memory_only: bool = False, show: Callable[[str], None] = lambda line: None
) -> list[Compiled]:
    """Compiles a run's programs in a process of their own; see child.py for the request.

    memory_only: ends the process as soon as the last program's memory is known, long before its code is there.
    show: is called with a line at each stage, and every half minute of one.
    Raises UserError for a wrong input that the process reports, and if libtpu is not installed.
    """
    require_compiler()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="medllm-plan-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "medllm_jax.planning.child", name]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, env=os.environ | _ENVIRONMENT, stdout=log, stderr=log)
            try:
                told = _Told(folder, request, memory_only, show)
                last = folder / PROGRAMS[request["program"]][-1]
                while process.poll() is None and not (memory_only and _memory_is_there(last)):
                    told.look(time.monotonic() - start)
                    time.sleep(0.2)
            finally:
                process.kill()
                process.wait()
        seconds = time.monotonic() - start
        error = json.loads(_read(folder / "error.json") or "{}")
        if "input" in error:
            raise UserError(error["input"])
        programs = list(_programs(folder, PROGRAMS[request["program"]], error.get("compiler"), seconds))
        if not programs and "compiler" in error:
            raise UserError(f"the compiler can't compile this: {error['compiler'].splitlines()[0]}")
        if not programs:
            raise RuntimeError(f"the compiling process died: {(folder / 'log').read_text(errors='replace')[-2000:]}")
        return programs


def _programs(folder: Path, names: Sequence[str], refused: str | None, seconds: float) -> Iterator[Compiled]:
    for name in names:
        assignment = _dump(folder / name, "buffer-assignment")
        if not assignment:
            return
        facts = json.loads((folder / f"{name}.json").read_text())
        memory = read_memory(assignment, _dump(folder / name, "memory-usage-report"))
        finished = (folder / f"{name}.done").exists()
        hlo = _dump(folder / name, "after_codegen" if finished else "after_optimizations")
        told = None if finished else refused
        yield Compiled(name, facts["mesh"], facts["places"], facts["bytes"], memory, told, hlo, finished, seconds)


class _Told:
    """What is said while the compiler works."""

    def __init__(self, folder: Path, request: dict[str, Any], memory_only: bool, show: Callable[[str], None]):
        self._programs = [folder / name for name in PROGRAMS[request["program"]]]
        self._show, self._last = show, 0.0
        slices = f"{request['slices']} slices of " if request["slices"] > 1 else ""
        until = "until its memory is known: seconds" if memory_only else "to its end: minutes (--memory-only: seconds)"
        show(f"compiling {request['program']} for {slices}{request['topology']}, on this machine's CPU, {until}")

    def look(self, seconds: float) -> None:
        """seconds: since the start."""
        known = [program for program in self._programs if _memory_is_there(program)]
        for program in known:
            self._programs.remove(program)
            self._tell(f"the memory of {program.name} is known after {duration(seconds)}", seconds)
        if seconds - self._last >= _PAUSE:
            self._tell(f"still compiling after {duration(seconds)}", seconds)

    def _tell(self, line: str, seconds: float) -> None:
        self._show(line)
        self._last = seconds


def _memory_is_there(dump: Path) -> bool:
    # The last of the files that are written once memory is laid out; those that are read come before it.
    return _file(dump, "after_optimizations_after_buffer_assignment") is not None


def _file(dump: Path, kind: str) -> Path | None:
    # A program is dumped among small helpers of the compiler: the largest file is the program's.
    return max(dump.glob(f"*{kind}.txt"), key=lambda file: file.stat().st_size, default=None)


def _dump(dump: Path, kind: str) -> str:
    file = _file(dump, kind)
    return file.read_text(encoding="utf-8", errors="replace") if file else ""


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""

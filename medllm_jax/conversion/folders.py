"""Folders that are filled step by step, go on after an interruption, and are there whole or not at all.

Locally, a folder is filled beside its place, under a hidden name, and renamed at the end. Object storage can't rename:
there it is filled in its place, and what makes it valid must be written last. What is done so far is noted in it, in a
file for each of the processes that fill it.
"""

import collections
import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from medllm_jax.config.foreign import ForeignSettings, Key
from medllm_jax.errors import RunError, UserError
from medllm_jax.storage.faults import fault_of
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.lease import Lease
from medllm_jax.storage.remote import is_folder, is_remote, names_in, remove_folder, write_whole
from medllm_jax.terminal.progress import size_in_words

_PROGRESS = ".conversion-"
_NOTES = ForeignSettings({"what": Key(dict), "finished": Key(bool), "done": Key(dict)}, {})
_SECONDS = 2  # between writes of what is done: buckets refuse more than one a second

Item = TypeVar("Item")
Result = TypeVar("Result")


class ResumableFolder:
    """A folder that is being filled, by one of a number of processes.

    folder: where to write. done: unit -> what was noted of it, of all the processes, when this one began.
    """

    def __init__(self, target: str | os.PathLike, what: Mapping[str, Any], *, part: int = 0, parts: int = 1):
        self.target, self.folder = epath.Path(target), unfinished_folder(target)
        self.done: dict[str, Any] = {}
        self._what, self._part, self._parts = {**what, "parts": parts}, part, parts
        self._own: dict[str, Any] = {}
        self._written, self._lock = 0.0, threading.Lock()

    def open(self, *, resume: bool) -> None:
        """Takes up what is there. UserError where that is of another conversion, or nobody asked to go on with it."""
        for number in range(self._parts):
            file = self._file(number)
            if not file.exists():
                continue
            noted = self._read(file)
            if number == self._part and not resume:
                raise UserError(
                    f"a conversion to {self.target} was begun and not finished: --resume goes on with it; "
                    f"to begin anew, remove {self.folder}"
                )
            differing = [key for key in self._what if noted["what"].get(key) != self._what[key]]
            if differing:
                raise UserError(
                    f"what was begun in {self.folder} is another conversion ({', '.join(differing)} differ): "
                    "give the same source and options, or remove that folder"
                )
            self.done |= noted["done"]
            if number == self._part:
                self._own = noted["done"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(finished=False)

    def note(self, unit: str, value: Any = True) -> None:
        """Notes that a unit is done, in a few seconds at the latest."""
        with self._lock:
            self._own[unit] = value
            if time.monotonic() - self._written > _SECONDS:
                self._write(finished=False)

    def finish(self) -> bool:
        """Notes that this process has done its part; are all the parts done?"""
        with self._lock:
            self._write(finished=True)
        files = [self._file(number) for number in range(self._parts)]
        try:
            return all(file.exists() and self._read(file)["finished"] for file in files)
        except FileNotFoundError:  # another part found all done, and has put the folder in its place
            return False

    @contextlib.contextmanager
    def completion(self) -> Iterator[bool]:
        """Notes that this process has done its part; is it to complete the folder in the block?

        Where all the parts are done it is, if no other found that too and is quicker.
        """
        if not self.finish():
            yield False
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(Lease.beside(self.target, "completing"))
                is_due = self._file(self._part).exists()  # else another part has just completed it
            except RunError:  # another part is completing it
                is_due = False
            yield is_due

    def keep(self) -> bool:
        """Notes what is done when the work breaks off; is there anything to go on from? If not, removes the folder."""
        with self._lock:
            if (self._own or self._parts > 1) and is_folder(self.folder):
                self._write(finished=False)
                return True
        remove_folder(self.folder)
        return False

    def settle(self, *, replace: bool = False) -> None:
        """Puts the folder, now whole, in its place."""
        if not is_remote(self.target):
            final = Path(self.target).absolute()
            old = final.with_name(f".{final.name}.replaced")
            if final.exists() and replace:
                shutil.rmtree(old, ignore_errors=True)  # of a replacement that was stopped between the two renames
                final.rename(old)
            elif final.exists():
                final.rmdir()  # it is empty
            Path(self.folder).rename(final)
            shutil.rmtree(old, ignore_errors=True)
        clear_notes(self.target)

    def _file(self, number: int) -> epath.Path:
        return self.folder / f"{_PROGRESS}{number}.json"

    def _read(self, file: epath.Path) -> dict[str, Any]:
        try:
            noted = _NOTES.read(read_json(file), str(file))
            if not all(value is True or isinstance(value, str) for value in noted["done"].values()):
                raise UserError(f"{file}: what is done is noted as true or a checksum")
        except UserError as error:
            raise UserError(f"{error}; these notes are damaged: remove {self.folder} and begin anew") from None
        return noted

    def _write(self, *, finished: bool) -> None:
        content = {"what": self._what, "finished": finished, "done": self._own}
        write_whole(self._file(self._part), json.dumps(content))
        self._written = time.monotonic()


def unfinished_folder(target: str | os.PathLike) -> epath.Path:
    """Where a folder is filled."""
    if is_remote(target):
        return epath.Path(target)
    final = Path(target).absolute()
    return epath.Path(final.parent / f".{final.name}.unfinished")


def clear_notes(folder: str | os.PathLike) -> bool:
    """Removes the notes from a folder that is whole, and any that a kill left half written; were there any?"""
    folder = epath.Path(folder)
    notes = [name for name in names_in(folder) if name.startswith((_PROGRESS, f".{_PROGRESS}"))]
    for name in notes:
        (folder / name).unlink(missing_ok=True)
    return bool(notes)


def holds_something(target: str | os.PathLike) -> bool:
    """Whether something stands at a target already that is not the beginning of a conversion; empty folders don't."""
    folder = epath.Path(target)
    if folder.exists() and not is_folder(folder):
        return True
    names = names_in(folder)
    return bool(names) and not any(name.startswith(_PROGRESS) for name in names)


def check_room(target: str | os.PathLike, size: int) -> None:
    """UserError where the disk of a local target has not so many bytes left; what is in `unfinished_folder` counts."""
    if is_remote(target):
        return
    folder = Path(target).absolute().parent
    while not folder.exists():
        folder = folder.parent
    there = _bytes_on_disk(unfinished_folder(target))
    free = shutil.disk_usage(folder).free
    if free + there < size:
        raise UserError(
            f"{target}: {size_in_words(size)} are needed and the disk of {folder} has {size_in_words(free)} left"
        )


def _bytes_on_disk(folder: str | os.PathLike) -> int:
    """Bytes that the files below a folder take; those that other processes rename or remove meanwhile are left out."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += Path(path, name).stat().st_blocks * 512
    return size


@contextlib.contextmanager
def full_disk_is_reported(target: str | os.PathLike) -> Iterator[None]:
    """RunError for a disk that runs full in the block."""
    try:
        yield
    except Exception as error:
        fault = fault_of(error)
        if fault is None or fault.kind != "full":
            raise
        raise RunError(
            f"{target}: the disk is full: make room and go on with --resume, or remove {unfinished_folder(target)}"
        ) from error


def ahead(work: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """Results in the order of the items, which a few threads work on; at most twice as many as these are at hand."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

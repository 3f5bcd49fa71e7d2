"""Folders that are there whole or not at all."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.remote import is_remote

_REMOVALS = 100  # tries, 50 ms apart


def check_free(target: str | os.PathLike) -> None:
    """UserError where something stands at the target already; an empty folder does not count."""
    folder = epath.Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: choose another folder, or remove it first")


@contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[epath.Path]:
    """A folder to fill, which becomes the target when the block ends, and is removed when it fails.

    Locally it is a sibling, renamed at the end. Object storage can't rename: there it is the target itself, and what
    makes it valid must be written last. The target must be free; UserError if it isn't.
    """
    check_free(target)
    if is_remote(target):
        unfinished = epath.Path(target)
    else:
        final = Path(target).absolute()
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished = epath.Path(final.parent / f".{final.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        if not is_remote(target):
            if final.exists():
                final.rmdir()
            unfinished.rename(final)
    except BaseException:
        _remove(unfinished)
        raise


def _remove(folder: epath.Path) -> None:
    """Removes a folder that other threads may still be writing into."""
    for _ in range(_REMOVALS):
        with suppress(OSError):
            folder.rmtree(missing_ok=True)
        time.sleep(0.05)
        if not folder.exists():
            return
    print(f"{folder} could not be removed: remove it by hand", file=sys.stderr)


@contextmanager
def replaced_folder(target: str | os.PathLike) -> Iterator[epath.Path]:
    """`new_folder` for a local target that exists: the old one stays until the new one is whole, then goes."""
    final = Path(target).absolute()
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    with new_folder(final.with_name(f".{final.name}.new-{os.getpid()}")) as unfinished:
        yield unfinished
    final.rename(old)
    final.with_name(f".{final.name}.new-{os.getpid()}").rename(final)
    shutil.rmtree(old)

"""Bytes that go from one local file into another: copied by the kernel, and looked at where they arrived."""

import errno
import os
from collections.abc import Iterator

import numpy as np

_BUFFER_BYTES = 1 << 20
_BLOCK_BYTES = 256 << 10  # what is looked at together stays in a core's cache
# What the kernel says where it can't copy between two files, of file systems that it does not do it for.
_REFUSALS = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def copy_bytes(source: int, offset: int, target: int, to: int, size: int) -> int:
    """Copies bytes between two open files, given by their descriptors; how many: fewer where the source ends before.

    OSError where one can't be read or written.
    """
    copied = _copy_by_kernel(source, offset, target, to, size) if hasattr(os, "copy_file_range") else 0
    while copied < size:  # the kernel does not copy these, or the source ends here
        data = os.pread(source, min(_BUFFER_BYTES, size - copied), offset + copied)
        if not data:
            break
        while data:
            written = os.pwrite(target, data, to + copied)
            copied, data = copied + written, data[written:]
    return copied


def _copy_by_kernel(source: int, offset: int, target: int, to: int, size: int) -> int:
    copied = 0
    while copied < size:
        try:
            step = os.copy_file_range(source, target, size - copied, offset + copied, to + copied)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            break
        if step == 0:
            break
        copied += step
    return copied


def blocks_of(file: int, offset: int, size: int) -> Iterator[np.ndarray]:
    """uint8 blocks of what stands in an open file; each is there until the next is asked for.

    They are read and not mapped: that takes no longer, since pages that were just written are mapped one by one, and
    what goes wrong is an error and no signal that ends the process. OSError where the file ends before.
    """
    buffer = np.empty(min(size, _BLOCK_BYTES), np.uint8)
    done = 0
    while done < size:
        block = buffer[: size - done]
        count = os.preadv(file, [block.data], offset + done)
        if count != len(block):
            raise OSError(errno.EIO, f"{size} bytes were written at {offset}, and reading ends after {done + count}")
        yield block
        done += count

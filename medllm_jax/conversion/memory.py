"""How the C library hands out memory, which decides the speed of what takes and frees megabytes all the time."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST = 32 << 20  # that glibc allows for the second


def keep_freed_memory() -> None:
    """Has freed memory used again instead of given back, since the kernel clears every page that it hands out anew.

    Otherwise that takes most of the time of a conversion. Does nothing where the C library is another than glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)

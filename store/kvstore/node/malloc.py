"""What the C library keeps of memory that was freed."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MAPPED_FROM_BYTES = 1 << 20  # so large a piece is mapped, and goes back when it is freed
KEPT_BYTES_MAX = 4 << 20  # free at the end of a heap; more than the usual request needs


def keep_little_freed_memory() -> None:
    """Bounds it, and gives back what is kept. By default glibc keeps twice the largest piece freed.

    Work on a whole table, such as that on a full directory, needs some pieces of megabytes each;
    that much would stay with the process. Other C libraries have no such setting, nor the need.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES_MAX)
        libc.malloc_trim(0)

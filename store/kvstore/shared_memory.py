"""Mapping memory that processes share, in pages as large as the system gives."""

import contextlib
import ctypes
import errno
import mmap
import os

MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module of Python 3.11 has no name for it
MADV_COLLAPSE = 25  # Linux 6.1; unlike MADV_HUGEPAGE it needs no huge= of the tmpfs
HUGE_PAGE_BYTES = 2 << 20
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

# Through ctypes, as that lets other threads run meanwhile.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mmap.restype = ctypes.c_void_p


class SharedMap:
    """A file mapped to read and write, at an address that huge pages need unless limits forbid.

    ``memory`` is its bytes, at ``address``. They stay mapped for as long as anything refers to
    them.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """Maps the first ``size_bytes`` of the file; OSError where the system refuses."""
        try:
            self._map_aligned(descriptor, size_bytes)
        except OSError:  # limits on private memory may be in the way, which this is for a moment
            self._owner = mmap.mmap(descriptor, size_bytes)
            self.address = address_of(self._owner)
            self.memory = memoryview(self._owner)

    def _map_aligned(self, descriptor: int, size_bytes: int) -> None:
        # The file goes over a part of some empty room, which is what Python keeps and unmaps.
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        self._owner = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=flags)
        base = address_of(self._owner)
        first = -base % HUGE_PAGE_BYTES
        self.address = base + first
        flags, prot = mmap.MAP_SHARED | _MAP_FIXED, mmap.PROT_READ | mmap.PROT_WRITE
        if _libc.mmap(self.address, size_bytes, prot, flags, descriptor, 0) == _MAP_FAILED:
            code = ctypes.get_errno()
            self._owner.close()
            raise OSError(code, os.strerror(code))
        self.memory = memoryview(self._owner)[first : first + size_bytes]

    def close(self) -> None:
        """Unmaps it now, unless something refers to its bytes."""
        with contextlib.suppress(BufferError):
            self.memory.release()
            self._owner.close()


def address_of(memory: mmap.mmap) -> int:
    """Where it begins in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def advise(address: int, nbytes: int, advice: int) -> int:
    """madvise, begun again after a signal; 0, or the errno that says why it failed."""
    while _libc.madvise(address, nbytes, advice):
        if (code := ctypes.get_errno()) != errno.EINTR:
            return code
    return 0

"""Mapping memory that processes share, in pages as large as the system gives."""

import ctypes
import errno
import mmap

MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module of Python 3.11 has no name for it
MADV_COLLAPSE = 25  # Linux 6.1; unlike MADV_HUGEPAGE it needs no huge= of the tmpfs
HUGE_PAGE_BYTES = 2 << 20

# Through ctypes, as that lets other threads run meanwhile.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_shared(descriptor: int, size_bytes: int) -> mmap.mmap:
    """The file, to read and write, at an address that huge pages need, if luck has it.

    The kernel maps below what it has mapped last, so something of the right length goes before.
    """
    memory = mmap.mmap(descriptor, size_bytes)
    beyond = address_of(memory) % HUGE_PAGE_BYTES
    if not beyond or size_bytes < HUGE_PAGE_BYTES:
        return memory
    memory.close()
    before = beyond - size_bytes % HUGE_PAGE_BYTES + size_bytes
    with mmap.mmap(-1, before, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ):
        return mmap.mmap(descriptor, size_bytes)


def address_of(memory: mmap.mmap) -> int:
    """Where it begins in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def advise(address: int, nbytes: int, advice: int) -> int:
    """madvise, begun again after a signal; 0, or the errno that says why it failed."""
    while _libc.madvise(address, nbytes, advice):
        if (code := ctypes.get_errno()) != errno.EINTR:
            return code
    return 0

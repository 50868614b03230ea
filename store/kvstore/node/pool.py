"""The DRAM tier's files in shared memory: the pool of slots and the directory beside it."""

import contextlib
import errno
import mmap
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from kvstore.config import readable_size
from kvstore.errors import ConfigError
from kvstore.node.dir_lock import DirectoryLock
from kvstore.shared_memory import (
    HUGE_PAGE_BYTES,
    MADV_COLLAPSE,
    MADV_POPULATE_WRITE,
    SharedMap,
    advise,
)

# Mostly they take 0.1 to 0.25, 2 where memory is fragmented.
HUGE_PAGES_S_PER_GIB = 0.4
HUGE_PAGES_S_MIN = 0.1
POPULATE_STEP_BYTES = 64 << 20
POPULATE_THREADS_MAX = 4
FILE_NAMES = ("pool-*", "directory-*")


def _stale_files(folder: Path) -> list[Path]:
    return [path for pattern in FILE_NAMES for path in folder.glob(pattern)]


def remove_stale_files(folder: Path) -> int:
    """Removes pool files of instances that ended without doing so; the lock must be held."""
    stale = _stale_files(folder)
    for path in stale:
        path.unlink()
    return len(stale)


def remove_dead_siblings(folder: Path) -> int:
    """Removes the pools of other nodes of this user whose process is gone.

    Their memory would stay taken until the host restarts. Whether a node lives is told by its
    lock alone. It is held for as long as the names take: freeing the memory behind them takes a
    second for 6 GiB, in which that node may be started again.
    """
    removed = 0
    for sibling in folder.parent.glob(f"kvstore-{os.getuid()}-*"):
        if sibling == folder or not _is_own_directory(sibling):
            continue
        try:
            lock = DirectoryLock(sibling, patience_s=0.0)
        except ConfigError:
            continue
        # Of files that are not to be had, another node that starts may take care.
        with contextlib.ExitStack() as open_files, contextlib.suppress(OSError):
            try:
                for path in _stale_files(sibling):
                    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                    open_files.callback(os.close, descriptor)
                    path.unlink()
                    removed += 1
            finally:
                lock.release(remove=True)
    return removed


def _is_own_directory(path: Path) -> bool:
    """Whether it is one, no link, of this user: in shared memory anybody may take any name."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


class SharedFile:
    """A new file of a fixed size, mapped for reading and writing.

    All of its space is taken before ``wait_taken`` returns, and must be before a client hears of
    the file: a page that cannot be had later is a SIGBUS.
    """

    def __init__(self, path: Path, size_bytes: int, *, touch: bool = True) -> None:
        """Creates ``path`` (mode 0600); ConfigError where the file system has no room for it.

        Without ``touch`` its pages are taken and no more: whoever uses one first has it zeroed.
        """
        self.path = path
        self.size_bytes = size_bytes
        check_room(path.parent, size_bytes)
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise ConfigError(f"{path} cannot be made: {error.strerror}") from None
        try:
            os.ftruncate(self._descriptor, size_bytes)
            self.map = SharedMap(self._descriptor, size_bytes)
        except OSError as error:
            os.close(self._descriptor)
            path.unlink()
            raise self._no_room(error) from None
        advise(self.map.address, size_bytes, mmap.MADV_HUGEPAGE)  # where it may not be, it is not
        self._touch = touch
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="pool-take")
        self._taken = self._threads.submit(self._take)
        self._threads.shutdown(wait=False)

    def wait_taken(self) -> None:
        """Returns when every page is there; ConfigError if one cannot be had."""
        try:
            self._taken.result()
        except OSError as error:
            raise self._no_room(error) from None

    def _take(self) -> None:
        try:
            if not (self._touch and _populate(self.map.address, self.size_bytes)):
                os.posix_fallocate(self._descriptor, 0, self.size_bytes)
        finally:
            os.close(self._descriptor)

    def _no_room(self, error: OSError) -> ConfigError:
        folder = self.path.parent
        size = readable_size(self.size_bytes)
        return ConfigError(f"{folder} has no room for {size}: {error.strerror}")

    def close(self) -> None:
        """Removes the name at once; the memory goes when the last mapping does."""
        wait([self._taken])
        self.path.unlink(missing_ok=True)
        self.map.close()


def check_room(folder: Path, size_bytes: int) -> None:
    """ConfigError where the file system of ``folder`` has no ``size_bytes`` left."""
    room = os.statvfs(folder)
    if (free := room.f_bavail * room.f_frsize) < size_bytes:
        raise ConfigError(
            f"{folder} has room for {readable_size(free)}, {readable_size(size_bytes)} are needed; "
            "set a smaller --dram or another --pool-dir"
        )


def _populate(start: int, size_bytes: int) -> bool:
    """Takes every page now, with several threads; False where the kernel cannot.

    As huge pages where it can in good time: the device moves one as one piece, which a request
    for 4,096 bytes at a time cannot, and neither side looks up so many addresses.
    """
    patience_s = max(HUGE_PAGES_S_MIN, HUGE_PAGES_S_PER_GIB * size_bytes / (1 << 30))
    huge_until = time.monotonic() + patience_s

    def step(offset: int) -> int:
        end = min(offset + POPULATE_STEP_BYTES, size_bytes)
        for page in range(offset, end - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
            if time.monotonic() > huge_until or not _take_huge(start + page):
                break
        return advise(start + offset, end - offset, MADV_POPULATE_WRITE)

    # One core is left to whatever the node does meanwhile.
    count = min(POPULATE_THREADS_MAX, max(1, len(os.sched_getaffinity(0)) - 1))
    with ThreadPoolExecutor(count) as threads:
        codes = set(threads.map(step, range(0, size_bytes, POPULATE_STEP_BYTES)))
    if codes <= {0}:
        return True
    if codes <= {0, errno.EINVAL, errno.ENOSYS}:
        return False
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _take_huge(address: int) -> bool:
    """Takes a huge page; False if it cannot be had: then its small ones are still to be taken."""
    # Of a range without any page nothing is made.
    if advise(address, mmap.PAGESIZE, MADV_POPULATE_WRITE):
        return False
    return advise(address, HUGE_PAGE_BYTES, MADV_COLLAPSE) == 0

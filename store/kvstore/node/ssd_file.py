"""The SSD tier's preallocated data file: slots, moved straight to and from the pool."""

import errno
import fcntl
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from kvstore.config import readable_size
from kvstore.core.spec import SLOT_ALIGN_BYTES
from kvstore.durable import sync_directory
from kvstore.errors import ConfigError

log = logging.getLogger(__name__)

DATA_NAME = "data"
RUN_BUFFERS_MAX = 512  # under IOV_MAX


class SsdFile:
    """One file of ``capacity_bytes``; offsets, lengths and buffers are multiples of 4,096 bytes.

    ``direct`` says whether the kernel's page cache is bypassed, which needs a file system that
    can; without it everything works, at the price of a copy.
    """

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        """Opens or creates the file with all of its space; ConfigError where there is no room."""
        self.path = folder / DATA_NAME
        self.capacity_bytes = capacity_bytes
        self.direct = True
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            try:
                self._descriptor = os.open(self.path, flags | os.O_DIRECT, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._open_buffered()
            self._lock()
            self._allocate()
        except OSError as error:
            raise ConfigError(f"SSD file {self.path}: {error.strerror}") from None

    def _open_buffered(self) -> None:
        log.warning("%s has no O_DIRECT: the SSD tier goes through the page cache", self.path)
        self.direct = False
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _lock(self) -> None:
        """One owner, also where two directories have links to one file."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ConfigError(
                f"SSD file {self.path} is in use by another node; give each node one of its own"
            ) from None

    def _allocate(self) -> None:
        stat = os.fstat(self._descriptor)
        room = os.statvfs(self.path.parent)
        needed = self.capacity_bytes - stat.st_blocks * 512
        if needed > (free := room.f_bavail * room.f_frsize):
            os.close(self._descriptor)
            raise ConfigError(
                f"{self.path.parent} has room for {readable_size(free)}, the SSD tier needs "
                f"{readable_size(needed)} more; set a smaller --ssd or another --ssd-dir"
            )
        if stat.st_size > self.capacity_bytes:
            os.ftruncate(self._descriptor, self.capacity_bytes)
        os.posix_fallocate(self._descriptor, 0, self.capacity_bytes)
        os.fsync(self._descriptor)
        sync_directory(self.path.parent)

    def probe(self, page: memoryview) -> None:
        """Reads one page into pool memory, and falls back if that cannot be done directly."""
        try:
            os.preadv(self._descriptor, [page[:SLOT_ALIGN_BYTES]], 0)
        except OSError as error:
            if not self.direct or error.errno not in (errno.EINVAL, errno.EFAULT):
                raise
            os.close(self._descriptor)
            self._open_buffered()
            self._lock()

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fills ``buffers`` from consecutive bytes at ``offset``; OSError if it cannot."""
        done = os.preadv(self._descriptor, buffers, offset)
        total = sum(len(b) for b in buffers)
        while done < total:
            rest = _after(buffers, done)
            step = os.preadv(self._descriptor, rest, offset + done)
            if step == 0:
                raise OSError(errno.EIO, f"{self.path} ends before byte {offset + total}")
            done += step

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Writes ``buffers`` to consecutive bytes at ``offset``; durable only after ``sync``."""
        done = os.pwritev(self._descriptor, buffers, offset)
        total = sum(len(b) for b in buffers)
        while done < total:
            step = os.pwritev(self._descriptor, _after(buffers, done), offset + done)
            if step == 0:
                raise OSError(errno.EIO, f"{self.path} took no bytes at {offset + done}")
            done += step

    def lost(self) -> str:
        """Why nothing that is written here will be found again; empty while it will."""
        return lost_file(self.path, os.fstat(self._descriptor), self.capacity_bytes)

    def sync(self) -> None:
        """Makes everything written so far survive power loss."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def lost_file(path: Path, opened: os.stat_result, nbytes: int) -> str:
    """What has become of an open file; empty while ``path`` leads to it and it has ``nbytes``."""
    try:
        named = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} was removed"
    except OSError as error:  # no proof of a loss: what is open goes on
        log.debug("%s cannot be looked at: %s", path, error)
        return ""
    if not os.path.samestat(named, opened):
        return f"{path} was replaced"
    if named.st_size < nbytes:
        return f"{path} was cut off: it has {named.st_size} of its {nbytes} bytes"
    return ""


def _after(buffers: Sequence[memoryview], skip: int) -> list[memoryview]:
    """What is left of ``buffers`` after ``skip`` bytes."""
    rest = []
    for buffer in buffers:
        if skip < len(buffer):
            rest.append(buffer[skip:])
        skip = max(0, skip - len(buffer))
    return rest

"""Files that survive power loss, and full disks."""

import contextlib
import os
import stat
from pathlib import Path

from kvstore.faultpoint import faultpoint

LMDB_LOCK_NAME = "lock.mdb"
LMDB_LOCK_BYTES = 16 << 10  # twice what LMDB asks for with its 126 readers


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replaces ``path`` with ``data``: a reader finds the old bytes or the new, never a mixture.

    Order: temporary file, fsync, rename, fsync of the directory; on return the new bytes are safe.
    Raises OSError, and then the old file stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            faultpoint("durable.file")
            os.fsync(file.fileno())
        faultpoint("durable.rename")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    faultpoint("durable.directory")
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_directory(path: Path) -> None:
    """Makes a directory that its owner alone can enter, and lets the owner into one that is there.

    Not left to LMDB: it gives the directory the mode of its files, which nobody but root can enter.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    if not path.stat().st_mode & stat.S_IXUSR:
        path.chmod(0o700)


def take_lmdb_lock_file(folder: Path) -> None:
    """Takes the space of the file that LMDB maps for its locks; OSError where there is none.

    LMDB leaves it sparse: on a full disk the first use of the mapping is a SIGBUS. For a directory
    that no other process and no environment of this one has open.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(folder / LMDB_LOCK_NAME, flags, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, LMDB_LOCK_BYTES)
    finally:
        os.close(descriptor)

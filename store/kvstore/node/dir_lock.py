"""One owner for a directory: an flock on a file in it, gone with the process that holds it."""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from kvstore.errors import ConfigError

LOCK_NAME = "lock"
PATIENCE_S = 0.5
RETRY_S = 0.02


class DirectoryInUseError(ConfigError):
    """Another process holds the directory."""


class DirectoryLock:
    """Held from construction to ``release``; DirectoryInUseError if another process holds it.

    The lock is the file's, whatever path leads to it: a link to the directory is the directory.
    """

    def __init__(self, folder: Path, *, patience_s: float = PATIENCE_S) -> None:
        """Makes ``folder`` (mode 0700) if need be and locks it.

        The patience is for a node that is just sweeping up after dead ones, or is about to end.
        """
        self.folder = folder
        deadline = time.monotonic() + patience_s
        try:
            while (descriptor := self._try()) is None:
                if time.monotonic() >= deadline:
                    raise DirectoryInUseError(
                        f"{folder} is in use by another node; give each node one of its own"
                    )
                time.sleep(RETRY_S)
        except OSError as error:
            raise ConfigError(f"directory {folder}: {error.strerror}") from None
        self._descriptor = descriptor

    def _try(self) -> int | None:
        """The locked file's descriptor, or None while another process has it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            if os.path.lexists(self.folder) and not self.folder.is_dir():
                raise
            return None  # it was there, and has just been removed
        path = self.folder / LOCK_NAME
        try:
            descriptor = _opened(path)
        except FileNotFoundError:
            return None  # an owner that ended has just removed the directory
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The same owner may have removed the file between open and flock: a lock on a file
            # without a name protects nothing.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        return None

    def release(self, *, remove: bool = False) -> None:
        """Gives the directory up; ``remove`` takes the lock file, and an empty directory, away."""
        try:
            if remove:
                (self.folder / LOCK_NAME).unlink(missing_ok=True)
                # From here on another process may make the lock its own, or remove the directory.
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
        finally:
            os.close(self._descriptor)


def _opened(path: Path) -> int:
    """Opens the lock file, or makes one that is the directory's owner's; no link is followed.

    The directory may be one of a user who plants links, and this process root's.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _opened_again(path, flags)
    if os.geteuid() == 0:
        try:
            owner = path.parent.stat()
            with contextlib.suppress(OSError):  # where it cannot be given, root has it all the same
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


def _opened_again(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"lock file {path} is a symbolic link; remove it") from None
        raise

"""One owner for a directory: an flock on a file in it, gone with the process that holds it."""

import fcntl
import os
from pathlib import Path

from kvstore.errors import ConfigError

LOCK_NAME = "lock"


class DirectoryLock:
    """Held from construction to ``release``; ConfigError if another process holds it."""

    def __init__(self, folder: Path) -> None:
        """Makes ``folder`` (mode 0700) if need be and locks it."""
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = self._lock(folder / LOCK_NAME)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is in use by another node; give each node a directory of its own"
            ) from None
        except OSError as error:
            raise ConfigError(f"directory {folder}: {error.strerror}") from None

    @staticmethod
    def _lock(path: Path) -> int:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # An owner that ended may have removed the file between open and flock: a lock
                # on a file without a name protects nothing.
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def release(self, *, remove: bool = False) -> None:
        """Gives the directory up; ``remove`` takes the lock file, and an empty directory, away."""
        if remove:
            (self.folder / LOCK_NAME).unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        os.close(self._descriptor)

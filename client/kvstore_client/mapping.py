"""The node's shared memory in this process: the pool, read and write, and the directory."""

import contextlib
import errno
import logging
import mmap
import os
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from kvstore.core.directory import DirectoryReader
from kvstore.errors import PreconditionError
from kvstore.shared_memory import MADV_POPULATE_WRITE, SharedMap, advise
from kvstore_proto import node_pb2

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

_POPULATE_STEP_BYTES = 32 << 20


@contextlib.contextmanager
def _opened(path: str, nbytes: int, *, write: bool) -> Iterator[int]:
    """A descriptor of a file of at least ``nbytes``."""
    try:
        fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise PreconditionError(
            f"cannot map {path}: {error.strerror}; a client runs on the node's own host, "
            "as its user, and sees the node's pool_dir"
        ) from None
    try:
        if not 0 < nbytes <= os.fstat(fd).st_size:
            raise PreconditionError(f"{path} is not of the {nbytes} bytes that the node announced")
        try:
            yield fd
        except OSError as error:
            raise PreconditionError(f"cannot map {path}: {error.strerror}") from None
    finally:
        os.close(fd)


class Mapping:
    """Pool and directory of one node instance.

    Both stay mapped for as long as anything refers to their bytes: a view never dangles, though
    what it shows may change once its lease is gone.
    """

    def __init__(self, welcome: node_pb2.Welcome, *, populate: bool = True) -> None:
        with _opened(welcome.pool_path, welcome.pool_bytes, write=True) as file:
            self._map = SharedMap(file, welcome.pool_bytes)
        self.instance: int = welcome.instance
        self.pool: Bytes = np.frombuffer(self._map.memory, dtype=np.uint8)
        with _opened(welcome.directory_path, welcome.directory_bytes, write=False) as file:
            directory = mmap.mmap(file, welcome.directory_bytes, prot=mmap.PROT_READ)
        self.directory = DirectoryReader(memoryview(directory))
        if self.directory.instance != welcome.instance:
            raise PreconditionError("the directory belongs to another instance of the node")
        self._stop = threading.Event()
        self._populating = threading.Thread(
            target=self._populate, name="kvstore-populate", daemon=True
        )
        if populate:
            self._populating.start()

    def _populate(self) -> None:
        """Maps every page now, so that no copy stops for a page fault.

        In steps, as each holds the lock of the address space.
        """
        base = self._map.address
        for at in range(0, len(self.pool), _POPULATE_STEP_BYTES):
            step = min(_POPULATE_STEP_BYTES, len(self.pool) - at)
            if self._stop.is_set():
                return
            if code := advise(base + at, step, MADV_POPULATE_WRITE):
                log.info("pool is mapped on demand: %s", errno.errorcode.get(code))
                return

    def wait_populated(self, timeout_s: float) -> bool:
        """Whether every page is mapped (or never will be) within ``timeout_s``."""
        if self._populating.ident is not None:
            self._populating.join(timeout_s)
        return not self._populating.is_alive()

    def close(self) -> None:
        """Ends the thread; the memory goes when the last view does."""
        self._stop.set()
        self.wait_populated(10.0)

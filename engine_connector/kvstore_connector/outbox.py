"""What background threads hand to the engine loop, and the descriptor that wakes it."""

import contextlib
import os
from dataclasses import dataclass, field
from threading import Lock


@dataclass(frozen=True, slots=True)
class FinishedLoad:
    """A load that ended: its leading ``blocks`` are in their pages."""

    request_id: str
    blocks: int
    end_reason: str
    blocks_by_tier: dict[str, int]


@dataclass(slots=True)
class Finished:
    """Everything that ended since the engine last asked."""

    loads: list[FinishedLoad] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class Outbox:
    """Filled by any thread, emptied by the engine loop; one wake-up for many events."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = Lock()
        self._finished = Finished()
        self._signalled = False
        self._closed = False

    def put_load(self, load: FinishedLoad) -> None:
        """Reports one load."""
        with self._lock:
            self._finished.loads.append(load)
            self._signal()

    def put_pages(self, pages: list[int]) -> None:
        """Gives saved pages back."""
        if pages:
            with self._lock:
                self._finished.pages.extend(pages)
                self._signal()

    def drain(self) -> Finished:
        """Takes everything; never blocks."""
        with self._lock:
            taken, self._finished = self._finished, Finished()
            if self._signalled and not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.fd)
            self._signalled = False
        return taken

    def close(self) -> None:
        """Closes the descriptor; events put later are kept but wake nobody."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.fd)

    def _signal(self) -> None:
        if not self._signalled and not self._closed:
            self._signalled = True
            os.eventfd_write(self.fd, 1)

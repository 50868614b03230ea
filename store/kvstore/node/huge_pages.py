"""Makes huge pages of the small ones that a start takes for the pool, in the background."""

import errno
import logging
import threading
import time
from collections import deque

from kvstore.config import readable_size
from kvstore.node.pool import SharedFile
from kvstore.shared_memory import HUGE_PAGE_BYTES, MADV_COLLAPSE, advise

log = logging.getLogger(__name__)

START_AFTER_S = 1.0
SHARE = 0.25  # of its time at most a thread of the node is at this
PASS_EVERY_S = 5.0  # at first; each pass without any success doubles it
PASS_EVERY_MAX_S = 600.0
FAILURES_IN_A_ROW = 256  # then the pass ends; the next one begins with others
WITHOUT_MEMORY = frozenset({errno.ENOMEM, errno.EBUSY})  # of the host, or of the control group
WITHOUT_MEMORY_COUNTS = 16  # failures, as looking for some takes it from others
NEVER = frozenset({errno.EINVAL, errno.ENOSYS})


class HugePages:
    """A thread that asks for the huge pages, as a start must not wait for them.

    The kernel moves the bytes, whoever uses them, and refuses where a device has them pinned.
    The thread ends once all are huge, or if the kernel makes none of this memory.
    """

    def __init__(self, pool: SharedFile) -> None:
        """``pool`` is taken, and is closed after this."""
        self._address = pool.map.address
        self._small = deque(range(0, pool.size_bytes - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pool-huge-pages", daemon=True)

    @property
    def small_bytes(self) -> int:
        """What is in small pages, also where that is to stay so."""
        return len(self._small) * HUGE_PAGE_BYTES

    def start(self) -> None:
        """Begins, if anything is to be done; returns at once."""
        if self._small:
            self._thread.start()

    def close(self) -> None:
        """Ends after the page in hand."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        pause_s, every_s = START_AFTER_S, PASS_EVERY_S
        while self._small and not self._stop.wait(pause_s):
            before = self.small_bytes
            failures = self._pass()
            gained = before - self.small_bytes
            if gained:
                log.info(
                    "%s more of the pool in huge pages, %s in small ones",
                    readable_size(gained),
                    readable_size(self.small_bytes),
                )
            elif failures and failures <= NEVER:
                log.info("the system makes no huge pages of the pool: %s", _names(failures))
                return
            every_s = PASS_EVERY_S if gained else min(2 * every_s, PASS_EVERY_MAX_S)
            pause_s = every_s

    def _pass(self) -> set[int]:
        """Asks once for each, or until too many fail in a row; why some failed."""
        failures: set[int] = set()
        in_a_row = 0
        for _ in range(len(self._small)):
            page = self._small.popleft()
            started = time.monotonic()
            code = advise(self._address + page, HUGE_PAGE_BYTES, MADV_COLLAPSE)
            took_s = time.monotonic() - started
            if code:
                self._small.append(page)
                failures.add(code)
                in_a_row += WITHOUT_MEMORY_COUNTS if code in WITHOUT_MEMORY else 1
            else:
                in_a_row = 0
            if in_a_row >= FAILURES_IN_A_ROW or self._stop.wait(took_s * (1 / SHARE - 1)):
                break
        return failures


def _names(codes: set[int]) -> str:
    return ", ".join(sorted(errno.errorcode[code] for code in codes))

"""A thread that copies in the CPU time that computing threads leave."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

STARVED_S = 1.0
_NICEST = 19


class IdleCopier:
    """Runs copies one after the other in a thread of the scheduling class idle.

    Such a thread is preempted as soon as any other wakes up on its core. One that is merely nice
    keeps the core to the end of its time slice: milliseconds in which all threads that compute
    wait, at their next barrier, for the one that should run there.
    """

    def __init__(self) -> None:
        self._tid = 0
        self._waiting = 0
        self._idle = False
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="kvstore-save", initializer=self._started
        )

    async def run(self, copy: Callable[[], None]) -> None:
        """Waits for ``copy`` to end, which it does by itself: cancelling ends the wait only."""
        running = asyncio.get_running_loop().run_in_executor(self._pool, copy)
        self._waiting += 1
        try:
            while not (await asyncio.wait([running], timeout=STARVED_S))[0]:
                # The cores are never idle: from now on it takes a small share of them.
                self._set_idle(False)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._set_idle(True)
        running.result()

    def close(self) -> None:
        """Waits for a copy that is under way; those that wait behind it never run."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _started(self) -> None:
        self._tid = threading.get_native_id()
        self._set_idle(True)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._tid, _NICEST)

    def _set_idle(self, idle: bool) -> None:
        if idle == self._idle or not self._tid:
            return
        self._idle = idle
        policy = os.SCHED_IDLE if idle else os.SCHED_BATCH
        try:
            os.sched_setscheduler(self._tid, policy, os.sched_param(0))
        except OSError as error:  # a sandbox may forbid it; saving works all the same
            log.debug("the priority of the saving thread stays: %s", error)

"""Saves: the engine's full pages into slots of the node, in the background, at low priority."""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from kvstore.core.types import ReserveStatus
from kvstore.errors import KVStoreError

from kvstore_connector.counters import Counters
from kvstore_connector.link import Link
from kvstore_connector.outbox import Outbox
from kvstore_connector.pages import PageRows
from kvstore_connector.store import Namespace, Write

log = logging.getLogger(__name__)

_NICEST = 19


@dataclass(slots=True, eq=False)
class Chain:
    """Consecutive blocks to save: ``keys[i]`` is in ``pages[i]``."""

    parent: bytes | None
    keys: list[bytes]
    pages: list[int]
    stopped: bool = False  # its copy ends before the next block

    def split(self, count: int) -> "Chain":
        """Keeps the first ``count`` blocks and returns the others."""
        rest = Chain(self.keys[count - 1], self.keys[count:], self.pages[count:])
        del self.keys[count:], self.pages[count:]
        return rest


def _yield_to_others() -> None:
    """Makes this thread take only the CPU time that computing threads leave."""
    tid = threading.get_native_id()
    try:
        os.sched_setscheduler(tid, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, tid, _NICEST)
    except OSError as error:  # a sandbox may forbid it; saving works all the same
        log.debug("the priority of the saving thread stays: %s", error)


def slots_to_fill(statuses: Sequence[int]) -> tuple[list[int], int]:
    """Indices with a slot to fill, and how many leading blocks can be in the store in the end.

    Nothing behind a block that found no space is filled: it could not be reached.
    """
    usable = next((i for i, s in enumerate(statuses) if s == ReserveStatus.FULL), len(statuses))
    return [i for i in range(usable) if statuses[i] == ReserveStatus.SLOT], usable


class Saves:
    """A bounded queue of chains, saved one batch of chains after the other.

    A page given to ``add`` comes back through the outbox exactly once: as soon as its bytes are
    copied, or when its save is given up. The queue is filled by the engine loop and emptied in the
    link's thread; only the copies run in a thread of low priority.
    """

    def __init__(
        self,
        link: Link,
        pages: PageRows,
        outbox: Outbox,
        counters: Counters,
        *,
        queue_bytes: int,
        batch_bytes: int,
        linger_s: float,
        timeout_s: float,
    ) -> None:
        self._link = link
        self._pages = pages
        self._outbox = outbox
        self._counters = counters
        self._blocks_max = queue_bytes // pages.page_bytes
        self._batch_blocks_max = max(1, batch_bytes // pages.page_bytes)
        self._linger_s = linger_s
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._queue: deque[Chain] = deque()
        self._blocks = 0  # queued or being saved
        self._keys: set[bytes] = set()  # of those
        self._busy = False
        self._asked = False  # what is queued should not wait for more
        self._wake = asyncio.Event()  # of the link's loop: look again whether a batch is due
        self._copier = ThreadPoolExecutor(
            1, thread_name_prefix="kvstore-save", initializer=_yield_to_others
        )

    def add(self, chain: Chain) -> None:
        """Queues a chain; what is queued already, or does not fit, comes back at once."""
        with self._changed:
            queued = next((i for i, k in enumerate(chain.keys) if k not in self._keys), None)
            if queued is None or self._link.namespace is None:
                self._outbox.put_pages(chain.pages)
                return
            if queued:
                self._outbox.put_pages(chain.pages[:queued])
                chain = chain.split(queued)
            room = max(0, self._blocks_max - self._blocks)
            if room < len(chain.keys):
                # What follows a dropped block could not be found: drop that too.
                self._counters.add("connector_saves_dropped_blocks", len(chain.keys) - room)
                self._outbox.put_pages(chain.pages[room:])
                del chain.keys[room:], chain.pages[room:]
            if chain.keys:
                self._enqueue(chain)

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything queued is saved or given up; for an orderly end."""
        self.hurry()
        with self._changed:
            return self._changed.wait_for(lambda: not self._blocks, timeout_s)

    def hurry(self) -> None:
        """What is queued waits for no others: nothing more may come for a while."""
        with self._changed:
            if self._queue and not self._asked:
                self._asked = True
                self._link.submit(self._wake.set)

    def close(self) -> None:
        """Gives everything back, after a copy that is under way. The link is closed before."""
        self._copier.shutdown(wait=True, cancel_futures=True)
        while chains := self._take_all():
            for chain in chains:
                self._done(chain)

    def _enqueue(self, chain: Chain) -> None:
        self._keys.update(chain.keys)
        self._blocks += len(chain.keys)
        self._queue.append(chain)
        if not self._busy:
            self._busy = self._link.submit(self._spawn)
        elif self._blocks >= self._batch_blocks_max:
            self._link.submit(self._wake.set)

    def _take_all(self) -> list[Chain]:
        """What is saved next, side by side: as many chains as one batch has room for."""
        with self._changed:
            chains: list[Chain] = []
            room = self._batch_blocks_max
            while self._queue and room:
                chains.append(self._take(room))
                room -= len(chains[-1].keys)
            self._asked = self._asked and bool(self._queue)
            self._busy = bool(chains)
            return chains

    def _take(self, room: int) -> Chain:
        """The next chain, with those that continue it, up to ``room`` blocks."""
        chain = self._queue.popleft()
        while len(chain.keys) < room:
            end = chain.keys[-1]
            more = next((other for other in self._queue if other.parent == end), None)
            if more is None:
                break
            self._queue.remove(more)
            chain.keys += more.keys
            chain.pages += more.pages
        if len(chain.keys) > room:
            self._queue.appendleft(chain.split(room))
        return chain

    def _done(self, batch: Chain) -> None:
        self._give_back(batch)
        with self._changed:
            self._blocks -= len(batch.keys)
            self._keys.difference_update(batch.keys)
            self._changed.notify_all()

    def _give_back(self, batch: Chain) -> None:
        pages, batch.pages = batch.pages, []
        self._outbox.put_pages(pages)

    def _spawn(self) -> None:
        self._link.spawn(self._run())

    def _due(self) -> bool:
        """Whether what is queued is saved now; while nothing is being saved."""
        with self._changed:
            return self._asked or self._blocks >= self._batch_blocks_max or not self._blocks

    async def _linger(self) -> None:
        """Lets more blocks come: every batch costs node and client the same, however small."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._linger_s):
                while not self._due():
                    self._wake.clear()
                    await self._wake.wait()

    async def _run(self) -> None:
        await self._linger()
        while chains := self._take_all():
            # Side by side, so that one wake-up of either process serves several chains.
            try:
                await asyncio.gather(*map(self._try_to_save, chains))
            finally:
                for chain in chains:
                    self._done(chain)
            await self._linger()

    async def _try_to_save(self, batch: Chain) -> None:
        saved = 0
        namespace = self._link.namespace
        try:
            if namespace is not None:
                saved = await self._save(namespace, batch)
        except TimeoutError as error:
            log.info("a save of %d blocks took too long: %s", len(batch.keys), error)
            if namespace is not None:
                self._link.missed_deadline(namespace)
        except KVStoreError as error:
            log.info("a save of %d blocks failed: %s", len(batch.keys), error)
        except Exception:
            log.exception("a save of %d blocks failed", len(batch.keys))
        self._counters.add("connector_saves_failed_blocks", len(batch.keys) - saved)

    async def _save(self, namespace: Namespace, batch: Chain) -> int:
        """Saves ``batch``; how many of its blocks the node has then."""
        async with namespace.write(
            batch.keys, parent=batch.parent, timeout_s=self._timeout_s
        ) as write:
            wanted, usable = slots_to_fill(write.statuses.tolist())
            filled = await self._fill(write, wanted, batch)
            self._give_back(batch)
            levels = await write.commit(filled) if filled else ()
        committed = int(np.count_nonzero(levels))
        self._counters.add("connector_saved_blocks", committed)
        self._counters.add("connector_saved_bytes", committed * self._pages.page_bytes)
        return usable - len(wanted) + committed

    async def _fill(self, write: Write, wanted: list[int], batch: Chain) -> list[int]:
        if not wanted:
            return []
        filled: list[int] = []
        copy = self._link.loop.run_in_executor(
            self._copier, self._copy, write, wanted, batch, filled
        )
        try:
            await asyncio.shield(copy)
        except asyncio.CancelledError:
            # The slots go back when this ends: nothing may write to them any more.
            batch.stopped = True
            await asyncio.wait([copy])
            raise
        return filled

    def _copy(self, write: Write, wanted: list[int], batch: Chain, filled: list[int]) -> None:
        started_s = time.thread_time()
        for index in wanted:
            if batch.stopped:
                break
            write.put(index, self._pages.row(batch.pages[index]))
            filled.append(index)
        self._counters.add("connector_save_cpu_seconds", time.thread_time() - started_s)

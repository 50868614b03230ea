"""Loads: slots of the node's pool into the engine's pages, each ended by exactly one result."""

import asyncio
import logging
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kvstore.core.types import EndReason, Tier
from kvstore.errors import (
    KVStoreError,
    ResourceExhaustedError,
    UnavailableError,
)

from kvstore_connector.counters import Counters
from kvstore_connector.link import Link
from kvstore_connector.outbox import FinishedLoad, Outbox
from kvstore_connector.pages import PageRows
from kvstore_connector.store import Lease, Namespace

log = logging.getLogger(__name__)

TIMED_OUT = EndReason.TIMED_OUT.name.lower()
UNAVAILABLE = "store_unavailable"
# What the node needs at most to say that the time is over, once it is.
ANSWER_GRACE_S = 0.2


@dataclass(slots=True)
class Load:
    """Blocks ``keys`` behind ``parent`` into ``pages``; ``next_key`` is asked for its absence."""

    request_id: str
    parent: bytes | None
    keys: list[bytes]
    pages: list[int]
    next_key: bytes | None
    tiers_seen: list[int]  # where each block was when its request came; 0: nowhere
    deadline_s: float  # on the monotonic clock
    cancelled: bool = False
    finished: bool = False
    blocks: int = 0  # leading blocks whose bytes are proven to be in their pages
    end_reason: str = UNAVAILABLE
    tiers: Counter[str] = field(default_factory=Counter)

    def count(self, sources: list[int]) -> None:
        """More blocks are in their pages; a block fetched ahead counts as of the slower tier."""
        seen = self.tiers_seen[self.blocks : self.blocks + len(sources)]
        self.tiers.update(Tier(max(pair)).name.lower() for pair in zip(sources, seen, strict=True))
        self.blocks += len(sources)

    def result(self) -> FinishedLoad:
        """What the engine is told."""
        return FinishedLoad(self.request_id, self.blocks, self.end_reason, dict(self.tiers))


def reason_of(error: KVStoreError) -> str:
    """Why a chain ended, from the error that ended it."""
    if isinstance(error, UnavailableError):
        return UNAVAILABLE
    if isinstance(error, ResourceExhaustedError):
        return "no_space"
    return "store_error"


class Loads:
    """Runs loads in the link's thread, and their copies in one thread of their own."""

    def __init__(self, link: Link, pages: PageRows, outbox: Outbox, counters: Counters) -> None:
        self._link = link
        self._pages = pages
        self._outbox = outbox
        self._counters = counters
        self._running: dict[str, Load] = {}
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="kvstore-load")

    def start(self, load: Load) -> None:
        """Starts a load; its result comes through the outbox, whatever happens."""
        namespace = self._link.namespace
        self._counters.add("connector_loads")
        self._running[load.request_id] = load
        known = namespace is not None and load.keys
        if not known or not self._link.submit(self._spawn, namespace, load):
            self._finish(load)

    def cancel(self, request_id: str) -> None:
        """The request is gone: its load ends early, by its result."""
        if load := self._running.get(request_id):
            load.cancelled = True

    def ended(self, request_id: str) -> Load | None:
        """The engine took the result."""
        return self._running.pop(request_id, None)

    def close(self) -> None:
        """Ends what is left, after a copy that is under way. The link is closed before."""
        self._copier.shutdown(wait=True, cancel_futures=True)
        for load in self._running.values():
            self._finish(load)

    def _spawn(self, namespace: Namespace, load: Load) -> None:
        self._link.spawn(self._run(namespace, load))

    async def _run(self, namespace: Namespace, load: Load) -> None:
        try:
            async with asyncio.timeout(load.deadline_s - time.monotonic()):
                await self._transfer(namespace, load)
        except TimeoutError:  # DeadlineError is one
            load.end_reason = TIMED_OUT
        except KVStoreError as error:
            load.end_reason = reason_of(error)
            log.info("load of %s ended after %d blocks: %s", load.request_id, load.blocks, error)
        except Exception:
            load.end_reason = "store_error"
            log.exception("load of %s ended after %d blocks", load.request_id, load.blocks)
        finally:
            if load.end_reason == TIMED_OUT:
                self._link.missed_deadline(namespace)
            self._finish(load)

    async def _transfer(self, namespace: Namespace, load: Load) -> None:
        keys = load.keys if load.next_key is None else [*load.keys, load.next_key]
        remaining_s = max(0.0, load.deadline_s - ANSWER_GRACE_S - time.monotonic())
        lease = await namespace.acquire(keys, parent=load.parent, timeout_s=remaining_s)
        try:
            async for first, count in lease.arrivals():
                await self._copy_arrived(lease, first, count, load)
                if load.cancelled or first + count > len(load.keys):
                    break
                if load.blocks == len(load.keys) and load.next_key is None:
                    break
            load.end_reason = self._why_ended(load, lease)
        finally:
            lease.release()

    @staticmethod
    def _why_ended(load: Load, lease: Lease) -> str:
        if load.cancelled:
            return "released"
        return EndReason(lease.reason or EndReason.COMPLETE).name.lower()

    async def _copy_arrived(self, lease: Lease, first: int, count: int, load: Load) -> None:
        copy = self._link.loop.run_in_executor(self._copier, self._copy, lease, first, count, load)
        try:
            await asyncio.shield(copy)
        except asyncio.CancelledError:
            # Pages may be handed on only after the last byte was written to them.
            load.cancelled = True
            await asyncio.wait([copy])
            raise
        lease.release(first, count)

    def _copy(self, lease: Lease, first: int, count: int, load: Load) -> None:
        started_s = time.perf_counter()
        for piece in self._pages.spans(load.pages[first : first + count]):
            if load.cancelled:
                break
            # Raises if the session was lost and the slots have other contents since.
            done = lease.copy_into(piece, load.blocks, len(piece) // self._pages.page_bytes)
            load.count(lease.sources[load.blocks : load.blocks + done].tolist())
        self._counters.add("connector_load_copy_seconds", time.perf_counter() - started_s)

    def _finish(self, load: Load) -> None:
        if load.finished:
            return
        load.finished = True
        self._counters.add("connector_loaded_blocks", load.blocks)
        self._counters.add("connector_loaded_bytes", load.blocks * self._pages.page_bytes)
        if load.blocks < len(load.keys):
            self._counters.add("connector_loads_short")
        self._outbox.put_load(load.result())

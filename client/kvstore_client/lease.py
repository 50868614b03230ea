"""A lease: the pins of one Acquire, granted block by block in chain order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from kvstore.core.types import EndReason
from kvstore.errors import InternalError, KVStoreError, PreconditionError, UnavailableError
from kvstore_proto import node_pb2

from kvstore_client.copying import Blocks, gather, slot_bytes
from kvstore_client.mapping import Mapping
from kvstore_client.session import Session
from kvstore_client.streaming import copy
from kvstore_client.views import SlotViews


class Lease:
    """Blocks that stay where they are until they are released.

    ``granted`` grows while blocks arrive from slower tiers, until ``reason`` says why it ended;
    blocks that were released before they came are passed over, and have no slot.
    ``sources`` has for each granted block the tier where it was when it was asked for. When the
    session is lost the pins are in doubt: ``still_valid`` tells after a copy whether it is good.

    Reading and ``release`` may be done in any thread, all else belongs to the session's loop.
    """

    def __init__(self, session: Session, mapping: Mapping, count: int, nbytes: int) -> None:
        self.granted = 0
        self.reason: EndReason | None = None
        self.sources: npt.NDArray[np.uint8] = np.zeros(count, dtype=np.uint8)
        self.offsets: npt.NDArray[np.int64] = np.full(count, -1, dtype=np.int64)
        self.generations: npt.NDArray[np.uint32] = np.zeros(count, dtype=np.uint32)
        self.blocks = SlotViews(mapping.pool, self.offsets, nbytes, write=False)
        self.count = count
        self.block_bytes = nbytes
        self._session = session
        self._mapping = mapping
        self._error: KVStoreError | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._released: npt.NDArray[np.bool_] = np.zeros(count, dtype=np.bool_)
        self._closed: Callable[[], None] | None = None
        self.id = session.expect(self)

    def start(
        self, request: node_pb2.Acquire, timeout_s: float, closed: Callable[[], None]
    ) -> None:
        """Sends the request; what has not come after ``timeout_s`` counts as timed out.

        ``closed`` is called once nothing is held any more.
        """
        self._closed = closed
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(timeout_s, self._expire)
        self._session.post(node_pb2.SessionRequest(id=self.id, acquire=request))

    @property
    def ended(self) -> bool:
        """Whether no more blocks will be granted."""
        return self.reason is not None or self._error is not None

    async def wait(self, count: int | None = None) -> int:
        """Until ``count`` blocks are granted (all, if None) or the lease has ended; how many are.

        Raises UnavailableError if the session was lost before that.
        """
        wanted = self.count if count is None else count
        while self.granted < wanted and not self.ended:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if self._error is not None and self.granted < wanted:
            raise self._error
        return self.granted

    async def arrivals(self) -> AsyncIterator[tuple[int, int]]:
        """Ranges of blocks (first, count) as they are granted, in chain order."""
        seen = 0
        while (now := await self.wait(seen + 1)) > seen:
            yield seen, now - seen
            seen = now

    def still_valid(self, first: int = 0, count: int | None = None) -> bool:
        """Whether the slots still hold what was granted. Ask after the copy, not before."""
        end = self.granted if count is None else first + count
        came = self.offsets[first:end] >= 0
        now = self._mapping.directory.generations_at(self.offsets[first:end][came])
        return bool(np.array_equal(now, self.generations[first:end][came]))

    def copy_into(self, out: Any, first: int = 0, count: int | None = None) -> int:
        """Copies granted blocks to ``out`` (one buffer, or a list of one buffer a block).

        Returns how many. Raises UnavailableError if a slot changed meanwhile, which only the loss
        of the session allows: the bytes in ``out`` are then worthless.
        """
        end = self.granted if count is None else first + count
        if first < end:
            self.blocks.bytes_at(end - 1)
        if self._released[first:end].any():
            raise PreconditionError(f"blocks {first} to {end - 1} are partly released: copy before")
        targets = Blocks(out, end - first, self.block_bytes, write=True)
        if targets.each is None:
            gather(self._mapping.pool, self.offsets[first:end], self.block_bytes, targets.whole)
        else:
            for index in range(first, end):
                copy(targets.each[index - first], self.blocks.bytes_at(index))
        if not self.still_valid(first, end - first):
            raise UnavailableError("the lease was lost during the copy; what was read is discarded")
        return end - first

    def release(self, first: int = 0, count: int = 0) -> None:
        """Unpins ``count`` blocks, or with 0 all from ``first`` on. Needs no answer.

        Blocks in the range that have not come are given up, and those behind it still come.
        """
        end = self.count if count == 0 else first + count
        if not self.count:
            self._close()
        if self._closed is None or first >= end:
            return
        release = node_pb2.Release(acquire_id=self.id, first=first, count=end - first)
        if (first, end) == (0, self.count):
            release.count = 0
        self._released[first:end] = True  # before the answer can show the gap
        self._session.post(node_pb2.SessionRequest(id=self._session.next_id(), release=release))
        if self._released[: self.granted if self.ended else self.count].all():
            self._close()

    def _close(self) -> None:
        if (closed := self._closed) is not None:
            self._closed = None
            self.blocks.close()
            closed()

    def on_response(self, response: node_pb2.SessionResponse) -> None:
        """Granted or End."""
        if response.HasField("granted"):
            self._grant(response.granted)
            if response.granted.HasField("end") and not self.ended:
                self._end(EndReason(response.granted.end.reason))
        else:
            self._end(EndReason(response.end.reason))
        self._wake()

    def on_error(self, error: KVStoreError) -> None:
        """The node refused, or the session is lost."""
        self._error = error
        self._stop()
        self._wake()

    def _grant(self, granted: node_pb2.Granted) -> None:
        first, whole = self.granted, True
        for run in granted.runs:
            end = run.first + run.count
            whole &= run.first == self.granted  # else what was released before it came is left out
            gap = self._released[self.granted : run.first]
            if run.first < self.granted or end > self.count or not (whole or gap.all()):
                self._fail(f"run {run.first}+{run.count} after block {self.granted}")
                return
            last = run.offset + (run.count - 1) * run.stride
            if last + slot_bytes(self.block_bytes) > len(self._mapping.pool):
                self._fail(f"a slot at {last}, outside of the pool")
                return
            self.offsets[run.first : end] = run.offset + run.stride * np.arange(run.count)
            self.sources[run.first : end] = run.source
            self.granted = end
        came: slice | npt.NDArray[np.int64] = slice(first, self.granted)
        if not whole:
            came = first + np.flatnonzero(self.offsets[first : self.granted] >= 0)
        generations = np.frombuffer(granted.generations, dtype=np.uint8)
        if len(generations) != self.generations[came].nbytes:
            self._fail(f"{len(generations)} bytes of generations")
            return
        self.generations[came] = generations.view("<u4")
        self.blocks.grow(self.granted)
        if self.granted == self.count:
            self._end(EndReason.COMPLETE)  # the End that follows says nothing new

    def _fail(self, what: str) -> None:
        self.granted = len(self.blocks)
        self.on_error(InternalError(f"the node granted {what}"))
        self._session.forget(self.id)

    def _end(self, reason: EndReason) -> None:
        self.reason = reason
        self._stop()
        if self._released[: self.granted].all():
            self._close()

    def _expire(self) -> None:
        """The node is too slow: give up what has not come, keep what has."""
        self.release(self.granted, self.count - self.granted)
        self._end(EndReason.TIMED_OUT)
        self._wake()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._session.forget(self.id)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

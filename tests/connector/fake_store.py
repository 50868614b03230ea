"""A stand-in for the node and its client: blocks in a dict, faults on demand."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from kvstore.core.keys import namespace_root
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel, EndReason, ReserveStatus, Tier
from kvstore.errors import DeadlineError, UnavailableError

CALL_TIMEOUT_S = 0.1


@dataclass
class FakeMatch:
    """Tiers of leading blocks."""

    tiers: npt.NDArray[np.uint8]

    @property
    def count(self) -> int:
        return len(self.tiers)


@dataclass
class FakeStore:
    """Blocks and faults; one for several sessions."""

    blocks: dict[bytes, bytes] = field(default_factory=dict)
    tiers: dict[bytes, Tier] = field(default_factory=dict)
    reasons: dict[bytes, EndReason] = field(default_factory=dict)
    slots: int = 1 << 20  # writes beyond this many blocks find no space
    run_blocks: int = 4  # blocks that arrive together
    away: bool = False  # nobody listens
    stalled: bool = False  # listens, answers nothing
    arrivals_max: int = 1 << 20  # the node stops granting after this many blocks
    torn: bool = False  # slots were reused while they were copied
    wrong_size: bool = False
    foreign_root: bool = False
    raises: Exception | None = None  # from acquire and write
    calls: list[str] = field(default_factory=list)
    pinned: int = 0
    writing: int = 0
    hold_copy: threading.Event | None = None  # put waits for it
    in_copy: threading.Event = field(default_factory=threading.Event)
    hbm: set[bytes] = field(default_factory=set)
    sessions: list["FakeClient"] = field(default_factory=list)

    async def connect(self, on_lost: Callable[[], None]) -> "FakeClient":
        if self.away:
            raise UnavailableError("nobody listens")
        client = FakeClient(self, on_lost)
        self.sessions.append(client)
        return client

    def lose_session(self) -> None:
        """Breaks the newest session, from any thread."""
        client = self.sessions[-1]
        client.closed = True
        client.loop.call_soon_threadsafe(client.on_lost)


class FakeClient:
    """One session."""

    def __init__(self, store: FakeStore, on_lost: Callable[[], None]) -> None:
        self.store = store
        self.on_lost = on_lost
        self.closed = False
        self.reconnections = 0
        self.loop = asyncio.get_running_loop()

    async def reconnect(self, timeout_s: float | None = None) -> None:
        if self.store.away or self.store.pinned or self.store.writing:
            self.on_lost()
            raise UnavailableError("nobody listens")
        self.closed = False
        self.reconnections += 1

    async def open_namespace(self, spec: CacheSpec, *, tenant: str = "default") -> "FakeNamespace":
        return FakeNamespace(self, spec)

    async def close(self) -> None:
        self.closed = True


class FakeNamespace:
    """The namespace of one session."""

    def __init__(self, client: FakeClient, spec: CacheSpec) -> None:
        self.client = client
        self.store = client.store
        self.spec = spec
        self.root = bytes(32) if self.store.foreign_root else namespace_root(spec)

    def match(self, keys: Sequence[bytes]) -> FakeMatch:
        if self.client.closed:
            raise UnavailableError("session lost")
        count = next((i for i, k in enumerate(keys) if k not in self.store.blocks), len(keys))
        tiers = [self.store.tiers.get(key, Tier.DRAM) for key in keys[:count]]
        return FakeMatch(np.array(tiers, np.uint8))

    async def acquire(
        self, keys: Sequence[bytes], *, parent: bytes | None, timeout_s: float
    ) -> "FakeLease":
        self.store.calls.append(f"acquire {len(keys)}")
        if not self.store.stalled:
            await self._answer(timeout_s)
        return FakeLease(self, list(keys), timeout_s or CALL_TIMEOUT_S)

    @asynccontextmanager
    async def write(
        self, keys: Sequence[bytes], *, parent: bytes | None, timeout_s: float
    ) -> AsyncIterator["FakeWrite"]:
        self.store.calls.append(f"reserve {len(keys)}")
        await self._answer(timeout_s)
        self.store.writing += 1
        try:
            yield FakeWrite(self, list(keys))
        finally:
            self.store.writing -= 1

    async def prefetch(self, keys: Sequence[bytes], *, parent: bytes | None = None) -> int:
        self.store.calls.append(f"prefetch {len(keys)}")
        await self._answer(0.1)
        return len(keys)

    def hbm_events(
        self, *, stored: Sequence[bytes], removed: Sequence[bytes], cleared: bool
    ) -> None:
        if self.client.closed:
            return
        if cleared:
            self.store.hbm.clear()
        self.store.hbm.difference_update(removed)
        self.store.hbm.update(stored)

    async def _answer(self, timeout_s: float) -> None:
        if self.store.raises is not None:
            raise self.store.raises
        if self.client.closed:
            raise UnavailableError("session lost")
        if self.store.stalled:
            await asyncio.sleep(timeout_s + 0.05)
            raise DeadlineError("the node did not answer")


class FakeLease:
    """Pins, granted in runs."""

    def __init__(self, namespace: FakeNamespace, keys: list[bytes], timeout_s: float) -> None:
        self.store = namespace.store
        self.client = namespace.client
        self.keys = keys
        self.timeout_s = timeout_s
        self.stalled = self.store.stalled
        self.count = (
            0 if self.stalled else min(namespace.match(keys).count, self.store.arrivals_max)
        )
        self.held = self.count
        self.store.pinned += self.count
        tiers = [self.store.tiers.get(key, Tier.DRAM) for key in keys[: self.count]]
        self.sources = np.array(tiers, np.uint8)
        self.reason: EndReason | None = None
        if self.stalled:
            return
        if self.count == len(keys):
            self.reason = EndReason.COMPLETE
        elif self.count < self.store.arrivals_max:
            self.reason = self.store.reasons.get(keys[self.count], EndReason.NEVER_STORED)

    async def wait(self, count: int | None = None) -> int:
        if self.reason is None:
            await asyncio.sleep(self.timeout_s)
            self.reason = EndReason.TIMED_OUT
        return self.count

    async def arrivals(self) -> AsyncIterator[tuple[int, int]]:
        first = 0
        while first < self.count:
            await asyncio.sleep(0)
            if self.client.closed:
                raise UnavailableError("session lost")
            count = min(self.store.run_blocks, self.count - first)
            yield first, count
            first += count
        await self.wait()

    def copy_into(self, out: Any, first: int = 0, count: int | None = None) -> int:
        assert count is not None
        data = b"".join(self.store.blocks[key] for key in self.keys[first : first + count])
        np.copyto(out, np.frombuffer(data[:-1] if self.store.wrong_size else data, np.uint8))
        if self.store.torn:
            raise UnavailableError("the slots have other contents")
        return count

    def release(self, first: int = 0, count: int = 0) -> None:
        given_back = count or self.held
        self.held -= given_back
        self.store.pinned -= given_back


class FakeWrite:
    """Slots to fill."""

    def __init__(self, namespace: FakeNamespace, keys: list[bytes]) -> None:
        self.store = namespace.store
        self.client = namespace.client
        self.keys = keys
        self.filled: dict[int, bytes] = {}
        room = self.store.slots - len(self.store.blocks)
        statuses: list[ReserveStatus] = []
        for key in keys:
            if key in self.store.blocks:
                statuses.append(ReserveStatus.HAVE)
            else:
                statuses.append(ReserveStatus.SLOT if room > 0 else ReserveStatus.FULL)
                room -= 1
        self.statuses = np.array(statuses, np.uint8)

    def put(self, index: int, data: Any) -> None:
        self.store.in_copy.set()
        if self.store.hold_copy is not None:
            assert self.store.hold_copy.wait(10)
        self.filled[index] = bytes(data)

    async def commit(self, indices: Sequence[int] | None = None) -> npt.NDArray[np.uint8]:
        assert indices is not None
        if self.client.closed:
            raise UnavailableError("session lost")
        for i in indices:
            self.store.blocks[self.keys[i]] = self.filled[i]
        return np.full(len(indices), AckLevel.MEMORY, np.uint8)

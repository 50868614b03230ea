"""Whole chains at once: put and get overlap the node's work with their own copies."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from kvstore.core.types import AckLevel, EndReason, ReserveStatus

from kvstore_client.copying import Blocks
from kvstore_client.wire import Keys, joined_keys

if TYPE_CHECKING:
    from kvstore_client.namespace import Namespace
    from kvstore_client.writing import PendingCommit, Write

# One part of a put: long enough that a round trip to the node is short beside its copy. A round
# trip costs 1 to 2 ms right after a copy of this size, as the code of both sides has left the
# caches; smaller parts were measured and lose more than their overlap gains.
PART_BYTES = 64 << 20
PARTS_IN_FLIGHT = 4
# Copied without giving the event loop a turn, about a millisecond; a round trip takes several.
SLICE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Put:
    """What became of each block of a put."""

    statuses: npt.NDArray[np.uint8]  # ReserveStatus
    levels: npt.NDArray[np.uint8]  # AckLevel reached by those with status SLOT, else 0

    @property
    def stored(self) -> int:
        """Blocks that this put made visible."""
        return int(np.count_nonzero(self.levels))


@dataclass(frozen=True, slots=True)
class Got:
    """What a get copied."""

    count: int
    reason: EndReason


def _slices(count: int, nbytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, SLICE_BYTES // nbytes)
    for first in range(0, count, step):
        yield first, min(step, count - first)


class _Part:
    """One Reserve of a put: keys ``at`` … of the whole."""

    def __init__(self, at: int, write: Write, turn: asyncio.Lock) -> None:
        self.at = at
        self._turn = turn
        self.write = write
        self.commit: PendingCommit | None = None
        write.begin()

    async def fill(self, blocks: Blocks) -> bool:
        """Copies into the slots and sends the commit; False if there was no space for all."""
        await self.write.begun()
        full = np.flatnonzero(self.write.statuses == ReserveStatus.FULL)
        usable = int(full[0]) if len(full) else self.write.count
        # One part after the other: copied by turns, all would wait for the node at the same time.
        async with self._turn:
            for first, some in _slices(usable, self.write.nbytes):
                self._copy(blocks, first, some)
                await asyncio.sleep(0)
        chosen = np.flatnonzero(self.write.statuses[:usable] == ReserveStatus.SLOT)
        self.commit = self.write.begin_commit(chosen)
        return not len(full)

    def _copy(self, blocks: Blocks, first: int, count: int) -> None:
        data = blocks.part(self.at + first, count)
        if not isinstance(data, list):
            self.write.put_range(first, data)
            return
        statuses = self.write.statuses[first : first + count].tolist()
        for index, (block, status) in enumerate(zip(data, statuses, strict=True), first):
            if status == ReserveStatus.SLOT:
                self.write.put(index, block)

    async def settle(self) -> None:
        """Leaves nothing behind, whatever happened."""
        if self.commit is not None:
            self.commit.drop()
        await self.write.__aexit__(None, None, None)


async def put(
    namespace: Namespace,
    keys: Keys,
    data: Any,
    parent: bytes | None,
    level: AckLevel,
    timeout_s: float | None,
) -> Put:
    """Reserves part after part ahead of the copy, and commits behind it.

    Stops at the first block without space: what follows a hole in a chain is of no use.
    """
    joined = joined_keys(keys)
    count, nbytes = len(joined) // 32, namespace.spec.block_bytes
    blocks = Blocks(data, count, nbytes)
    result = Put(np.full(count, ReserveStatus.FULL, np.uint8), np.zeros(count, np.uint8))
    size = max(1, PART_BYTES // nbytes)

    def start(at: int) -> _Part:
        before = joined[32 * at - 32 : 32 * at] if at else parent
        some = joined[32 * at : 32 * (at + size)]
        return _Part(at, namespace.write(some, before, level, timeout_s), namespace.copy_turn)

    parts: list[_Part] = []
    ahead = deque(range(0, count, size))
    try:
        done = 0
        while done < len(parts) or ahead:
            while ahead and len(parts) < done + PARTS_IN_FLIGHT:
                parts.append(start(ahead.popleft()))
            if not await parts[done].fill(blocks):
                break
            done += 1
        for part in parts[: done + 1]:
            result.statuses[part.at : part.at + part.write.count] = part.write.statuses
            if part.commit is not None:
                result.levels[part.at + part.commit.chosen] = await part.commit.levels()
    finally:
        for part in parts:
            await part.settle()
    return result


async def get(
    namespace: Namespace, keys: Keys, out: Any, parent: bytes | None, timeout_s: float | None
) -> Got:
    """Copies blocks while later ones still arrive."""
    lease = await namespace.acquire(keys, parent, timeout_s)
    try:
        async for first, count in lease.arrivals():
            blocks = Blocks(out, first + count, lease.block_bytes, write=True)
            for at, some in _slices(count, lease.block_bytes):
                lease.copy_into(blocks.part(first + at, some), first + at, some)
                await asyncio.sleep(0)
        return Got(lease.granted, lease.reason or EndReason.UNSPECIFIED)
    finally:
        lease.release()

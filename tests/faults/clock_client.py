"""A client under a wall clock that jumps: ``python -m tests.faults.clock_client NODE MASTER FILE``.

Each line on stdin is a shift of the wall clock in seconds; the answer is a line of JSON: what was
measured, by the monotonic clock, while the shift came into force.
"""

import asyncio
import contextlib
import json
import mmap
import struct
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
from kvstore.core.types import AckLevel, EndReason, ReserveStatus
from kvstore.errors import DeadlineError
from kvstore_client import AsyncClient, Namespace

from tests.faults.content import content
from tests.faults.live import Observer, located
from tests.faults.load import BLOCK_BYTES, SPEC
from tests.node.rig import RawSession
from tests.store.rig import chain

DRAM_BLOCKS = 256
UNSEEN_BLOCKS = 8
PINNED = chain("pinned", DRAM_BLOCKS - UNSEEN_BLOCKS)
ON_SSD = chain("on ssd", UNSEEN_BLOCKS)
WAIT_S = 0.3  # of an acquire and a reserve for which there is no room
JUMP_AFTER_S = 0.1
POLL_S = 0.005


@dataclass
class Seen:
    """What one jump did; times in seconds."""

    jumped: float = 0.0  # of the wall clock
    acquire_s: float = 0.0
    acquire_end: str = ""
    reserve_s: float = 0.0
    reserve_refused: bool = False
    quarantine_s: float = 0.0
    lease_held: bool = False
    unknown_to_master: int = 0  # answers of the master in which the node's blocks were missing
    asked_master: int = 0


def data_of(keys: list[bytes]) -> list[bytes]:
    """Their bytes."""
    return [content(0, "default", key, 0, BLOCK_BYTES) for key in keys]


class Episodes:
    """One client, its namespace, and the clock file."""

    def __init__(self, client: AsyncClient, ns: Namespace, master: str, clock: mmap.mmap) -> None:
        self._client = client
        self._ns = ns
        self._master = master
        self._clock = clock
        self._observer = Observer(client.address)

    async def jump(self, shift_s: int) -> float:
        """Moves the wall clocks of all processes; by how much this one's moved, exactly."""
        await asyncio.sleep(JUMP_AFTER_S)
        before = time.time() - time.monotonic()
        struct.pack_into("<q", self._clock, 0, shift_s)
        return time.time() - time.monotonic() - before

    async def acquire(self, seen: Seen) -> None:
        """Blocks that are on SSD, and find no room in DRAM."""
        start = time.monotonic()
        lease = await self._ns.acquire(ON_SSD, timeout_s=WAIT_S)
        await lease.wait()
        seen.acquire_s = time.monotonic() - start
        seen.acquire_end = (lease.reason or EndReason.UNSPECIFIED).name
        lease.release()

    async def reserve(self, seen: Seen) -> None:
        """New blocks for which there is no room."""
        start = time.monotonic()
        try:
            async with self._ns.write(chain("new", 4), timeout_s=WAIT_S) as write:
                seen.reserve_refused = bool((write.statuses == ReserveStatus.FULL).all())
        except DeadlineError:  # the client's own clock came before the node's answer
            seen.reserve_refused = True
        seen.reserve_s = time.monotonic() - start

    async def quarantine(self, seen: Seen) -> None:
        """Slots whose client was lost and cannot be seen."""
        start = time.monotonic()
        await self.quarantined(0)
        seen.quarantine_s = time.monotonic() - start

    async def quarantined(self, blocks: int) -> None:
        """Waits until so many blocks are in quarantine."""
        while True:
            dram = (await self._observer.stats()).tiers[0]
            if dram.quarantined_bytes == blocks * BLOCK_BYTES:
                return
            await asyncio.sleep(POLL_S)

    async def known_to_master(self) -> None:
        """Waits until the master has heard of what was stored."""
        while True:
            if await located(self._master, b"".join(PINNED)) == len(PINNED):
                return
            await asyncio.sleep(POLL_S)

    async def ask_master(self, seen: Seen) -> None:
        """Until it is cancelled: whether the master counts on the node."""
        while True:
            known = await located(self._master, b"".join(PINNED))
            seen.asked_master += 1
            seen.unknown_to_master += known != len(PINNED)
            await asyncio.sleep(POLL_S)

    async def run(self, shift_s: int) -> Seen:
        """Holds a lease on most of DRAM, and lets the clock jump while everything waits."""
        seen = Seen()
        async with self._ns.read(PINNED) as read:
            unseen = await RawSession.open(self._client.address, spec=SPEC, pid=0)
            await unseen.reserve(chain("unseen", UNSEEN_BLOCKS))
            asking = asyncio.create_task(self.ask_master(seen))
            await unseen.lose()
            await self.quarantined(UNSEEN_BLOCKS)
            waits = (self.acquire(seen), self.reserve(seen), self.quarantine(seen))
            seen.jumped, *_ = await asyncio.gather(self.jump(shift_s), *waits)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            out = np.zeros((len(PINNED), BLOCK_BYTES), np.uint8)
            held = (await self._client.stats()).pinned_blocks == len(PINNED)
            right = read.copy_into(out) == len(PINNED)
            right &= all(o.tobytes() == d for o, d in zip(out, data_of(PINNED), strict=True))
            seen.lease_held = held and right
        return seen


def map_shift(path: str) -> mmap.mmap:
    """The shift that the shim reads."""
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 8)


async def main(node: str, master: str, path: str) -> None:
    """One episode a line."""
    with contextlib.closing(map_shift(path)) as clock:
        async with await AsyncClient.connect(node, name="clock", timeout_s=10.0) as client:
            ns = await client.open_namespace(SPEC)
            for keys in (ON_SSD, PINNED):
                put = await ns.put(keys, data_of(keys), level=AckLevel.SYNCED)
                assert put.stored == len(keys)
            episodes = Episodes(client, ns, master, clock)
            await episodes.known_to_master()
            while line := await asyncio.to_thread(sys.stdin.readline):
                seen = await episodes.run(int(line))
                print(json.dumps(asdict(seen)), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

"""Writers and readers of one node, and what they know: the load under which faults happen."""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import numpy as np
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel, EndReason, ReserveStatus
from kvstore.errors import DeadlineError, UnavailableError
from kvstore_client import AsyncClient, Namespace

from tests.faults.content import content
from tests.faults.ledger import Ledger
from tests.faults.live import until

BLOCK_BYTES = 16384
CHAIN_BLOCKS = 4
VERSIONS = 3
SPEC = CacheSpec.raw("faults", block_bytes=BLOCK_BYTES)
RETRY_S = 0.01


class Load:
    """Chains that are put and read at random by workers that outlive their node.

    What was acknowledged as persisted must be found for as long as fewer than ``window`` other
    chains were touched since: the least recently used go first, so that it cannot have been
    evicted. ``window`` is well below what the SSD tier holds.
    """

    def __init__(self, address: str, seed: int, *, chains: int, window: int) -> None:
        self.address = address
        self.random = random.Random(seed)
        self.ledger = Ledger(seed)
        self.window = window
        self.lost = 0  # acknowledged blocks that were not found though they must be there
        self.broken = 0  # slots that changed under a lease of a living session
        self.late = 0  # reads that ended because the node was too slow
        self.stored = 0  # blocks that were put
        self.held_checks = 0  # blocks that had to be found
        self.timeout_s = 10.0
        self._attempts = 0
        self._serial = 0
        self._touched: OrderedDict[int, int] = OrderedDict()
        self._acked: dict[int, int] = {}
        self._going = asyncio.Event()
        self._parked = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.chains = [self._make_chain() for _ in range(chains)]
        for one, other in zip(self.chains[::8], self.chains[1::8], strict=False):
            other[0] = one[0][:8] + other[0][8:]  # keys that differ behind their first 64 bits

    def _make_chain(self) -> list[bytes]:
        return [self.random.randbytes(32) for _ in range(CHAIN_BLOCKS)]

    async def start(self, writers: int, readers: int) -> None:
        """Connects the workers; they wait for ``resume``."""
        for number in range(writers + readers):
            worker = await Worker.connect(self)
            step = worker.put_one if number < writers else worker.read_one
            self._tasks.append(asyncio.create_task(self._work(worker, step)))

    async def _work(self, worker: "Worker", step: Callable[[], Awaitable[None]]) -> None:
        while True:
            if not self._going.is_set():
                self._parked += 1
                await self._going.wait()
                self._parked -= 1
            try:
                await step()
            except (UnavailableError, DeadlineError):
                await worker.reconnect()

    @property
    def harmed(self) -> bool:
        """Whether a promise was broken: there is no use in going on."""
        return bool(self.lost or self.ledger.wrong or self.broken)

    def resume(self) -> None:
        """Lets the workers go on."""
        self._going.set()

    async def pause(self, timeout_s: float) -> None:
        """Waits until every worker is connected and holds nothing."""
        self._going.clear()
        await until(lambda: self.failed() or self._parked == len(self._tasks), timeout_s, "parked")
        self.failed()

    def failed(self) -> bool:
        """Raises what ended a worker."""
        for task in self._tasks:
            if task.done():
                task.result()
        return False

    async def stop(self) -> None:
        """Ends the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def touch(self, chain: int) -> int:
        """It is used now; the number of this use."""
        self._serial += 1
        self._touched[chain] = self._serial
        self._touched.move_to_end(chain)
        return self._serial

    def must_be_there(self, chain: int) -> bool:
        """Whether a chain was acknowledged and cannot have been evicted."""
        since = self._acked.get(chain)
        if since is None:
            return False
        for newer, serial in enumerate(reversed(self._touched.values())):
            if serial <= since:
                return True
            if newer >= self.window:
                break
        return False

    def acknowledged(self, chain: int, serial: int) -> None:
        """All blocks of a chain are persisted, by a put that began with ``serial``."""
        self._acked[chain] = serial

    def expected(self) -> list[int]:
        """Chains that must be found."""
        return [chain for chain in self._acked if self.must_be_there(chain)]

    def version(self) -> int:
        """Of the bytes of the next put."""
        self._attempts += 1
        return self._attempts % VERSIONS

    def any_chain(self) -> int:
        """One of all."""
        return self.random.randrange(len(self.chains))

    def recent(self) -> list[int]:
        """Chains in the order of their last use, one window of them."""
        return list(self._touched)[-self.window :]

    def recent_chain(self) -> int:
        """One of those used last, among them those that are being written."""
        recent = self.recent()[-self.window // 2 :]
        return self.random.choice(recent) if recent else self.any_chain()


class Worker:
    """One session of the load."""

    def __init__(self, load: Load, client: AsyncClient, ns: Namespace) -> None:
        self._load = load
        self.client = client
        self.ns = ns
        self._out = np.empty((CHAIN_BLOCKS, BLOCK_BYTES), np.uint8)

    @classmethod
    async def connect(cls, load: Load, timeout_s: float | None = None) -> "Worker":
        """A worker with a session; its calls take ``timeout_s`` at most."""
        limit = load.timeout_s if timeout_s is None else timeout_s
        client = await AsyncClient.connect(load.address, name="load", timeout_s=limit)
        return cls(load, client, await client.open_namespace(SPEC))

    async def reconnect(self) -> None:
        """Until the node answers again."""
        while self.client.closed:
            try:
                await self.client.reconnect(self._load.timeout_s)
            except (UnavailableError, DeadlineError):
                await asyncio.sleep(RETRY_S)

    async def put_one(self) -> None:
        """Writes some chain, at some level."""
        load = self._load
        level = load.random.choice([AckLevel.MEMORY, AckLevel.PERSISTED, AckLevel.SYNCED])
        await self.put(load.any_chain(), level)

    async def put(self, chain: int, level: AckLevel) -> None:
        """Writes a chain, with turns of the others between reserve, copies and commit."""
        load, keys = self._load, self._load.chains[chain]
        serial, version = load.touch(chain), load.version()
        async with self.ns.write(keys, level=level) as write:
            slots = np.flatnonzero(write.statuses == ReserveStatus.SLOT).tolist()
            for index in slots:
                load.ledger.issue(keys[index], version)
                await asyncio.sleep(0)
                ledger = load.ledger
                data = content(ledger.seed, ledger.tenant, keys[index], version, BLOCK_BYTES)
                write.put(index, data)
            levels = await write.commit()
        load.stored += int(np.count_nonzero(levels))
        for index, reached in zip(slots, levels.tolist(), strict=True):
            load.ledger.acknowledge(keys[index], AckLevel(reached))
        if len(slots) == len(keys) and min(levels.tolist()) >= AckLevel.PERSISTED:
            load.acknowledged(chain, serial)

    async def read_one(self) -> None:
        """Reads a chain of those used last, or any."""
        load = self._load
        await self.read(load.recent_chain() if load.random.random() < 0.7 else load.any_chain())

    async def read(self, chain: int) -> None:
        """Reads a chain and judges every byte of it."""
        load, keys = self._load, self._load.chains[chain]
        expected = load.must_be_there(chain)
        load.touch(chain)
        lease = await self.ns.acquire(keys)
        try:
            count = await lease.wait()
            await asyncio.sleep(0)
            try:
                lease.copy_into(self._out, 0, count)
            except UnavailableError:
                load.broken += not self.client.closed
                raise
        finally:
            lease.release()
        for key, block in zip(keys[:count], self._out, strict=False):
            load.ledger.read(key, block.tobytes())
        if count < len(keys):
            if lease.reason in (EndReason.TIMED_OUT, EndReason.NO_SPACE):
                load.late += 1
            elif expected and load.must_be_there(chain) and not self.client.closed:
                load.lost += len(keys) - count
        load.held_checks += count if expected else 0

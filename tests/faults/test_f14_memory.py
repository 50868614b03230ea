"""F14: a million keys in 1.25 times the memory that was configured, among slow and idle clients."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from statistics import median
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from kvstore.core.spec import CacheSpec
from kvstore.node import translate
from kvstore_client.client import AsyncClient
from kvstore_client.namespace import Namespace
from kvstore_proto import node_pb2

from tests.faults.columns import SEED
from tests.faults.live import MIB, LiveNode
from tests.faults.memory_limit import MemoryLimit, rss_bytes
from tests.faults.report import Record, finish
from tests.node.rig import RawSession, hello_message, keys_of

CAPACITY = 1024 * MIB
BLOCK = 4096
KEYS, WARM_UP_KEYS, PUT_KEYS = 1_000_000, 400_000, 2048
READ_KEYS, SLOW_READERS = 64, 4
SESSIONS_MAX = 1024  # the node's default
IDLE_STREAMS, IDLE_CHANNELS = 1000, 8
HOLDS_MAX = 4096
GROWTH_MAX = 24 * MIB
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def expected(keys: bytes) -> npt.NDArray[np.uint8]:
    """Blocks that judge themselves: nothing but their key, over and over."""
    each = np.frombuffer(keys, np.uint8).reshape(-1, 1, 32)
    return np.repeat(each, BLOCK // 32, axis=1).reshape(-1)


class LimitedNode(LiveNode):
    """A node that begins inside the limit."""

    def __init__(self, limit: MemoryLimit) -> None:
        super().__init__("--scrub-mb-s", "0", dram=CAPACITY, ssd=0)
        self._command = limit.wrap(self._command)


class Load:
    """One writer of all keys, and readers that hold what they read while it goes on."""

    def __init__(self, namespace: Namespace, pid: int) -> None:
        self._random = random.Random(SEED)
        self._namespace = namespace
        self._pid = pid
        self._put = asyncio.Event()  # the next put is done
        self.newest = b""
        self.puts = self.keys = self.reads = self.wrong = 0
        self.anon: list[tuple[int, int]] = []  # (keys, bytes)

    async def write(self) -> None:
        """Until a million keys are stored."""
        while self.keys < KEYS:
            keys = self._random.randbytes(32 * PUT_KEYS)
            split = [keys[i : i + 32] for i in range(0, len(keys), 32)]
            done = await self._namespace.put(split, expected(keys), timeout_s=30.0)
            assert done.stored, "a put found no room although nothing but old blocks takes it"
            self.keys += done.stored
            self.puts += 1
            self.newest = keys[: 32 * READ_KEYS]
            self._put.set()
            self._put = asyncio.Event()
            if self.puts % 4 == 0:
                self.anon.append((self.keys, rss_bytes(self._pid, "Anon")))

    async def read_slowly(self, puts: int) -> None:
        """Holds each lease for that many puts, then looks at the bytes."""
        while self.keys < KEYS:
            await self._put.wait()
            keys = self.newest
            split = [keys[i : i + 32] for i in range(0, len(keys), 32)]
            async with self._namespace.read(split) as read:
                until = self.puts + puts
                while self.puts < until and self.keys < KEYS:
                    await self._put.wait()
                out = np.empty(read.count * BLOCK, np.uint8)
                read.copy_into(out)
            self.reads += read.count
            right = expected(keys[: 32 * read.count])
            self.wrong += int(not np.array_equal(out, right))

    def growth_bytes(self) -> int:
        """From the end of the warm-up to the end of the run."""
        samples = [anon for keys, anon in self.anon if keys > WARM_UP_KEYS]
        assert len(samples) >= 20, "too few samples"
        return int(median(samples[-10:]) - median(samples[:10]))


class Streams:
    """Sessions that say hello and then nothing."""

    def __init__(self, address: str) -> None:
        self._sessions = [RawSession(address) for _ in range(IDLE_CHANNELS)]
        self._turn: Iterator[RawSession] = itertools.cycle(self._sessions)
        self.open: list[Any] = []

    async def add(self) -> grpc.StatusCode:
        """Opens one; OK, or the status with which it was refused."""
        stream = next(self._turn).stub.Session()
        try:
            await stream.write(node_pb2.SessionRequest(id=1, hello=hello_message()))
            answer = await stream.read()
        except grpc.aio.AioRpcError as error:
            return error.code()
        if answer is grpc.aio.EOF:
            code: grpc.StatusCode = await stream.code()
            return code
        self.open.append(stream)
        return grpc.StatusCode.OK

    def broken(self) -> int:
        """How many did not last."""
        return sum(stream.done() for stream in self.open)

    async def close(self) -> None:
        """Breaks all of them."""
        for stream in self.open:
            stream.cancel()
        for session in self._sessions:
            await session.lose()


@contextlib.asynccontextmanager
async def deaf_client(address: str, spec: CacheSpec) -> AsyncIterator[None]:
    """Asks and asks, and reads no answer."""
    session = await RawSession.open(address, namespace=False)
    request = node_pb2.OpenNamespace(spec=translate.spec_to_message(spec))
    opened = (await session.call(open_namespace=request)).namespace_opened

    async def ask() -> None:
        match = node_pb2.Match(namespace_id=opened.namespace_id, keys=b"k" * 32)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await session.send(match=match)

    task = asyncio.create_task(ask())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await session.lose()


async def refused_acquires(address: str, spec: CacheSpec) -> int:
    """A session that holds ever more leases: how many requests beyond the limit were refused."""
    session = await RawSession.open(address, spec=spec)
    key = keys_of(1, SEED)[0]
    reserve_id, _ = await session.reserve([key])
    commit = node_pb2.Commit(reserve_id=reserve_id, indices=[0], checksums=bytes(8))
    assert (await session.call(commit=commit)).committed.levels == b"\x01"
    acquire = node_pb2.Acquire(namespace_id=session.namespace, keys=key)
    ids = [await session.send(acquire=acquire) for _ in range(HOLDS_MAX + 8)]
    answers = [await session.receive(i) for i in ids[-8:]]
    assert (await session.receive(ids[0])).WhichOneof("response") == "granted"
    await session.goodbye()
    return sum(answer.error.code == EXHAUSTED.value[0] for answer in answers)


async def status_of_a_huge_message(address: str) -> grpc.StatusCode:
    """Of a session that sends one of 65 MiB."""
    session = await RawSession.open(address, namespace=False)
    await session.send(acquire=node_pb2.Acquire(namespace_id=1, keys=bytes(65 * MIB)))
    code: grpc.StatusCode = await session.stream.code()
    await session.lose()
    return code


async def run(node: LimitedNode, limit: MemoryLimit, record: Record) -> None:
    address = node.start()
    spec = CacheSpec.raw("f14", block_bytes=BLOCK)
    streams = Streams(address)
    client = await AsyncClient.connect(address, populate=False)
    load = Load(await client.open_namespace(spec), node.pid)
    opened = [await streams.add() for _ in range(IDLE_STREAMS)]
    assert opened == [grpc.StatusCode.OK] * IDLE_STREAMS
    async with deaf_client(address, spec), deaf_client(address, spec):
        readers = [load.read_slowly(2**i) for i in range(SLOW_READERS)]
        await asyncio.gather(load.write(), *readers)
    refused = await refused_acquires(address, spec)
    assert refused == 8, "a session may hold any number of leases"
    assert await status_of_a_huge_message(address) is EXHAUSTED
    beyond = [await streams.add() for _ in range(SESSIONS_MAX - IDLE_STREAMS + 8)]
    assert beyond[-1] is EXHAUSTED, "there is no limit of sessions"
    assert set(beyond) == {grpc.StatusCode.OK, EXHAUSTED}
    growth = load.growth_bytes()
    assert (await client.stats()).sessions == SESSIONS_MAX
    assert limit.kills() == 0, "the kernel killed for memory"
    total = sum(rss_bytes(node.pid, kind) for kind in ("Anon", "Shmem"))
    assert total <= limit.limit_bytes, f"{total} bytes in RAM"
    lost = streams.broken()
    await streams.close()
    await client.close()
    finish(
        record,
        "F14 memory",
        limit_mib=limit.limit_bytes // MIB,
        used_mib=total // MIB,
        growth_mib=round(growth / MIB, 1),
        keys=load.keys,
        slow_reads=load.reads,
        idle_streams=IDLE_STREAMS,
        refused=refused + beyond.count(EXHAUSTED),
        oom=0,
        lost=lost,
        wrong=load.wrong,
    )
    assert growth <= GROWTH_MAX, f"{growth} bytes more after {KEYS} keys than after {WARM_UP_KEYS}"


@pytest.mark.timeout(300)
def test_F14_I7_memory_stays_within_its_limit(record_property: Record) -> None:
    with MemoryLimit(CAPACITY * 5 // 4) as limit:
        print(f"limit by {limit.kind} {limit.reason}")
        with LimitedNode(limit) as node:
            asyncio.run(run(node, limit, record_property))

"""What a client process gets from its node, against memcpy of the same bytes in the same run."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import numpy.typing as npt
from kvstore_client import AsyncClient, CacheSpec, Lease, Namespace

from benchmarks.echo import receive
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Ratio, Row, interleave
from benchmarks.node_process import running_node

ROUNDS = 20
BATCH_BYTES = 64 << 20
# Four batches in turn: more than the caches of today's CPUs keep between two uses of one.
BATCHES = 4
# One round; the wait for the first answer and the last does not dominate it.
ROUND_BATCHES = 32
IN_FLIGHT = 3
POOL_BATCHES = 8
BLOCK_SIZES = {"1MiB": 1 << 20, "64KiB": 64 << 10}
LOOKUP_KEYS = 512
LOOKUP_BLOCK_BYTES = 4096
LOOKUPS = 500
INDEXED_BLOCKS = 500_000
KEY_BYTES = 32

Buffer = npt.NDArray[np.uint8]


def shared_memory(batches: int) -> Buffer:
    """Memory of the kind that a pool is made of, mapped from the start."""
    fd = os.memfd_create("kvstore-bench")
    os.ftruncate(fd, batches * BATCH_BYTES)
    mapped = mmap.mmap(fd, batches * BATCH_BYTES)
    os.close(fd)
    memory: Buffer = np.frombuffer(mapped, dtype=np.uint8).reshape(batches, BATCH_BYTES)
    memory[:] = 1
    return memory


class Memcpy:
    """The ceiling: 64 MiB in one call, between private memory and shared memory like the pool's,
    with as many places on either side as a get or a put has.
    """

    def __init__(self, source: Buffer, target: Buffer) -> None:
        self._source = source
        self._out = target

    async def one(self, number: int) -> float:
        """One batch."""
        start = time.perf_counter()
        np.copyto(self._out[number % len(self._out)], self._source[number % BATCHES])
        return time.perf_counter() - start

    async def many(self, number: int) -> float:
        """A round of batches."""
        del number
        start = time.perf_counter()
        for batch in range(ROUND_BATCHES):
            np.copyto(self._out[batch % len(self._out)], self._source[batch % BATCHES])
        return time.perf_counter() - start


class Blocks:
    """Batches of blocks of one size through the client.

    ``get`` and ``put`` keep a few batches in flight, as a connector does that serves more than one
    request: while one is copied, the node works on the others. ``get_alone`` and ``put_alone``
    start a batch when the one before has ended.
    """

    def __init__(self, namespace: Namespace, source: Buffer) -> None:
        self._namespace = namespace
        self._source = source
        self._out = np.ones(BATCH_BYTES, dtype=np.uint8)
        self._tokens = itertools.count()
        self._kept: list[list[bytes]] = []

    def _new_keys(self) -> list[bytes]:
        """Keys of one prompt that nobody has asked for yet."""
        spec = self._namespace.spec
        count = BATCH_BYTES // spec.block_bytes
        tokens = np.arange(count * spec.block_tokens, dtype=np.uint32)
        tokens[0] = next(self._tokens)
        return self._namespace.keys(tokens)

    async def fill(self) -> None:
        """Stores the batches that are read."""
        self._kept = [self._new_keys() for _ in range(BATCHES)]
        for number, keys in enumerate(self._kept):
            await self._put(keys, number)

    async def _put(self, keys: list[bytes], number: int) -> None:
        put = await self._namespace.put(keys, self._source[number])
        if put.stored != len(keys):
            raise BenchmarkError(f"{put.stored} of {len(keys)} blocks were stored")

    async def put_alone(self, number: int) -> float:
        """Stores a batch of new blocks; older ones make room."""
        keys = self._new_keys()
        start = time.perf_counter()
        await self._put(keys, number % BATCHES)
        return time.perf_counter() - start

    async def put(self, number: int) -> float:
        """Stores batches of new blocks."""
        del number
        batches = list(enumerate([self._new_keys() for _ in range(ROUND_BATCHES)]))

        async def worker() -> None:
            while batches:
                batch, keys = batches.pop()
                await self._put(keys, batch % BATCHES)

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
        return time.perf_counter() - start

    def _check(self, count: int, number: int) -> None:
        if count != len(self._kept[number]) or not np.array_equal(self._out, self._source[number]):
            raise BenchmarkError(f"{count} blocks of batch {number} were read, or wrong bytes")

    async def get_alone(self, number: int) -> float:
        """Pins a batch, copies it out once, and unpins it."""
        keys = self._kept[number % BATCHES]
        start = time.perf_counter()
        async with self._namespace.read(keys) as read:
            count = read.copy_into(self._out)
        seconds = time.perf_counter() - start
        self._check(count, number % BATCHES)
        return seconds

    async def get(self, number: int) -> float:
        """Pins each batch, copies it out once, and unpins it; asks for the next one before."""
        del number
        waiting: deque[Lease] = deque()
        ahead = deque(self._kept[batch % BATCHES] for batch in range(ROUND_BATCHES))
        count = 0
        start = time.perf_counter()
        while ahead or waiting:
            while ahead and len(waiting) < IN_FLIGHT:
                waiting.append(await self._namespace.acquire(ahead.popleft()))
            lease = waiting.popleft()
            await lease.wait()
            count = lease.copy_into(self._out)
            lease.release()
        seconds = time.perf_counter() - start
        self._check(count, (ROUND_BATCHES - 1) % BATCHES)
        return seconds


async def _copies(client: AsyncClient, rounds: int) -> list[Row]:
    random = np.random.default_rng(os.getpid())
    source = random.integers(0, 256, (BATCHES, BATCH_BYTES), dtype=np.uint8)
    pool = shared_memory(POOL_BATCHES)
    pool[:BATCHES] = source
    of_get = Memcpy(pool, np.ones((1, BATCH_BYTES), dtype=np.uint8))
    of_put = Memcpy(source, pool)
    moved = ROUND_BATCHES * BATCH_BYTES
    rows = []
    for size, block_bytes in BLOCK_SIZES.items():
        spec = CacheSpec.raw(f"benchmark {size}", block_bytes=block_bytes)
        blocks = Blocks(await client.open_namespace(spec), source)
        await blocks.fill()
        for name, ours, theirs, nbytes in (
            (f"get_{size}", blocks.get, of_get.many, moved),
            (f"get_{size}_alone", blocks.get_alone, of_get.one, BATCH_BYTES),
            (f"put_{size}", blocks.put, of_put.many, moved),
            (f"put_{size}_alone", blocks.put_alone, of_put.one, BATCH_BYTES),
        ):
            measured = await interleave(ours, theirs, rounds=rounds)
            rows.append(measured.rate_row(name, nbytes, "memcpy"))
    return rows


class Lookups:
    """Look-ups of one prompt of 512 blocks."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._keys = namespace.keys(np.arange(LOOKUP_KEYS * namespace.spec.block_tokens))
        self._index = dict.fromkeys(self._keys, 1)

    async def fill(self) -> None:
        """Stores the blocks."""
        await self._namespace.put(
            self._keys, np.zeros(LOOKUP_KEYS * LOOKUP_BLOCK_BYTES, dtype=np.uint8)
        )

    async def match(self, number: int) -> float:
        """In the node's directory."""
        del number
        start = time.perf_counter()
        match = self._namespace.match(self._keys)
        seconds = time.perf_counter() - start
        if match.count != LOOKUP_KEYS:
            raise BenchmarkError(f"{match.count} of {LOOKUP_KEYS} keys were matched")
        return seconds

    async def private_dict(self, number: int) -> float:
        """In a dict of this process, which nobody else could see."""
        del number
        start = time.perf_counter()
        found = [self._index.get(key) for key in self._keys]
        seconds = time.perf_counter() - start
        assert len(found) == LOOKUP_KEYS
        return seconds

    async def acquire(self, number: int) -> float:
        """At the node, pinned; the release is not waited for."""
        del number
        start = time.perf_counter()
        lease = await self._namespace.acquire(self._keys)
        granted = await lease.wait()
        seconds = time.perf_counter() - start
        lease.release()
        if granted != LOOKUP_KEYS:
            raise BenchmarkError(f"{granted} of {LOOKUP_KEYS} blocks were granted")
        return seconds


class Echo:
    """Round trips over a bare Unix socket with as many bytes as an Acquire and its answer."""

    REQUEST_BYTES = LOOKUP_KEYS * KEY_BYTES
    ANSWER_BYTES = LOOKUP_KEYS * 4

    def __init__(self, directory: Path) -> None:
        path = directory / "echo.sock"
        sizes = [str(self.REQUEST_BYTES), str(self.ANSWER_BYTES)]
        command = [sys.executable, "-m", "benchmarks.echo", str(path), *sizes]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._request = bytes(self.REQUEST_BYTES)
        self._answer = memoryview(bytearray(self.ANSWER_BYTES))

    async def round(self, number: int) -> float:
        """There and back."""
        del number
        start = time.perf_counter()
        self._socket.sendall(self._request)
        receive(self._socket, self._answer)
        return time.perf_counter() - start

    def close(self) -> None:
        """Ends the server."""
        self._socket.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


async def _lookups(client: AsyncClient) -> list[Row]:
    spec = CacheSpec.raw("benchmark look-ups", block_bytes=LOOKUP_BLOCK_BYTES)
    lookups = Lookups(await client.open_namespace(spec))
    await lookups.fill()
    matched = await interleave(lookups.match, lookups.private_dict, rounds=LOOKUPS, warmup=50)
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as directory:
        echo = Echo(Path(directory))
        try:
            acquired = await interleave(lookups.acquire, echo.round, rounds=LOOKUPS, warmup=50)
        finally:
            echo.close()
    return [
        matched.time_row(f"match_{LOOKUP_KEYS}", "a private dict"),
        acquired.time_row(f"acquire_{LOOKUP_KEYS}", "a bare Unix socket"),
    ]


def _master_memory() -> Row:
    command = [sys.executable, "-m", "benchmarks.master_memory", str(INDEXED_BLOCKS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"master_memory failed: {done.stderr[-500:].strip()}")
    value = float(done.stdout)
    ratio = Ratio.of([KEY_BYTES / value])
    return Row("master_bytes_per_block", value, "bytes", f"its key: {KEY_BYTES} bytes", ratio)


async def _with_client(address: str, rounds: int) -> list[Row]:
    async with await AsyncClient.connect(address, name="benchmark", timeout_s=30) as client:
        if not await asyncio.to_thread(client.mapping.wait_populated, 60.0):
            raise BenchmarkError("the pool was not mapped within 60 s")
        return [*await _copies(client, rounds), *await _lookups(client)]


def run(rounds: int) -> list[Row]:
    """All rows."""
    with running_node(str(POOL_BATCHES * BATCH_BYTES)) as address:
        rows = asyncio.run(_with_client(address, rounds))
    return [*rows, _master_memory()]

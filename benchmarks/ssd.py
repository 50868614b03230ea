"""The SSD tier through a node and its client, against the disk alone, in the same rounds.

Reads. Ours: a client process pins prompts of 32 MiB that are on SSD only (each lease says so, or
the benchmark fails), four at a time; the node reads them into its pool, verifies every checksum,
and grants them; the client takes the bytes where they are, in shared memory, and releases them.
The ceiling: ``preadv`` with O_DIRECT over the same bytes of the same data file, one block a
request, one thread a request, as many threads as the node has for reads; nothing is verified.

Writes. Ours: the client stores new prompts of 64 MiB at the level ``synced``, eight at a time: it
copies them into the pool, hashing, and the node writes them, after it has removed older blocks
durably, as its SSD tier is full. The round ends when every block is acknowledged, so data,
fdatasync and the index are on the medium. The ceiling: ``pwritev`` with O_DIRECT of what the file
already holds over the same range, one block a request, as many threads as the node has for
writes, and an fdatasync every 64 MiB, the size of the node's groups; nothing is hashed or indexed.

``_beside_copy`` is that loop while one thread copies as many bytes into other memory, hashing, as
every put does, against the loop alone: what this machine takes from the disk for that work alone.

``pool_in_huge_pages`` below 1 explains slow rows: memory was too fragmented for them.
``loop_in_huge_pages`` is the same of the memory of the loop, which is not shared.

A block of ``cpu`` rows says what processor time the same rounds took: of the node, of its client,
and of the loop, in seconds per GB (10^9 bytes).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from kvstore.core.types import AckLevel, Tier
from kvstore.node import ssd, ssd_writer
from kvstore_client import AsyncClient, CacheSpec, Lease, Namespace
from kvstore_client.copying import scatter

from benchmarks.errors import BenchmarkError
from benchmarks.harness import Row, interleave
from benchmarks.node_process import NodeProcess, running
from benchmarks.raw_disk import RawDisk, Requests

Bytes = npt.NDArray[np.uint8]

ROUNDS = 12
BLOCK_SIZES = {"1MiB": 1 << 20, "4MiB": 4 << 20}
DRAM_BYTES = 512 << 20
SSD_BYTES = 4 << 30
READ_BYTES = 3 << 30  # one round; more than DRAM holds, so that every block is read again
READ_PROMPT_BYTES = 32 << 20
WRITE_BYTES = 3 << 30  # one round
WRITE_PROMPT_BYTES = 64 << 20
READ_PROMPTS_IN_FLIGHT = 4
# From its copy to its acknowledgement a prompt takes about 110 ms: more than four are on their way.
WRITE_PROMPTS_IN_FLIGHT = 8
TIMEOUT_S = 60.0


@dataclass
class Cpu:
    """Processor seconds of each round of one kind, by who spent them."""

    node: NodeProcess
    spent: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Counts this process for ``name``, and the node for ``name`` with _node."""
        mine, nodes = time.process_time(), self.node.cpu_s()
        yield
        self.spent.setdefault(name, []).append(time.process_time() - mine)
        self.spent.setdefault(f"{name}_node", []).append(self.node.cpu_s() - nodes)

    def rows(self, metric: str, nbytes: int) -> list[Row]:
        """Seconds per GB; the mean, as the node's clock is coarse."""
        per_gb = {name: statistics.fmean(s) / nbytes * 1e9 for name, s in self.spent.items()}
        loop = f"raw loop: {per_gb['raw']:.3f}"
        return [
            Row(f"{metric}_cpu", per_gb["ours_node"], "node s/GB", loop),
            Row(f"{metric}_cpu_client", per_gb["ours"], "client s/GB", loop),
        ]


class Prompts:
    """Chains of blocks of one size, each of its own random tokens."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self._numbers = itertools.count(int.from_bytes(os.urandom(3), "little") << 8)

    def keys(self, nbytes: int) -> list[bytes]:
        """A prompt that nobody has asked for yet."""
        spec = self.namespace.spec
        tokens = np.arange(nbytes // spec.block_bytes * spec.block_tokens, dtype=np.uint32)
        tokens[0] = next(self._numbers)
        return self.namespace.keys(tokens)

    async def store(self, prompts: list[list[bytes]], data: Bytes) -> None:
        """Stores all at ``synced``, a few at a time."""
        waiting = deque(prompts)

        async def worker() -> None:
            while waiting:
                keys = waiting.popleft()
                put = await self.namespace.put(
                    keys, data, level=AckLevel.SYNCED, timeout_s=TIMEOUT_S
                )
                if not (put.levels == AckLevel.SYNCED).all():
                    raise BenchmarkError(f"levels {np.bincount(put.levels)} instead of synced")

        await asyncio.gather(*(worker() for _ in range(WRITE_PROMPTS_IN_FLIGHT)))


@dataclass
class Reads:
    """Rounds of reading."""

    prompts: Prompts
    disk: RawDisk
    cpu: Cpu
    kept: list[list[bytes]] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)

    async def fill(self, data: Bytes) -> None:
        """Stores what is read; what is stored last stays in DRAM, and is read last."""
        self.kept = [
            self.prompts.keys(READ_PROMPT_BYTES) for _ in range(READ_BYTES // READ_PROMPT_BYTES)
        ]
        await self.prompts.store(self.kept, data[:READ_PROMPT_BYTES])

    async def ours(self, number: int) -> float:
        """Every prompt once."""
        del number
        with self.cpu.of("ours"):
            start = time.perf_counter()
            ahead, waiting = deque(self.kept), deque[Lease]()
            while ahead or waiting:
                while ahead and len(waiting) < READ_PROMPTS_IN_FLIGHT:
                    keys = ahead.popleft()
                    waiting.append(await self.prompts.namespace.acquire(keys, timeout_s=TIMEOUT_S))
                lease = waiting.popleft()
                await lease.wait()
                self._check(lease)
                lease.release()
            return time.perf_counter() - start

    def _check(self, lease: Lease) -> None:
        if lease.granted < lease.count:
            raise BenchmarkError(f"{lease.granted} of {lease.count} blocks came: {lease.reason}")
        if not (lease.sources == Tier.SSD).all():
            raise BenchmarkError("a block that was to be read from SSD was in DRAM")

    async def raw(self, number: int) -> float:
        """The same bytes by themselves."""
        del number
        block_bytes = self.prompts.namespace.spec.block_bytes
        with self.cpu.of("raw"):
            return self.disk.read(Requests(0, READ_BYTES, block_bytes, ssd.IO_THREADS))


@dataclass
class Writes:
    """Rounds of writing."""

    prompts: Prompts
    disk: RawDisk
    cpu: Cpu
    data: Bytes
    target: Bytes = field(default_factory=lambda: np.ones(DRAM_BYTES, dtype=np.uint8))

    async def ours(self, number: int) -> float:
        """New prompts."""
        del number
        count = WRITE_BYTES // WRITE_PROMPT_BYTES
        prompts = [self.prompts.keys(WRITE_PROMPT_BYTES) for _ in range(count)]
        with self.cpu.of("ours"):
            start = time.perf_counter()
            await self.prompts.store(prompts, self.data)
            return time.perf_counter() - start

    async def raw(self, number: int) -> float:
        """What the file holds there already; every write of the node has ended."""
        del number
        requests = self._read_back()
        with self.cpu.of("raw"):
            return self.disk.write(requests)

    async def beside_copy(self, number: int) -> float:
        """The same, while a thread does what a client's put does to as many bytes."""
        del number
        requests = self._read_back()
        with ThreadPoolExecutor(1) as copier:
            start = time.perf_counter()
            copied = copier.submit(self._copy)
            self.disk.write(requests)
            copied.result()
            return time.perf_counter() - start

    def _read_back(self) -> Requests:
        """What is to be written: it is in the loop's memory then."""
        block_bytes = self.prompts.namespace.spec.block_bytes
        threads, sync_bytes = ssd_writer.IO_THREADS, ssd_writer.GROUP_BYTES
        requests = Requests(0, WRITE_BYTES, block_bytes, threads, sync_bytes)
        self.disk.read(requests)
        return requests

    def _copy(self) -> None:
        nbytes = self.prompts.namespace.spec.block_bytes
        for at in range(0, WRITE_BYTES, len(self.data)):
            first = at % len(self.target)
            offsets = np.arange(first, first + len(self.data), nbytes)
            scatter(self.target, offsets, nbytes, self.data)


async def _measure(node: NodeProcess, client: AsyncClient, rounds: int) -> list[Row]:
    data = np.random.default_rng(os.getpid()).integers(
        0, 256, max(READ_PROMPT_BYTES, WRITE_PROMPT_BYTES), dtype=np.uint8
    )
    disk = RawDisk(node.directory / "ssd" / "data", max(READ_BYTES, WRITE_BYTES))
    rows: list[Row] = []
    try:
        for size, block_bytes in BLOCK_SIZES.items():
            spec = CacheSpec.raw(f"benchmark {size}", block_bytes=block_bytes)
            prompts = Prompts(await client.open_namespace(spec))
            # The tier is full and its space written to once before anything is measured.
            await prompts.store(
                [prompts.keys(WRITE_PROMPT_BYTES) for _ in range(SSD_BYTES // WRITE_PROMPT_BYTES)],
                data[:WRITE_PROMPT_BYTES],
            )
            reads = Reads(prompts, disk, Cpu(node))
            await reads.fill(data)
            writes = Writes(prompts, disk, Cpu(node), data[:WRITE_PROMPT_BYTES])
            kinds: list[tuple[str, Reads | Writes, int]] = [
                (f"ssd_read_{size}", reads, READ_BYTES),
                (f"ssd_write_{size}", writes, WRITE_BYTES),
            ]
            for metric, kind, nbytes in kinds:
                measured = await interleave(kind.ours, kind.raw, rounds=rounds)
                rows.append(measured.rate_row(metric, nbytes, "O_DIRECT loop"))
                rows += kind.cpu.rows(metric, nbytes)
            beside = await interleave(writes.beside_copy, writes.raw, rounds=rounds)
            metric = f"ssd_write_{size}_beside_copy"
            rows.append(beside.rate_row(metric, WRITE_BYTES, "O_DIRECT loop"))
    finally:
        disk.close()
    shared_bytes = DRAM_BYTES + node.directory_bytes()
    return [
        *rows,
        Row(
            "pool_in_huge_pages",
            node.huge_shared_bytes() / shared_bytes,
            "of it, directory included",
        ),
        Row("loop_in_huge_pages", disk.in_huge_pages, "of its memory"),
    ]


async def _with_client(node: NodeProcess, rounds: int) -> list[Row]:
    async with await AsyncClient.connect(node.address, name="benchmark", timeout_s=30) as client:
        if not await asyncio.to_thread(client.mapping.wait_populated, 60.0):
            raise BenchmarkError("the pool was not mapped within 60 s")
        return await _measure(node, client, rounds)


def run(rounds: int) -> list[Row]:
    """All rows."""
    flags = ("--ssd", str(SSD_BYTES), "--scrub-mb-s", "0")
    with running(str(DRAM_BYTES), *flags) as node:
        return asyncio.run(_with_client(node, rounds))

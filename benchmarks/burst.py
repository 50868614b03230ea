"""A burst of four times what DRAM holds: how much of it is there afterwards, and right.

A node with 256 MiB of DRAM over 8 GiB of SSD gets 1,024 blocks of 1 MiB, in prompts of 64, from
eight writers at once, none of which pauses; the level is the default, ``memory``. A writer without
space waits as long as its client's default timeout (5 s), and is refused then. When the last
writer has ended, every block is read back through the client and compared. Each round has a node
and a directory of its own; ``kept`` is of the worst one.

The peer, a store with as much DRAM over SSD, kept 23 to 81 % of such a burst when its users
measured it; the ratio is to its best case.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from kvstore_client import AsyncClient

from benchmarks.errors import BenchmarkError
from benchmarks.harness import Ratio, Row
from benchmarks.node_process import NodeProcess, running
from benchmarks.prompts import Prompts, spec_of

ROUNDS = 5
DRAM_BYTES = 256 << 20
SSD_BYTES = 8 << 30
BLOCKS = 1024
BLOCK_BYTES = 1 << 20
PROMPT_BLOCKS = 64
WRITERS = 8
PEER_KEPT = 0.81


@dataclass(frozen=True)
class Outcome:
    """One burst: seconds of writing, blocks acknowledged, and found right afterwards."""

    seconds: float
    acknowledged: int
    kept: int


async def _write(prompts: Prompts) -> int:
    """Blocks acknowledged."""
    waiting = deque([(keys, prompts.content(keys)) for keys in prompts])
    stored = 0

    async def writer() -> None:
        nonlocal stored
        while waiting:
            keys, data = waiting.popleft()
            put = await prompts.namespace.put(keys, data)
            stored += put.stored

    await asyncio.gather(*(writer() for _ in range(WRITERS)))
    return stored


async def _read(prompts: Prompts) -> int:
    """Blocks that come back as they were written."""
    right = 0
    out = np.zeros(PROMPT_BLOCKS * BLOCK_BYTES, dtype=np.uint8)
    for keys in prompts:
        got = await prompts.namespace.get(keys, out, timeout_s=60)
        found = prompts.right(keys[: got.count], out)
        if found != got.count:
            raise BenchmarkError(f"{got.count - found} blocks came back with other bytes")
        right += found
    return right


async def _burst(node: NodeProcess) -> Outcome:
    async with await AsyncClient.connect(node.address, name="benchmark") as client:
        await asyncio.to_thread(client.mapping.wait_populated, 60.0)
        namespace = await client.open_namespace(spec_of("burst", BLOCK_BYTES))
        prompts = Prompts(namespace, BLOCKS, PROMPT_BLOCKS)
        began = time.perf_counter()
        acknowledged = await _write(prompts)
        return Outcome(time.perf_counter() - began, acknowledged, await _read(prompts))


def run(rounds: int) -> list[Row]:
    """All rows."""
    bursts = []
    for _ in range(rounds):
        with running(str(DRAM_BYTES), "--ssd", str(SSD_BYTES)) as node:
            bursts.append(asyncio.run(_burst(node)))
    if any(burst.kept < burst.acknowledged for burst in bursts):
        raise BenchmarkError(f"acknowledged blocks are lost: {bursts}")
    kept = Ratio.of([burst.kept / (PEER_KEPT * BLOCKS) for burst in bursts])
    rates = sorted(BLOCKS * BLOCK_BYTES / burst.seconds / 1e9 for burst in bursts)
    return [
        Row("kept", min(b.kept for b in bursts), f"of {BLOCKS} blocks", "the peer: 23-81 %", kept),
        Row("refused", max(BLOCKS - b.acknowledged for b in bursts), "blocks"),
        Row("burst_rate", rates[len(rates) // 2], "GB/s"),
    ]

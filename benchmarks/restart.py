"""A node that is killed with 200,000 blocks on SSD, and comes back.

The blocks (16 KiB, prompts of 512) are stored at the level ``persisted``; then, round by round, the
node gets a SIGKILL and is started again. ``ready_s`` is the time from the start of the process to
the line that says it serves: the pool is taken, the index read, the directory in shared memory
filled. The floor is an interpreter that only imports what the node imports, in the same rounds.
After the last start every acknowledged block must be in the directory and in the node's answers to
Match, and the bytes of a sample are read from SSD and compared.

``node_bytes_per_block`` is the memory of another node, outside of its pool, with a million blocks
of 4 KiB on SSD: its private memory, less what it had when empty, and its directory in full.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time

import numpy as np
from kvstore.core.types import AckLevel, Tier
from kvstore_client import AsyncClient
from kvstore_proto import node_pb2

from benchmarks.errors import BenchmarkError
from benchmarks.harness import Rounds, Row, interleave
from benchmarks.node_process import NodeProcess, running
from benchmarks.prompts import Prompts, spec_of

ROUNDS = 9
BLOCKS = 200_000
BLOCK_BYTES = 16 << 10
PROMPT_BLOCKS = 512
SAMPLE_PROMPTS = 16
DRAM_BYTES = 1 << 30
MEMORY_BLOCKS = 1_000_000
MEMORY_BLOCK_BYTES = 4 << 10
MEMORY_PROMPT_BLOCKS = 2000
TIMEOUT_S = 60.0


async def fill(node: NodeProcess, blocks: int, block_bytes: int, prompt_blocks: int) -> None:
    """Stores blocks at ``persisted``."""
    async with await AsyncClient.connect(node.address, timeout_s=TIMEOUT_S) as client:
        namespace = await client.open_namespace(spec_of("restart", block_bytes))
        prompts = Prompts(namespace, blocks, prompt_blocks)
        for keys in prompts:
            put = await namespace.put(
                keys, prompts.content(keys), level=AckLevel.PERSISTED, timeout_s=TIMEOUT_S
            )
            if not (put.levels >= AckLevel.PERSISTED).all():
                raise BenchmarkError(f"levels {np.bincount(put.levels)} instead of persisted")


async def found(node: NodeProcess) -> int:
    """How many blocks the restarted node has; BenchmarkError if one of the sample is wrong."""
    async with await AsyncClient.connect(node.address, timeout_s=TIMEOUT_S) as client:
        namespace = await client.open_namespace(spec_of("restart", BLOCK_BYTES))
        prompts = Prompts(namespace, BLOCKS, PROMPT_BLOCKS)
        count = 0
        for keys in prompts:
            match = node_pb2.Match(namespace_id=namespace.id, keys=b"".join(keys))
            answer = await client.session.call(node_pb2.SessionRequest(match=match), TIMEOUT_S)
            count += min(namespace.match(keys).count, len(answer.matched.tiers))
        for keys in random.sample(list(prompts), min(SAMPLE_PROMPTS, BLOCKS // PROMPT_BLOCKS)):
            async with namespace.read(keys, timeout_s=TIMEOUT_S) as read:
                out = np.zeros(len(keys) * BLOCK_BYTES, dtype=np.uint8)
                if read.copy_into(out) != len(keys) or not (read.sources == Tier.SSD).all():
                    raise BenchmarkError(f"{read.count} of {len(keys)} blocks came: {read.reason}")
                if prompts.right(keys, out) != len(keys):
                    raise BenchmarkError("a block came back with other bytes")
        return count


def _imports_s() -> float:
    """Seconds of an interpreter that imports the node, and ends."""
    command = [sys.executable, "-c", "import kvstore.node.serving; print('ready', flush=True)"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return time.perf_counter() - start


def _restarts(node: NodeProcess, rounds: int) -> Rounds:
    async def ours(number: int) -> float:
        del number
        node.kill()
        node.start()
        return node.ready_s

    async def floor(number: int) -> float:
        del number
        return _imports_s()

    return asyncio.run(interleave(ours, floor, rounds=rounds, warmup=1))


def _restart_rows(rounds: int) -> list[Row]:
    ssd = str(BLOCKS * BLOCK_BYTES * 5 // 4)
    with running(str(DRAM_BYTES), "--ssd", ssd) as node:
        asyncio.run(fill(node, BLOCKS, BLOCK_BYTES, PROMPT_BLOCKS))
        measured = _restarts(node, rounds)
        count = asyncio.run(found(node))
    if count != BLOCKS:
        raise BenchmarkError(f"{count} of {BLOCKS} acknowledged blocks were found")
    floor = f"its imports alone: {sorted(measured.other)[len(measured.other) // 2]:.2f} s"
    return [
        Row("ready_s", measured.median_s, "s p50", floor, measured.ratio),
        Row("ready_s_max", max(measured.ours), "s"),
        Row("found", count, "blocks", f"acknowledged: {BLOCKS}"),
    ]


def _memory_row() -> Row:
    ssd = str(MEMORY_BLOCKS * MEMORY_BLOCK_BYTES * 5 // 4)
    with running("256MiB", "--ssd", ssd) as node:
        before = node.memory_bytes()["RssAnon"]
        asyncio.run(fill(node, MEMORY_BLOCKS, MEMORY_BLOCK_BYTES, MEMORY_PROMPT_BLOCKS))
        private = node.memory_bytes()["RssAnon"] - before
        directory = node.directory_bytes()
    value = (private + directory) / MEMORY_BLOCKS
    part = f"of it directory: {directory / MEMORY_BLOCKS:.0f} bytes"
    return Row("node_bytes_per_block", value, "bytes", part)


def run(rounds: int) -> list[Row]:
    """All rows."""
    return [*_restart_rows(rounds), _memory_row()]

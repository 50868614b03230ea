"""What the checks on the way of a get cost: two nodes and clients, one with them, one without.

On: as shipped. Off, by replacing code in the processes of this benchmark:
- checksums: the node takes every read from SSD for right;
- generations: the client does not look whether slots changed while it copied;
- accounting: the node counts no events and moves no bytes between its accounts, and asks neither
  for the limits of a request nor of a session.
Pins, and the generations in the grants, stay: without them a get or a put would be wrong.

``checks_get`` and ``checks_get_64KiB`` get 1 MiB and 64 KiB blocks that are in DRAM, as the
benchmark ``local`` does; ``checks_get_ssd`` gets 1 MiB blocks that are on SSD only, as the
benchmark ``ssd`` reads them. The ratio is the rate with the checks over the rate without.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
from kvstore_client import AsyncClient, CacheSpec, Lease

from benchmarks import local, ssd
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Row, Timed, interleave
from benchmarks.node_process import NodeProcess, running
from benchmarks.raw_disk import PAGE_BYTES, RawDisk

ROUNDS = 30
SSD_ROUNDS = 8


@contextlib.contextmanager
def _client_off() -> Iterator[None]:
    with mock.patch.object(Lease, "still_valid", return_value=True):
        yield


def _node_off(flags: Sequence[str]) -> None:
    """Becomes a node without the checks."""
    from kvstore.core.blocks import Blocks
    from kvstore.core.checks import RequestChecks
    from kvstore.core.slots import SlotSpace
    from kvstore.node import daemon, ssd_block

    for owner, name, off in (
        (ssd_block, "verify", lambda *_: True),
        (Blocks, "count", lambda *_: None),
        (SlotSpace, "move", lambda *_: None),
        (RequestChecks, "wait_s", lambda _checks, _session, timeout_s, _waiting: timeout_s),
    ):
        mock.patch.object(owner, name, off).start()
    daemon.main(flags)


def _off(timed: Timed) -> Timed:
    async def unchecked(number: int) -> float:
        with _client_off():
            return await timed(number)

    return unchecked


async def _blocks(client: AsyncClient, block_bytes: int, source: local.Buffer) -> local.Blocks:
    spec = CacheSpec.raw(f"benchmark checks {block_bytes}", block_bytes=block_bytes)
    blocks = local.Blocks(await client.open_namespace(spec), source)
    await blocks.fill()
    return blocks


async def _reads(client: AsyncClient, node: NodeProcess) -> ssd.Reads:
    spec = CacheSpec.raw("benchmark checks ssd", block_bytes=1 << 20)
    disk = RawDisk(node.directory / "ssd" / "data", PAGE_BYTES)
    reads = ssd.Reads(ssd.Prompts(await client.open_namespace(spec)), disk, ssd.Cpu(node))
    data = np.random.default_rng(1).integers(0, 256, ssd.READ_PROMPT_BYTES, dtype=np.uint8)
    await reads.fill(data)
    return reads


async def _measure(nodes: Sequence[NodeProcess], rounds: int) -> list[Row]:
    rows = []
    moved = local.ROUND_BATCHES * local.BATCH_BYTES
    source = np.random.default_rng(0).integers(
        0, 256, (local.BATCHES, local.BATCH_BYTES), dtype=np.uint8
    )
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for node in nodes:
            client = await AsyncClient.connect(node.address, name="benchmark", timeout_s=30)
            clients.append(await stack.enter_async_context(client))
            if not await asyncio.to_thread(client.mapping.wait_populated, 60.0):
                raise BenchmarkError("the pool was not mapped within 60 s")
        for metric, size in (("checks_get", 1 << 20), ("checks_get_64KiB", 64 << 10)):
            on, off = [await _blocks(client, size, source) for client in clients]
            measured = await interleave(on.get, _off(off.get), rounds=rounds)
            rows.append(measured.rate_row(metric, moved, "without checks"))
        with_checks, without = [
            await _reads(client, node) for client, node in zip(clients, nodes, strict=True)
        ]
        measured = await interleave(
            with_checks.ours, _off(without.ours), rounds=min(rounds, SSD_ROUNDS)
        )
        rows.append(measured.rate_row("checks_get_ssd", ssd.READ_BYTES, "without checks"))
    return rows


def run(rounds: int) -> list[Row]:
    """All rows."""
    dram = str(local.POOL_BATCHES * local.BATCH_BYTES)
    flags = ("--ssd", str(ssd.SSD_BYTES), "--scrub-mb-s", "0")
    with running(dram, *flags) as on, running(dram, *flags, module="benchmarks.checks") as off:
        return asyncio.run(_measure([on, off], rounds))


if __name__ == "__main__":
    _node_off(sys.argv[1:])

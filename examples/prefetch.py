"""Several prompts at once with asyncio: prefetch from SSD, then use blocks as they arrive.

Start `kvstore up`, then run this with the node's address that it prints, `unix:…/node.sock`. What
it stores is in DRAM and on SSD; `kvstore evict` takes it out of DRAM, so that there is something to
prefetch. KVSTORE_MASTER is the master's address where that is not the default.
"""

import asyncio
import sys

import numpy as np
from kvstore_client import AckLevel, AsyncClient, CacheSpec, Namespace

BLOCK_BYTES = 256 << 10
PROMPTS = 4
BLOCKS = 32


async def evict_from_dram(keys: list[bytes]) -> None:
    """Leaves these blocks on SSD only."""
    names = ",".join(key.hex() for key in keys)
    command = (sys.executable, "-m", "kvstore.cli.main", "evict", "--tier", "dram", "--keys", names)
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        sys.exit("the blocks could not be evicted")


async def sum_of(ns: Namespace, keys: list[bytes]) -> int:
    """Adds up a prompt's bytes, each block as soon as it is in DRAM."""
    total = 0
    lease = await ns.acquire(keys, timeout_s=5)
    try:
        async for first, count in lease.arrivals():
            total += sum(int(lease.blocks.array(i).sum()) for i in range(first, first + count))
            lease.release(first, count)
    finally:
        lease.release()
    print(f"{lease.granted} of {len(keys)} blocks; the chain ended: {lease.reason!r}")
    return total


async def main(address: str) -> None:
    """Stores prompts durably, asks for them ahead of time, and reads them side by side."""
    async with await AsyncClient.connect(address, name="example") as client:
        ns = await client.open_namespace(CacheSpec.raw("prefetch", block_bytes=BLOCK_BYTES))
        tokens = np.arange(BLOCKS * ns.spec.block_tokens)
        prompts = [ns.keys(tokens + number) for number in range(PROMPTS)]
        data = np.ones((BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        for keys in prompts:
            await ns.put(keys, data, level=AckLevel.SYNCED)
        await evict_from_dram([key for keys in prompts for key in keys])
        for keys in prompts:
            print(f"{ns.match(keys).count} blocks, {await ns.prefetch(keys)} loads started")
        sums = await asyncio.gather(*(sum_of(ns, keys) for keys in prompts))
        assert all(total == data.sum() for total in sums)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.stderr.write(f"usage: python {sys.argv[0]} ADDRESS, as `kvstore up` prints it\n")
        sys.exit(2)
    asyncio.run(main(sys.argv[1]))

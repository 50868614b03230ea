"""A client process that holds blocks until it is killed: ``holder.py ADDRESS read|write``."""

import asyncio
import sys

from kvstore_client import AsyncClient, CacheSpec


async def main(address: str, mode: str) -> None:
    client = await AsyncClient.connect(address, name="holder")
    ns = await client.open_namespace(CacheSpec.raw("test", block_bytes=8192, block_tokens=4))
    keys = ns.keys(range(64))
    if mode == "read":
        lease = await ns.acquire(keys)
        print(await lease.wait(), flush=True)
    else:
        write = await ns.write(keys).__aenter__()
        for _, slot in write.slots[:8]:
            slot[:] = b"?" * len(slot)
        await write.commit(range(2))
        print(len(write.slots), flush=True)
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))

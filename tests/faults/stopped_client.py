"""A client process that is stopped while it holds something.

``python -m tests.faults.stopped_client ADDRESS``. Lines on stdin: ``read SEED seen|unseen`` or
``write SEED seen|unseen`` begins, and prints ``holding`` when slots are held; ``go`` then lets a
thread touch them late, whatever has become of the session, and prints what came of it: ``right``,
``wrong`` or ``discarded`` bytes of a read, ``committed``, ``lost`` or ``wrong`` of a write. Last
comes ``works``, once the client has stored and read something new.
"""

import asyncio
import contextlib
import random
import sys
from unittest import mock

import numpy as np
from kvstore.errors import KVStoreError, UnavailableError
from kvstore_client import AsyncClient, Lease, Namespace, Write
from kvstore_client.process import ProcessIdentity, this_process

from tests.faults.content import content
from tests.faults.load import BLOCK_BYTES, SPEC

BLOCKS = 16
TIMEOUT_S = 10.0
RETRY_S = 0.01


def keys_of(seed: int) -> list[bytes]:
    """Keys of one use."""
    make = random.Random(f"stopped {seed}").randbytes
    return [make(32) for _ in range(BLOCKS)]


def data_of(keys: list[bytes]) -> list[bytes]:
    """Their bytes."""
    return [content(0, "default", key, 0, BLOCK_BYTES) for key in keys]


def say(word: str) -> None:
    """Tells the test."""
    print(word, flush=True)


def read_late(lease: Lease, keys: list[bytes]) -> str:
    """In a thread: waits for the word, then copies."""
    sys.stdin.readline()
    out = [np.zeros(BLOCK_BYTES, np.uint8) for _ in keys]
    try:
        lease.copy_into(out, 0, len(keys))
    except UnavailableError:
        return "discarded"
    return "right" if [o.tobytes() for o in out] == data_of(keys) else "wrong"


async def read(ns: Namespace, keys: list[bytes]) -> str:
    """Holds a lease over blocks of its own."""
    assert (await ns.put(keys, data_of(keys))).stored == len(keys)
    lease = await ns.acquire(keys)
    assert await lease.wait() == len(keys)
    say("holding")
    result = await asyncio.to_thread(read_late, lease, keys)
    lease.release()
    return result


def write_late(write: Write, data: list[bytes]) -> None:
    """In a thread: waits for the word, then fills the second half of its slots."""
    sys.stdin.readline()
    for index in range(BLOCKS // 2, BLOCKS):
        write.put(index, data[index])


async def write(ns: Namespace, keys: list[bytes]) -> str:
    """Holds slots, half of them filled."""
    data = data_of(keys)
    async with ns.write(keys) as slots:
        for index in range(BLOCKS // 2):
            slots.put(index, data[index])
        say("holding")
        try:
            await asyncio.to_thread(write_late, slots, data)
            await slots.commit()
        except UnavailableError:
            return "lost"
    return "committed"


async def settle(client: AsyncClient) -> None:
    """Has a session again."""
    while client.closed:
        try:
            await client.reconnect()
        except KVStoreError:
            await asyncio.sleep(RETRY_S)


async def found(ns: Namespace, keys: list[bytes]) -> int:
    """Leading blocks that are there and right; -1 if one is wrong."""
    out = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
    got = await ns.get(keys, out)
    right = all(o.tobytes() == d for o, d in zip(out[: got.count], data_of(keys), strict=False))
    return got.count if right else -1


async def use(address: str, kind: str, seed: int) -> None:
    """One use, from its session to its goodbye."""
    async with await AsyncClient.connect(address, name="stopped", timeout_s=TIMEOUT_S) as client:
        ns = await client.open_namespace(SPEC)
        keys = keys_of(2 * seed)
        result = await (read if kind == "read" else write)(ns, keys)
        while True:  # the loss of the session may show only now
            with contextlib.suppress(UnavailableError):
                say(await afterwards(client, ns, kind, seed, result))
                break
        say("works")


async def afterwards(client: AsyncClient, ns: Namespace, kind: str, seed: int, result: str) -> str:
    """Stores and reads something new; ``result``, or ``wrong`` if it was not true."""
    await settle(client)
    fresh = keys_of(2 * seed + 1)
    await ns.put(fresh, data_of(fresh))
    assert await found(ns, fresh) == BLOCKS
    visible = BLOCKS if result == "committed" else 0
    if kind == "write" and await found(ns, keys_of(2 * seed)) != visible:
        return "wrong"
    return result


async def main(address: str) -> None:
    """One use a line."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        kind, seed, sight = line.split()
        identity = this_process() if sight == "seen" else ProcessIdentity(0, 0, 0)
        with mock.patch("kvstore_client.client.this_process", return_value=identity):
            await use(address, kind, int(seed))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

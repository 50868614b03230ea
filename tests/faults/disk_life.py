"""A short life of a node's disk, in a process that system calls may fail or kill.

``python -m tests.faults.disk_life DIR [FILE_BYTES_MAX]`` starts a node in DIR, stores blocks,
moves them between its tiers, removes some, and starts it a second time. Each line on stdout is
said before, or after, the thing is done: ``ask KEY``, ``ack KEY LEVEL``, ``remove KEY``, ``end``.
With FILE_BYTES_MAX no file may grow beyond that from the second put on, until the second start:
a write across that place is short.
"""

import asyncio
import os
import random
import resource
import signal
import sys
from pathlib import Path

from kvstore.errors import KVStoreError

from tests.faults import columns
from tests.faults.disk import DiskNode
from tests.faults.ledger import Ledger

CHAINS, CHAIN = 3, 4
SSD_BYTES = 1 << 20


def say(*words: object) -> None:
    """One line, in one write: whatever happens next, it was said."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def _put(node: DiskNode, keys: list[bytes]) -> None:
    for key in keys:
        say("ask", key.hex())
    outcome = await node.put(keys)
    for key, one in zip(keys, outcome, strict=True):
        if one > 16:
            say("ack", key.hex(), one - 16)


def _limit_files(bytes_max: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, hard))


async def _live(folder: Path, ledger: Ledger, rng: random.Random, bytes_max: int) -> None:
    """Put, demote, promote, evict."""
    chains = [[rng.randbytes(32) for _ in range(CHAIN)] for _ in range(CHAINS)]
    async with DiskNode(folder, ledger, ssd=SSD_BYTES, node_id="") as node:
        for chain in chains:
            await _put(node, chain)
            _limit_files(bytes_max)
        node.forget_dram()
        await node.get(chains[0])
        for key in reversed(chains[1]):
            say("remove", key.hex())
            node.remove([key])
        await _put(node, [rng.randbytes(32) for _ in range(CHAIN)])
        await node.get(chains[2])
        _limit_files(resource.RLIM_INFINITY)


async def _lives(folder: Path, bytes_max: int) -> None:
    ledger, rng = Ledger(columns.SEED), random.Random(columns.SEED)
    for limit in (bytes_max, resource.RLIM_INFINITY):
        await _live(folder, ledger, rng, limit)
    say("wrong", ledger.wrong)
    say("end")


def main() -> None:
    """Exit code 1, and a message, where the node does not start."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    bytes_max = int(sys.argv[2]) if len(sys.argv) > 2 else resource.RLIM_INFINITY
    try:
        asyncio.run(_lives(Path(sys.argv[1]), bytes_max))
    except KVStoreError as error:
        sys.exit(f"refused: {error}")


if __name__ == "__main__":
    main()

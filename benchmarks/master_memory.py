"""Memory of the master's index for one block, from the growth of a fresh process.

python -m benchmarks.master_memory BLOCKS
"""

import hashlib
import sys
from pathlib import Path

from kvstore.core.locations import Locations
from kvstore.core.types import Tier

CHUNK_KEYS = 8192
NODES = 8


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def keys(first: int, count: int) -> bytes:
    """``count`` keys as a node reports them, one field."""
    numbers = range(first, first + count)
    return b"".join(hashlib.sha256(number.to_bytes(8, "little")).digest() for number in numbers)


def measure(blocks: int) -> float:
    """Bytes a block, with blocks in DRAM and on SSD of one of several nodes each."""
    index = Locations()
    keys(0, CHUNK_KEYS)
    before = resident_bytes()
    for number, first in enumerate(range(0, blocks, CHUNK_KEYS)):
        joined = keys(first, min(CHUNK_KEYS, blocks - first))
        node = f"node-{number % NODES}"
        for tier in (Tier.DRAM, Tier.SSD):
            index.stored(index.place(node, tier, b"root" * 8), joined)
    return (resident_bytes() - before) / blocks


if __name__ == "__main__":
    print(measure(int(sys.argv[1])))

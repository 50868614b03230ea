"""F8: the disk is full, and has room again. Reads go on, no acknowledged block is lost, no restart.

A block that finds no room on SSD stays in memory, which the acknowledgement says; when memory has
no room either, the put is refused.
"""

import asyncio
import contextlib
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvstore.core.types import AckLevel, ReserveStatus

from tests.faults import columns
from tests.faults.disk import DiskNode, reached
from tests.faults.ledger import Ledger
from tests.faults.report import Record, finish

FILLS = 20  # of one disk; the index's file never gets smaller, and after many it is never full
DISKS = columns.size(quick=1, full=5, soak=5)
DISK_BYTES = 64 << 20
CHAIN = 16
CHAINS_AT_ONCE = 8
ROUNDS_MAX = 60
KEPT_MAX = 3000  # blocks; far less than the SSD holds, so that none leaves for want of space
HEAL_S = 5.0
ALLOWED = {16 + AckLevel.SYNCED, 16 + AckLevel.MEMORY, int(ReserveStatus.FULL)}


@pytest.fixture
def disk() -> Iterator[Path]:
    """A small file system in memory; skips where none can be mounted."""
    with tempfile.TemporaryDirectory(prefix="kvs-f08-") as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder]
        if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("a small file system can be mounted by root only")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


class Fills:
    """Fills of one disk under one running node."""

    def __init__(self, disk: Path, node: DiskNode, rng: random.Random) -> None:
        self.disk, self.node, self.rng = disk, node, rng
        self.ledger = node.ledger
        self.lost = self.in_memory = self.refused = 0

    async def _put(self, chains: int = CHAINS_AT_ONCE) -> list[bytes]:
        keys = [[self.rng.randbytes(32) for _ in range(CHAIN)] for _ in range(chains)]
        puts = (self.node.put(chain, timeout_s=0.02) for chain in keys)
        outcomes = await asyncio.gather(*puts)
        for outcome in outcomes:
            assert set(outcome) <= ALLOWED, outcome
            self.in_memory += outcome.count(16 + AckLevel.MEMORY)
            self.refused += outcome.count(ReserveStatus.FULL)
        return outcomes

    async def fill(self) -> None:
        """Fills the disk, writes until the SSD takes nothing, reads, frees it, writes again."""
        acked = self.ledger.acked_at(AckLevel.SYNCED)
        self.node.remove(acked[: max(0, len(acked) - KEPT_MAX)])
        acked = acked[-KEPT_MAX:]
        room = os.statvfs(self.disk)
        filler = self.disk / "filler"
        with contextlib.suppress(OSError):  # the index may take some of the room first
            filler.write_bytes(bytes(room.f_bavail * room.f_frsize))
        for _ in range(ROUNDS_MAX):  # the index has free pages of its own
            await self._put()
            # Not what the puts say: one that only was too slow is in memory as well.
            if problems := self.node.node.problems():
                break
        else:
            pytest.fail("the index never had no room")
        assert "no room" in problems[0]
        await self._put()  # a small commit may find room yet
        looked_at = self.rng.sample(acked, min(len(acked), 100))
        self.lost += len(set(looked_at) - await self.node.find(looked_at))
        filler.unlink()
        async with asyncio.timeout(HEAL_S):
            while not reached((await self._put(1))[0], AckLevel.SYNCED):
                pass
        assert self.node.node.problems() == []

    async def finish(self) -> None:
        """Everything acknowledged is on the SSD, and the accounts add up."""
        await self.node.idle()
        self.node.forget_dram()
        acked = self.ledger.acked_at(AckLevel.SYNCED)
        self.lost += len(set(acked) - await self.node.find(acked))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", range(DISKS))
async def test_I7_F8_a_full_disk_costs_no_block_and_heals(
    number: int, disk: Path, tmp_path: Path, record_property: Record
) -> None:
    seed = columns.SEED + number
    ledger = Ledger(seed)
    async with DiskNode(tmp_path, ledger, ssd=40 << 20, ssd_dir=str(disk / "ssd")) as node:
        fills = Fills(disk, node, random.Random(seed))
        for _ in range(FILLS):
            await fills.fill()
        await fills.finish()
    finish(
        record_property,
        "F8 disk-full",
        fills=FILLS,
        acked_synced=len(ledger.acked_at(AckLevel.SYNCED)),
        in_memory=fills.in_memory,
        refused=fills.refused,
        reads=ledger.reads,
        lost=fills.lost,
        wrong=ledger.wrong,
    )

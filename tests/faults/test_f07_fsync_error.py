"""F7: a failed sync. Nothing is acknowledged above memory on that file until the restart.

After a failed fsync the kernel has forgotten which pages were dirty, and the next one succeeds:
to go on as if nothing had been is to acknowledge what is not on the medium.
"""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvstore.core.types import AckLevel
from kvstore.faultpoint import enable_faultpoints

from tests.faults import columns
from tests.faults.disk import DiskNode, reached
from tests.faults.ledger import Ledger
from tests.faults.report import Record, finish

EPISODES = columns.size(quick=10, full=50, soak=50)
PUTS_AFTER = 3


class FailingSync:
    """``os.fdatasync`` that fails once, at its n-th call, and says that all is well afterwards."""

    def __init__(self, number: int) -> None:
        self.left = number
        self._real = os.fdatasync

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._real(descriptor)


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    enable_faultpoints({})


async def _episode(
    folder: Path, ledger: Ledger, rng: random.Random, patched: pytest.MonkeyPatch, *, index: bool
) -> int:
    """One life of a node; how many blocks it acknowledged that it must not have."""
    number = rng.randint(1, 4)
    async with DiskNode(folder, ledger) as node:
        acked = ledger.acked_at(AckLevel.SYNCED)
        lost = len(set(acked) - await node.find(acked))
        if index:
            enable_faultpoints({"KVSTORE_FAULTPOINTS": f"ssd.index:eio@{number}"})
        else:
            patched.setattr(os, "fdatasync", FailingSync(number))
        for turn in range(1, number + PUTS_AFTER):
            keys = [rng.randbytes(32) for _ in range(3)]
            level = AckLevel.SYNCED if turn < number else AckLevel.MEMORY
            outcome = await node.put(keys)
            lost += 0 if reached(outcome, level) else len(keys)
            assert (await node.get(keys)).blocks, "what is in DRAM is served"
        assert any("restart the node" in problem for problem in node.node.problems())
        node.forget_dram()
        lost += len(set(acked) - await node.find(acked))
    ledger.acked = dict.fromkeys(ledger.acked_at(AckLevel.SYNCED), AckLevel.SYNCED)
    return lost


@pytest.mark.timeout(columns.size(quick=60, full=300, soak=300))
async def test_I3_F7_nothing_is_acknowledged_after_a_failed_sync(
    tmp_path: Path, record_property: Record
) -> None:
    ledger, rng = Ledger(columns.SEED), random.Random(columns.SEED)
    lost = 0
    for episode in range(EPISODES):
        with pytest.MonkeyPatch.context() as patched:
            lost += await _episode(tmp_path, ledger, rng, patched, index=episode % 2 == 1)
        enable_faultpoints({})
    acked = len(ledger.acked)
    counts = {"reads": ledger.reads, "lost": lost, "wrong": ledger.wrong}
    finish(record_property, "F7 fsync-error", episodes=EPISODES, acked_synced=acked, **counts)

"""F6: power loss. What was acknowledged as synced is there, nothing is wrong, the node starts.

The SSD directory is an ext4 of its own, on a loop image. The power goes by the shutdown ioctl,
which stops the file system without its log: what was not on the medium by then never comes there.
Every other cycle goes through the page cache, where data is lost unless it was synced.
"""

import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvstore.core.types import AckLevel
from kvstore.durable import write_durably

from tests.faults import columns
from tests.faults.disk import DiskNode
from tests.faults.ledger import Ledger
from tests.faults.report import Record, finish

CYCLES = columns.size(quick=100, full=1_000, soak=10_000)
TIMEOUT_S = columns.size(quick=240, full=1_800, soak=12_000)
EXT4_IOC_SHUTDOWN, WITHOUT_LOG = 0x8004587D, 2
IMAGE_BYTES = 40 << 20
KEPT_MAX = 400  # blocks; older ones are removed, so that their slots are used again
CHECKED_MAX = 60


class Medium:
    """A file system that loses its power and comes back."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "medium"
        self._image = folder / "image"
        self.path.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(IMAGE_BYTES)
        self._run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", str(self._image))
        self.mount()

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, timeout=30)

    def mount(self) -> None:
        self._run("mount", "-o", "loop", str(self._image), str(self.path))

    def lose_power(self) -> None:
        """From now on nothing that was not on the medium gets there."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", WITHOUT_LOG))
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        self._run("umount", str(self.path))

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("umount", "--lazy", str(self.path))


@pytest.fixture
def medium() -> Iterator[Medium]:
    """An ext4 of its own; skips where there is none to be had."""
    if os.geteuid() or not shutil.which("mkfs.ext4") or not os.path.exists("/dev/loop-control"):
        pytest.skip("power loss needs root, mkfs.ext4 and loop devices")
    in_memory = Path("/dev/shm")  # what the medium is on must not be what takes the time
    place = in_memory if shutil.disk_usage(in_memory).free > 4 * IMAGE_BYTES else None
    folder = Path(tempfile.mkdtemp(prefix="kvs-f06-", dir=place))
    medium = None
    try:
        try:
            medium = Medium(folder)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no loop image can be mounted: {error.stderr.decode()}")
        yield medium
    finally:
        if medium is not None:
            medium.close()
        shutil.rmtree(folder)


class PowerLoss:
    """The cycles of one medium, under one seed."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.rng = random.Random(columns.SEED)
        self.ledger = Ledger(columns.SEED)
        self.lost = 0
        self.acked = 0
        self.note = b""

    def _keys(self, count: int) -> list[bytes]:
        return [self.rng.randbytes(32) for _ in range(count)]

    async def cycle(self, *, quiet: bool) -> None:
        """One life of a node, from its start to the loss of power while it writes."""
        folder = self.medium.path
        if self.note and (folder / "note").read_bytes() != self.note:
            self.lost += 1
        settings = {"pool_dir": folder.parent, "ssd_dir": str(folder / "ssd")}
        async with DiskNode(folder, self.ledger, **settings) as node:
            await self._check(node)
            acked = self.ledger.acked_at(AckLevel.SYNCED)
            before = set(acked)
            node.remove(acked[: max(0, len(acked) - KEPT_MAX)])
            async with asyncio.TaskGroup() as writers:
                puts = [self._keys(self.rng.randint(1, 12)) for _ in range(self.rng.randint(1, 6))]
                jobs = [writers.create_task(self._put(node, keys)) for keys in puts]
                if not quiet:
                    await asyncio.sleep(self.rng.random() * 0.02)
                    self.medium.lose_power()
            if quiet:
                assert all(job.result() for job in jobs), "a healthy medium refused a write"
                self.note = self.rng.randbytes(32)
                write_durably(folder / "note", self.note)
                self.medium.lose_power()
            self.acked += len(set(self.ledger.acked_at(AckLevel.SYNCED)) - before)

    async def _put(self, node: DiskNode, keys: list[bytes]) -> bool:
        outcome = await node.put(keys)
        return all(one == 16 + AckLevel.SYNCED for one in outcome)

    async def _check(self, node: DiskNode) -> None:
        """What counts is what the medium has: DRAM is new. The newest are looked at first."""
        acked = self.ledger.acked_at(AckLevel.SYNCED)[-CHECKED_MAX:]
        self.lost += len(set(acked) - await node.find(acked))
        node.core.check_integrity()

    def forget_memory(self) -> None:
        """The node is gone, and with it what was acknowledged at less than ``synced``."""
        synced = dict.fromkeys(self.ledger.acked_at(AckLevel.SYNCED), AckLevel.SYNCED)
        self.ledger.acked = synced


@pytest.mark.timeout(TIMEOUT_S)
async def test_I3_F6_synced_blocks_survive_power_loss(
    medium: Medium, record_property: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PowerLoss(medium)
    for cycle in range(CYCLES):
        with monkeypatch.context() as patched:
            if cycle % 2:
                patched.setattr(os, "O_DIRECT", 0)
            await run.cycle(quiet=cycle % 10 == 4)
        run.forget_memory()
        medium.unmount()
        medium.mount()
    assert run.acked > CYCLES
    counts = {"reads": run.ledger.reads, "lost": run.lost, "wrong": run.ledger.wrong}
    finish(record_property, "F6 power-loss", cycles=CYCLES, acked_synced=run.acked, **counts)

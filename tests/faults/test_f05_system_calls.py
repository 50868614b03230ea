"""F5: each system call that makes a block durable is killed before and after, or fails.

``strace`` injects the fault at the N-th call, N = 1, 2, …, until a life of a node ends without it.
Then a node starts on what is left: what was acknowledged is there, and nothing is wrong.
"""

import asyncio
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from kvstore.core.types import AckLevel

from tests.faults import columns
from tests.faults.daemons import daemon_command
from tests.faults.disk import DiskNode
from tests.faults.disk_life import SSD_BYTES
from tests.faults.ledger import Ledger
from tests.faults.live import environment
from tests.faults.report import Record, finish

CALLS = (
    "pwritev2",
    "pwrite64",
    "fdatasync",
    "fsync",
    "preadv2",
    "fallocate",
    "ftruncate",
    "rename",
    "mkdir",
)
KILLED_BEFORE, KILLED_AFTER, SHORT = "signal=KILL", "signal=USR1", "retval=0"
KINDS = (KILLED_BEFORE, KILLED_AFTER, "error=EIO", "error=ENOSPC", SHORT)
CAN_BE_SHORT = ("pwritev2", "pwrite64")
SITES_QUICK = 36
SITES_MAX = 200  # of one call; a life has fewer
FILE_LIMITS = range(6_000, 90_000, columns.size(quick=30_000, full=4_000, soak=500))
LIFE_TIMEOUT_S = 60.0
CLEAN, REFUSED = 0, 1


class Site(NamedTuple):
    """The N-th call, and what happens to it."""

    call: str
    number: int
    kind: str


class Told(NamedTuple):
    """What a life said: what it asked for, and what was acknowledged and not removed later."""

    asked: set[bytes]
    acked: set[bytes]
    synced: set[bytes]
    wrong: int
    ended: bool


def told(output: str) -> Told:
    """Reads the lines of a life."""
    asked, acked, synced, wrong, ended = set[bytes](), set[bytes](), set[bytes](), 0, False
    for line in output.splitlines():
        word, *rest = line.split()
        if word in ("ask", "ack", "remove"):
            key = bytes.fromhex(rest[0])
            asked.add(key)
        if word == "ack":
            acked.add(key)
            if int(rest[1]) == AckLevel.SYNCED:
                synced.add(key)
        elif word == "remove":
            acked.discard(key)
            synced.discard(key)
        elif word == "wrong":
            wrong = int(rest[0])
        ended |= word == "end"
    return Told(asked, acked, synced, wrong, ended)


class Lives:
    """Runs lives with a fault each, and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = self.acked = self.reads = self.lost = self.wrong = self.refused = 0

    def run(self, tracing: list[str], *more: str) -> bool:
        """One life and what is left of it; whether the fault came."""
        home, log = self.folder / "home", self.folder / "strace"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        log.write_text("")
        if tracing:
            tracing = ["strace", "-f", "-qq", "-e", "signal=none", "-o", str(log), *tracing]
        command = [*tracing, *daemon_command("tests.faults.disk_life"), str(home), *more]
        life = subprocess.run(
            command,
            capture_output=True,
            timeout=LIFE_TIMEOUT_S,
            check=False,
            # Coverage writes at the end of a life: the faults are for the node's own calls.
            env=environment(),
        )
        errors = life.stderr.decode()
        assert "Traceback" not in errors, (command, errors)
        said = told(life.stdout.decode())
        if life.returncode == REFUSED:
            assert errors.splitlines()[-1].startswith("refused: "), (command, errors)
            self.refused += 1
        elif life.returncode == CLEAN:
            assert said.ended, (command, errors)
        asyncio.run(self._look(home, said))
        self.runs += 1
        killed = life.returncode < 0 or life.returncode > 128
        return bool(more) or killed or "INJECTED" in log.read_text()

    async def _look(self, home: Path, said: Told) -> None:
        ledger = Ledger(columns.SEED)
        for key in said.asked:
            ledger.issue(key)
        async with DiskNode(home, ledger, ssd=SSD_BYTES, node_id="") as node:
            asked = sorted(said.asked)
            found = await node.find(asked)
            node.core.check_integrity()
            node.remove(asked)
            assert set(await node.put([b"after".rjust(32)])) == {16 + AckLevel.SYNCED}
        self.acked += len(said.synced)
        self.lost += len(said.synced - found)
        self.reads += ledger.reads
        self.wrong += ledger.wrong + said.wrong

    def at(self, site: Site) -> bool:
        """Whether a life has that site."""
        inject = f"inject={site.call}:{site.kind}:when={site.number}"
        return self.run(["-e", f"trace={site.call}", "-e", inject])

    def counts(self) -> dict[str, int]:
        """How often the busiest thread of a life without faults makes each call."""
        assert not self.run(["-e", f"trace={','.join(CALLS)}"])
        seen: dict[tuple[str, str], int] = {}
        for line in (self.folder / "strace").read_text().splitlines():
            thread, _, rest = line.partition(" ")
            call = rest.strip().partition("(")[0]
            seen[call, thread] = seen.get((call, thread), 0) + 1
        return {
            call: max((n for (c, _), n in seen.items() if c == call), default=0) for call in CALLS
        }


def kinds_of(call: str) -> Iterator[str]:
    """The faults that a call can have."""
    return (kind for kind in KINDS if kind != SHORT or call in CAN_BE_SHORT)


@pytest.mark.timeout(columns.size(quick=300, full=3_000, soak=9_000))
def test_I3_I8_F5_every_system_call_may_fail(record_property: Record) -> None:
    if not shutil.which("strace"):
        pytest.skip("strace injects the faults, and is not installed")
    with tempfile.TemporaryDirectory(prefix="kvs-f05-") as folder:
        lives = Lives(Path(folder))
        counts = lives.counts()
        assert all(
            counts[call] for call in ("pwritev2", "pwrite64", "fdatasync", "preadv2", "rename")
        )
        if columns.COLUMN == "quick":
            sites = [
                Site(call, number, kind)
                for call, count in counts.items()
                for number in range(1, count + 1)
                for kind in kinds_of(call)
            ]
            rng = random.Random(columns.SEED)
            for site in rng.sample(sites, min(SITES_QUICK, len(sites))):
                lives.at(site)
        else:
            for call in CALLS:
                for kind in kinds_of(call):
                    for number in range(1, SITES_MAX):
                        if not lives.at(Site(call, number, kind)):
                            break
        for limit in FILE_LIMITS:
            lives.run([], str(limit))
    counted = {"refused": lives.refused, "acked_synced": lives.acked, "reads": lives.reads}
    harm = {"lost": lives.lost, "wrong": lives.wrong}
    finish(record_property, "F5 system-calls", lives=lives.runs, **counted, **harm)

"""F11: SIGSTOP of node, client and master for 0.5, 1.1 and 3 lease times, then SIGCONT.

On one host a lease is bound to session and process, not to a time. The unit here, ``LEASE_S``, is
the time after which the others give up what stands still: the quarantine of a client that the node
cannot see, the time limit of every client call, and the silence (two heartbeats) after which the
master counts a node as lost. Of the clients half have their stream cut while they stand still.

A reader whose process the node sees keeps its pins over any stop: its late copy is right. One that
it cannot see has lost them after the quarantine: it discards. A late writer finds its own slots, or
another generation, and then copies nothing; stopped within one copy, a process that the node cannot
see is held back by the quarantine alone. Afterwards everything works again within 5 s plus two
heartbeats, and the space adds up.
"""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable

import pytest
from kvstore.core.types import AckLevel

from tests.faults.columns import SEED, size
from tests.faults.live import (
    HEAL_TIMEOUT_S,
    MIB,
    ClientProcess,
    LiveDaemon,
    LiveMaster,
    LiveNode,
    Observer,
    located,
    until,
)
from tests.faults.load import BLOCK_BYTES, CHAIN_BLOCKS, Load, Worker
from tests.faults.proxy import Proxy
from tests.faults.report import Record, finish

EPISODES = size(30, 100, 1000)
LEASE_S = 0.3
HEARTBEAT_S = LEASE_S / 2
HEALED_S = HEAL_TIMEOUT_S + 2 * HEARTBEAT_S
STOPS = (0.5, 1.1, 3.0)  # lease times
CLIENT = "tests.faults.stopped_client"
VICTIMS = ("node", "reader", "unseen reader", "writer", "unseen writer", "master")
SSD_BYTES = 8 * MIB
SSD_CHAINS = SSD_BYTES // (CHAIN_BLOCKS * BLOCK_BYTES)
DRAM_BLOCKS = 4 * MIB // BLOCK_BYTES


class Bench:
    """Master, node, load and a client to be stopped."""

    def __init__(self, master: LiveMaster, node: LiveNode, load: Load, checker: Worker) -> None:
        self.master = master
        self.node = node
        self.load = load
        self.checker = checker
        self.observer = Observer(node.address)
        self.results: Counter[str] = Counter()
        self.wrong = 0
        self.proxy: Proxy
        self.client: ClientProcess

    async def stop_daemon(self, daemon: LiveDaemon, stop_s: float) -> int:
        """Stops a daemon under load; how many reads were served meanwhile."""
        before = self.load.ledger.reads
        daemon.signal(signal.SIGSTOP)
        await asyncio.sleep(stop_s)
        served = self.load.ledger.reads - before
        daemon.signal(signal.SIGCONT)
        return served

    async def stop_client(self, kind: str, number: int, stop_s: float, *, cut: bool) -> None:
        """Stops a client while it holds slots, and writes all of DRAM over meanwhile."""
        sight = "unseen" if kind.startswith("unseen") else "seen"
        kind = "read" if kind.endswith("reader") else "write"
        self.client.tell(f"{kind} {number} {sight}")
        assert await self.client.hear(2 * HEALED_S) == "holding"
        self.client.signal(signal.SIGSTOP)
        if cut:
            self.proxy.cut()
        await asyncio.sleep(stop_s)
        await self.write_over()
        self.client.tell("go")
        self.client.signal(signal.SIGCONT)
        result = await self.client.hear(2 * HEALED_S)
        self.results[result] += 1
        expected = {"read": "right", "write": "lost" if cut else "committed"}[kind]
        # Within the quarantine both are right: to write all over may outlast what was left of it.
        if (kind, sight) == ("read", "unseen") and (stop_s > LEASE_S or result == "discarded"):
            expected = "discarded"
        self.wrong += result != expected
        assert await self.client.hear(2 * HEALED_S) == "works"

    async def write_over(self) -> None:
        """Puts as many chains as DRAM has room for, and more."""
        goal = self.load.stored + 5 * DRAM_BLOCKS // 4
        while self.load.stored < goal:
            await self.checker.put(self.load.any_chain(), AckLevel.MEMORY)

    async def healed(self) -> None:
        """Everybody reads and writes again, the master knows it, and the space adds up."""
        deadline = time.monotonic() + HEALED_S
        goal = self.load.ledger.reads + 40
        await until(self._reached(goal), HEALED_S, "reads after SIGCONT")
        await self.load.pause(HEALED_S)
        await self.observer.idle(HEALED_S)
        for chain in self.load.recent():
            await self.checker.read(chain)
        chain = self.load.recent()[-1]
        keys = b"".join(self.load.chains[chain])
        await self.checker.put(chain, AckLevel.MEMORY)
        while await located(self.master.address, keys) < CHAIN_BLOCKS:
            assert time.monotonic() < deadline, "the master does not know the node's blocks"
            await asyncio.sleep(0.01)

    def _reached(self, reads: int) -> Callable[[], bool]:
        return lambda: self.load.failed() or self.load.ledger.reads >= reads

    async def episode(self, number: int) -> None:
        """One stop, from a running load to a healed one."""
        victim = VICTIMS[number % len(VICTIMS)]
        stop_s = STOPS[number // len(VICTIMS) % len(STOPS)] * LEASE_S
        self.load.resume()
        if victim == "node":
            await self.stop_daemon(self.node, stop_s)
        elif victim == "master":
            assert await self.stop_daemon(self.master, stop_s), "no reads without the master"
        else:
            cut = victim.startswith("unseen") or number // (len(VICTIMS) * len(STOPS)) % 2 == 0
            await self.stop_client(victim, number, stop_s, cut=cut)
        await self.healed()


@pytest.mark.timeout(size(180, 600, 6000))
async def test_F11_stopped_and_continued(record_property: Record) -> None:
    with LiveMaster("--heartbeat-ms", str(int(1000 * HEARTBEAT_S))) as master:
        master.start()
        flags = ("--master", master.address, "--quarantine-s", str(LEASE_S))
        with LiveNode(*flags, ssd=SSD_BYTES) as node:
            node.start()
            load = Load(node.address, SEED, chains=8 * SSD_CHAINS, window=SSD_CHAINS // 2)
            load.timeout_s = LEASE_S
            bench = Bench(master, node, load, await Worker.connect(load, 10.0))
            await load.start(2, 2)
            async with Proxy(f"{node.home}/proxy.sock", f"{node.home}/node.sock") as bench.proxy:
                address = bench.proxy.address
                async with ClientProcess.running(CLIENT, address) as bench.client:
                    for number in range(EPISODES):
                        if load.harmed or bench.wrong:
                            break
                        await bench.episode(number)
            await load.stop()
    finish(
        record_property,
        "F11 stopped",
        episodes=EPISODES,
        reads=load.ledger.reads,
        **{f"late_{name}": count for name, count in sorted(bench.results.items())},
        lost=load.lost,
        wrong=load.ledger.wrong + load.broken + bench.wrong,
    )
    assert bench.results["discarded"], "late readers must have had something to discard"

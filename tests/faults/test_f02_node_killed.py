"""F2: kill -9 of a node under four writers and four readers, with eviction in both tiers.

What was acknowledged as persisted or synced, and cannot have been evicted since, is found after
every restart; nothing wrong is ever read; the space adds up when idle. A fifth of the kills come
while the node starts.
"""

import asyncio

import pytest

from tests.faults.columns import SEED, size
from tests.faults.live import HEAL_TIMEOUT_S, MIB, LiveNode, Observer, until
from tests.faults.load import BLOCK_BYTES, CHAIN_BLOCKS, Load, Worker
from tests.faults.report import Record, finish

KILLS = size(50, 400, 2000)
READS = size(20_000, 300_000, 3_000_000)
WRITERS = READERS = 4
SSD_BYTES = 8 * MIB
SSD_CHAINS = SSD_BYTES // (CHAIN_BLOCKS * BLOCK_BYTES)
START_S_MAX = 0.6  # a start is killed within this time


async def kill_while_it_starts(node: LiveNode, after_s: float) -> None:
    """The moment is the fault; nothing is waited for."""
    node.spawn()
    await asyncio.sleep(after_s)
    node.kill()


async def check_expected(load: Load, checker: Worker) -> None:
    """Reads everything that must be there."""
    await checker.reconnect()
    for chain in load.expected():
        await checker.read(chain)


@pytest.mark.timeout(size(240, 1800, 14_400))
async def test_F2_node_killed_under_load(record_property: Record) -> None:
    with LiveNode(ssd=SSD_BYTES) as node:
        node.start()
        load = Load(node.address, SEED, chains=8 * SSD_CHAINS, window=SSD_CHAINS // 2)
        observer = Observer(node.address)
        checker = await Worker.connect(load)
        await load.start(WRITERS, READERS)
        kills = evicted = 0
        while kills < KILLS and not load.harmed:
            load.resume()
            left = (READS - load.ledger.reads) // (KILLS - kills)
            goal = load.ledger.reads + load.random.randrange(max(2, left // 2), max(3, left))
            await until(lambda: load.failed() or load.ledger.reads >= goal, 60.0, "reads")  # noqa: B023
            evicted += dict((await observer.stats()).counters).get("evicted_ssd_blocks", 0)
            node.kill()
            kills += 1
            if kills % 5 == 0 and kills < KILLS:
                await kill_while_it_starts(node, load.random.uniform(0, START_S_MAX))
                kills += 1
            await asyncio.to_thread(node.start)
            await load.pause(2 * HEAL_TIMEOUT_S)
            await observer.idle()
            await check_expected(load, checker)
        while load.ledger.reads < READS and not load.harmed:
            await checker.read_one()
        await load.stop()
        await observer.idle()
    finish(
        record_property,
        "F2 node killed",
        kills=kills,
        reads=load.ledger.reads,
        acked=len(load.ledger.acked),
        acked_found=load.held_checks,
        evicted=evicted,
        lost=load.lost,
        wrong=load.ledger.wrong + load.broken,
    )
    assert evicted > SSD_CHAINS, "the load must be more than the SSD tier holds"
    assert load.late == 0

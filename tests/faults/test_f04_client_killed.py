"""F4: clients killed between reserve, copy and commit.

After each, the space of the node is exactly what it was, and what was committed whole; nothing
that was not committed can be seen, and its keys can be stored by others at once.
"""

import asyncio
import os
import random
import signal
import time

import numpy as np
import pytest
from kvstore.core.types import ReserveStatus, Tier
from kvstore_client import AsyncClient, Namespace
from kvstore_proto import common_pb2, node_pb2

from tests.faults.columns import SEED, size
from tests.faults.forked_client import (
    BLOCK_BYTES,
    CHAIN_BLOCKS,
    COMMITTED_BLOCKS,
    FREE_CHAINS,
    SPEC,
    STAGES,
    data_of,
    keys_of,
)
from tests.faults.live import HEAL_TIMEOUT_S, MIB, ClientProcess, LiveNode, Observer
from tests.faults.report import Record, finish

KILLS = size(200, 1000, 5000)
TIER_BYTES = size(16, 48, 240) * MIB  # nothing is ever evicted
VISIBLE = {  # blocks of a chain, by stage; of all others none
    "committing": (0, CHAIN_BLOCKS),
    "committed": (COMMITTED_BLOCKS,),
    "free": (0, CHAIN_BLOCKS),
}
FREE_S_MAX = 0.03  # a child that stores without a pause is killed within this time


class Checker:
    """Kills clients, and looks at what they leave behind."""

    def __init__(self, client: AsyncClient, ns: Namespace, server: ClientProcess) -> None:
        self.random = random.Random(SEED)
        self.stored = 0  # blocks that the dead have committed
        self.wrong = 0
        self._observer = Observer(client.address)
        self._ns = ns
        self._server = server
        self._out = np.empty((CHAIN_BLOCKS, BLOCK_BYTES), np.uint8)

    async def kill_one(self, stage: str, seed: int) -> None:
        """A client comes as far as ``stage``, and is no more."""
        self._server.tell(f"{stage} {seed}")
        pid = int(await self._server.hear())
        if stage == "free":
            await asyncio.sleep(self.random.uniform(0, FREE_S_MAX))
        else:
            await self._look_for(keys_of(seed), stage)
        os.kill(pid, signal.SIGKILL)

    async def check(self, stage: str, seed: int) -> None:
        """Space is back; what is visible is whole, and nothing else is."""
        stats = await self._observer.idle(HEAL_TIMEOUT_S)
        for chain in range(FREE_CHAINS if stage == "free" else 1):
            keys = keys_of(seed, chain)
            found = await self._look_for(keys, stage)
            assert self._ns.match(keys).count == found
            async with self._ns.write(keys) as write:
                free = np.flatnonzero(write.statuses == ReserveStatus.SLOT).tolist()
                assert free == list(range(found, len(keys))), write.statuses
            self.stored += found
        dram = space_of(stats, Tier.DRAM)
        assert dram.blocks == self.stored, f"{dram.blocks} blocks are here, not {self.stored}"
        assert dram.live_bytes == self.stored * BLOCK_BYTES
        assert dram.free_bytes == TIER_BYTES - dram.live_bytes

    async def _look_for(self, keys: list[bytes], stage: str) -> int:
        """Reads what is visible of a chain whose client is, or was killed, at a stage."""
        async with self._ns.read(keys) as read:
            found = read.copy_into(self._out)
        for key, block in zip(keys[:found], self._out, strict=False):
            self.wrong += block.tobytes() != data_of(key)
        self.wrong += found not in VISIBLE.get(stage, (0,))
        return found


def space_of(stats: node_pb2.StatsResponse, wanted: Tier) -> common_pb2.TierUsage:
    """Space of a tier."""
    return next(tier for tier in stats.tiers if int(tier.tier) == wanted)


@pytest.mark.timeout(size(120, 600, 3000))
async def test_F4_client_killed_at_every_stage(record_property: Record) -> None:
    with LiveNode(dram=TIER_BYTES, ssd=TIER_BYTES) as node:
        client = await AsyncClient.connect(node.start(), name="checker")
        ns = await client.open_namespace(SPEC)
        async with ClientProcess.running("tests.faults.forked_client", node.address) as server:
            checker = Checker(client, ns, server)
            for number in range(KILLS):
                if checker.wrong:
                    break
                stage = STAGES[number % len(STAGES)]
                await checker.kill_one(stage, SEED * KILLS + number)
                await checker.check(stage, SEED * KILLS + number)
        deadline = time.monotonic() + HEAL_TIMEOUT_S
        while space_of(await client.stats(), Tier.SSD).blocks != checker.stored:
            assert time.monotonic() < deadline, "what was committed does not get to SSD"
            await asyncio.sleep(0.01)
        await client.close()
    finish(
        record_property,
        "F4 client killed",
        kills=KILLS,
        committed=checker.stored,
        lost=0,
        wrong=checker.wrong,
    )
    assert checker.stored > KILLS

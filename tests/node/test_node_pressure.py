"""A real node whose SSD is slow, stuck, or is given bytes that nobody committed."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from kvstore.core.types import EndReason, ReserveStatus
from kvstore.node.ssd_file import SsdFile

from tests.node.rig import (
    BLOCK_BYTES,
    SYNCED,
    LocalNode,
    RawSession,
    keys_of,
    put_one_corrupt,
    until,
)

MakeNode = Callable[..., LocalNode]
DRAM_BLOCKS = 16
PART = 4


class Gate:
    """The SSD's writes wait here while it is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        write = SsdFile.write

        def gated(file: SsdFile, *arguments: Any) -> None:
            assert self.open.wait(60.0), "the test never let the SSD go on"
            write(file, *arguments)

        monkeypatch.setattr(SsdFile, "write", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def lost(node: LocalNode) -> int:
    counters = node.node.core.counters
    names = ("evicted_without_ssd_blocks", "evicted_not_admitted_blocks", "ssd_given_up_blocks")
    return sum(counters.get(name, 0) for name in names)


async def test_I7_a_burst_of_four_times_dram_loses_nothing(make_node: MakeNode, gate: Gate) -> None:
    node = make_node(dram=DRAM_BLOCKS * BLOCK_BYTES)
    await node.start()
    session = await RawSession.open(node.address)
    chains = [keys_of(PART, seed=n) for n in range(4 * DRAM_BLOCKS // PART)]

    # The SSD is stuck: DRAM fills up, then a writer waits as long as it said, and is refused.
    for keys in chains[: DRAM_BLOCKS // PART]:
        assert len(await session.put(keys)) == PART
    _, refused = await session.reserve(chains[-1], timeout_ms=100)
    assert refused.statuses == bytes([ReserveStatus.FULL] * PART)
    assert node.usage().live_bytes == DRAM_BLOCKS * BLOCK_BYTES
    for keys in chains[: DRAM_BLOCKS // PART]:
        assert (await session.check(keys, timeout_ms=0)).granted == PART

    # One that has more time waits until the SSD goes on; so does everybody behind it.
    waiting = asyncio.create_task(session.put(chains[DRAM_BLOCKS // PART], timeout_ms=30_000))
    await until(lambda: not node.node.core.idle())
    gate.open.set()
    assert len(await waiting) == PART
    for keys in chains[DRAM_BLOCKS // PART + 1 :]:
        assert len(await session.put(keys, timeout_ms=30_000)) == PART

    for keys in chains:
        end = await session.check(keys)
        assert (end.granted, end.reason) == (PART, EndReason.COMPLETE)
    assert lost(node) == 0
    await node.idle()
    await session.goodbye()


async def test_I1_bytes_other_than_those_of_the_commit_are_never_durable(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    keys = keys_of(3)
    assert await put_one_corrupt(session, keys, 1) == bytes([SYNCED, 0, SYNCED])
    end = await session.check(keys)
    assert (end.granted, end.reason) == (1, EndReason.CORRUPT)
    assert node.node.core.counters["commit_corrupt_blocks"] == 1
    ssd = node.node.driver.ssd
    assert ssd is not None
    assert sorted(ssd.index.entries()[0]) == sorted([keys[0], keys[2]])
    assert await session.put(keys, level=SYNCED) == bytes([SYNCED])
    assert (await session.check(keys)).granted == 3
    await node.idle()
    await session.goodbye()

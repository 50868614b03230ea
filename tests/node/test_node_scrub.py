"""The scrubber of a node: it finds what went bad, and nobody waits for it."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kvstore.core.types import Tier
from kvstore.errors import ConfigError
from kvstore.faultpoint import enable_faultpoints
from kvstore.node import scrub, ssd_writer
from kvstore.node.block_reader import BlockReader
from kvstore.node.metrics import node_registry
from kvstore.node.scrub import Scrubber
from kvstore.node.settings import NodeConfig

from tests.node.rig import (
    BLOCK_BYTES,
    SYNCED,
    LocalNode,
    RawSession,
    keys_of,
    put_one_corrupt,
    until,
)

BLOCKS = 16
CORRUPT = 5
MakeNode = Callable[..., LocalNode]


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    yield
    enable_faultpoints({})


async def stored(node: LocalNode, count: int = BLOCKS) -> tuple[RawSession, list[bytes]]:
    """A session, and a chain that is on SSD only."""
    session = await RawSession.open(node.address)
    keys = keys_of(count)
    assert await session.put(keys, level=SYNCED) == bytes([SYNCED] * count)
    effects, _ = node.node.core.evict(Tier.DRAM, b"", 0, False, node.node.driver.now())
    node.node.driver.apply(effects)
    return session, keys


def scrubber_of(node: LocalNode) -> Scrubber:
    assert node.node.scrubber is not None
    return node.node.scrubber


def flip(node: LocalNode, key: bytes) -> None:
    """Changes one bit of a block on the medium."""
    copies, _ = node.node.core.scrub_next(0, 1 << 30)
    place = next(copy.ssd_offset for copy in copies if copy.key == key)
    with open(node.config.ssd_path / "data", "r+b") as file:
        file.seek(place + 77)
        byte = file.read(1)[0]
        file.seek(place + 77)
        file.write(bytes([byte ^ 4]))


async def verifies_all(node: LocalNode) -> bool:
    """As the node has it, and shows it."""
    assert node.node.driver.ssd is not None
    name = "kvstore_node_ssd_verifies_all"
    shown = await asyncio.to_thread(node_registry(node.node).get_sample_value, name)
    assert shown == node.node.driver.ssd.verifies_all
    return bool(shown)


async def test_I1_what_went_bad_on_the_medium_is_dropped(make_node: MakeNode) -> None:
    node = make_node(scrub_mb_s=1e6)
    await node.start()
    session, keys = await stored(node)
    await scrubber_of(node).scrub_all()
    assert node.node.core.counters["scrubbed_blocks"] == BLOCKS
    flip(node, keys[5])
    await scrubber_of(node).scrub_all()
    await node.idle()
    counters = node.node.core.counters
    assert (counters["scrubbed_blocks"], counters["scrub_corrupt_blocks"]) == (2 * BLOCKS, 1)
    assert node.usage(tier=3).blocks == BLOCKS - 1
    end = await session.check(keys)
    assert (end.granted, end.reason) == (5, CORRUPT)
    stats = await session.stats()
    assert stats.counters["scrub_corrupt_blocks"] == 1
    await session.goodbye()


async def test_I1_a_block_in_dram_that_is_not_what_was_committed_goes_too(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sample had it: the scrubber finds it on SSD, and so what is in DRAM is verified."""
    monkeypatch.setattr(ssd_writer, "GROUPS_BEHIND", 0)
    monkeypatch.setattr("random.randrange", lambda _count: 1)
    node = make_node(scrub_mb_s=1e6)
    await node.start()
    session = await RawSession.open(node.address)
    keys = keys_of(3)
    assert await put_one_corrupt(session, keys, 1) == bytes([SYNCED] * 3)
    await scrubber_of(node).scrub_all()
    await node.idle()
    counters = node.node.core.counters
    assert (counters["scrub_corrupt_blocks"], counters["commit_corrupt_blocks"]) == (1, 1)
    assert await verifies_all(node)
    end = await session.check(keys)
    assert (end.granted, end.reason) == (1, CORRUPT)
    await session.goodbye()


async def test_all_are_verified_where_that_is_asked_for(make_node: MakeNode) -> None:
    node = make_node(ssd_write_checks="all")
    await node.start()
    assert await verifies_all(node)


async def test_a_copy_that_was_written_over_meanwhile_is_no_corruption(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(scrub_mb_s=1e6)
    await node.start()
    session, keys = await stored(node)
    outcomes = BlockReader.outcomes
    loop = asyncio.get_running_loop()

    async def purge_and_overwrite() -> None:
        effects, _ = node.node.core.purge(None, node.node.driver.now())
        node.node.driver.apply(effects)
        await node.idle()
        for key in keys:
            ruin(key)

    copies, _ = node.node.core.scrub_next(0, 1 << 30)
    places = {copy.key: copy.ssd_offset for copy in copies}

    def ruin(key: bytes) -> None:
        with open(node.config.ssd_path / "data", "r+b") as file:
            file.seek(places[key])
            file.write(b"another block's")

    def late(reader: BlockReader, run: Any) -> Any:
        asyncio.run_coroutine_threadsafe(purge_and_overwrite(), loop).result(10)
        monkeypatch.setattr(BlockReader, "outcomes", outcomes)
        return outcomes(reader, run)

    monkeypatch.setattr(BlockReader, "outcomes", late)
    await scrubber_of(node).scrub_all()
    counters = node.node.core.counters
    assert counters.get("scrub_corrupt_blocks", 0) == 0
    assert not await verifies_all(node)
    await session.goodbye()


async def test_I1_after_a_corrupt_read_all_writes_are_verified(make_node: MakeNode) -> None:
    node = make_node()
    await node.start()
    session, keys = await stored(node)
    assert not await verifies_all(node)
    flip(node, keys[3])
    assert (await session.check(keys)).granted == 3
    assert await verifies_all(node)
    await session.goodbye()


async def test_a_read_that_fails_once_is_no_reason_to_drop(make_node: MakeNode) -> None:
    node = make_node(scrub_mb_s=1e6)
    await node.start()
    session, keys = await stored(node)
    enable_faultpoints({"KVSTORE_FAULTPOINTS": "ssd.check:eio@1,ssd.check:eio@2"})
    await scrubber_of(node).scrub_all()
    assert (await session.check(keys)).granted == BLOCKS
    await session.goodbye()


async def test_reads_of_clients_do_not_wait_for_it(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(scrub_mb_s=1e6)
    await node.start()
    session, keys = await stored(node)
    stuck, go_on = threading.Event(), threading.Event()
    real = BlockReader.outcomes

    def outcomes(self: BlockReader, run: Any) -> Any:
        stuck.set()
        assert go_on.wait(10)
        return real(self, run)

    monkeypatch.setattr(BlockReader, "outcomes", outcomes)
    task = asyncio.create_task(scrubber_of(node).scrub_all())
    await until(stuck.is_set)
    assert (await session.check(keys)).granted == BLOCKS
    assert node.node.core.counters["ssd_read_blocks"] == BLOCKS
    assert not task.done()
    go_on.set()
    await task
    await session.goodbye()


async def test_it_waits_for_reads_of_clients_but_not_for_ever(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "PATIENCE_S", 0.2)
    node = make_node(scrub_mb_s=1e6)
    await node.start()
    session, _ = await stored(node)
    node.node.driver.reads_idle.clear()
    start = time.monotonic()
    await scrubber_of(node).scrub_all()
    assert time.monotonic() - start >= 0.2
    node.node.driver.reads_idle.set()
    await session.goodbye()


async def test_it_keeps_to_its_rate(make_node: MakeNode) -> None:
    node = make_node(scrub_mb_s=0.5)
    await node.start()
    session, _ = await stored(node)
    start = time.monotonic()
    await scrubber_of(node).scrub_all()
    assert time.monotonic() - start >= BLOCKS * BLOCK_BYTES / 0.5e6
    await session.goodbye()


async def test_it_starts_by_itself_and_shows_when_it_ended(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "START_AFTER_S", 0.01)
    monkeypatch.setattr(scrub, "PASS_EVERY_S", 0.01)
    node = make_node(scrub_mb_s=100.0)
    await node.start()
    session, _ = await stored(node)

    def counted() -> int:
        return node.node.core.counters.get("scrubbed_blocks", 0)

    await until(lambda: counted() >= 3 * BLOCKS)
    registry = node_registry(node.node)
    name = "kvstore_node_scrub_pass_finished_seconds"
    finished = await asyncio.to_thread(registry.get_sample_value, name)
    assert finished == pytest.approx(time.time(), abs=60)
    name = "kvstore_node_scrubbed_blocks_total"
    assert (await asyncio.to_thread(registry.get_sample_value, name) or 0) >= 3 * BLOCKS
    await session.goodbye()


async def test_none_is_asked_for(make_node: MakeNode) -> None:
    node = make_node(scrub_mb_s=0.0)
    await node.start()
    assert node.node.scrubber is None
    registry = node_registry(node.node)
    name = "kvstore_node_scrub_pass_finished_seconds"
    assert await asyncio.to_thread(registry.get_sample_value, name) == 0


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none(rate: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scrub_mb_s"):
        NodeConfig(data_dir=tmp_path, scrub_mb_s=rate)

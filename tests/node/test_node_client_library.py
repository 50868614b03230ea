"""The real client against the real node, where the two could mean different things."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import pytest
from kvstore.core.effects import ReadSsd
from kvstore.core.keys import split_keys
from kvstore.core.types import EndReason, ReserveStatus, Tier
from kvstore.errors import PreconditionError
from kvstore_client import AckLevel, AsyncClient, Namespace

from tests.node.rig import BLOCK_BYTES, SPEC, LocalNode, data_of, keys_of, until

DRAM_BLOCKS = (4 << 20) // BLOCK_BYTES


@pytest.fixture
async def client(node: LocalNode) -> AsyncIterator[AsyncClient]:
    connected = await AsyncClient.connect(node.address, name="test")
    yield connected
    await connected.close()


@pytest.fixture
async def ns(client: AsyncClient) -> Namespace:
    return await client.open_namespace(SPEC)


async def on_ssd_only(node: LocalNode, ns: Namespace, keys: list[bytes]) -> None:
    """Stores blocks and takes them out of DRAM."""
    put = await ns.put(keys, [data_of(key) for key in keys], level=AckLevel.SYNCED)
    assert put.stored == len(keys)
    effects, removal = node.node.core.evict(Tier.DRAM, b"", 0, False, node.node.driver.now())
    node.node.driver.apply(effects)
    assert removal.blocks == len(keys)


async def test_release_before_the_end_means_its_own_range(
    node: LocalNode, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(8)
    await on_ssd_only(node, ns, keys)
    ssd = node.node.driver.ssd
    assert ssd is not None
    held: list[Sequence[ReadSsd]] = []
    submit = ssd.submit_reads
    monkeypatch.setattr(ssd, "submit_reads", held.append)
    lease = await ns.acquire(keys)
    await until(lambda: bool(held))
    lease.release(2, 3)
    await until(lambda: node.node.core.pinned_blocks() == 5)
    monkeypatch.setattr(ssd, "submit_reads", submit)
    for reads in held:
        submit(reads)
    assert await lease.wait() == 8
    assert lease.reason is EndReason.COMPLETE
    assert (lease.offsets >= 0).tolist() == [True, True, False, False, False, True, True, True]
    assert [bytes(lease.blocks[i]) for i in (0, 1, 5, 6, 7)] == [
        data_of(keys[i]) for i in (0, 1, 5, 6, 7)
    ]
    assert lease.still_valid()
    with pytest.raises(PreconditionError, match="released"):
        lease.copy_into(np.empty(8 * BLOCK_BYTES, np.uint8))
    lease.release()
    await until(lambda: node.node.core.pinned_blocks() == 0)
    await node.idle()


async def fill_dram(node: LocalNode, ns: Namespace) -> list[bytes]:
    """Pins every slot; the keys."""
    keys = keys_of(DRAM_BLOCKS, 7)
    assert (await ns.put(keys, [data_of(key) for key in keys])).stored == len(keys)
    await until(node.node.core.idle)
    return keys


async def test_cancelled_reserve_that_waits_for_space_leaves_nothing(
    node: LocalNode, ns: Namespace
) -> None:
    lease = await ns.acquire(await fill_dram(node, ns))
    assert await lease.wait() == DRAM_BLOCKS
    write = ns.write(keys_of(4, 2))
    waiting = asyncio.create_task(write.__aenter__())
    await until(lambda: not node.node.core.idle())
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(node.node.core.idle)
    lease.release()
    await until(lambda: node.node.core.pinned_blocks() == 0)
    assert node.usage().pending_bytes == node.usage().quarantined_bytes == 0
    async with ns.write(keys_of(4, 2)) as again:
        assert again.statuses.tolist() == [ReserveStatus.SLOT] * 4
    await until(lambda: node.usage().pending_bytes == 0)
    await node.idle()


async def test_reserve_cancelled_at_any_moment_leaves_nothing(
    node: LocalNode, ns: Namespace
) -> None:
    """The Abort leaves before the node has read the Reserve, or crosses its answer."""
    lease = None
    for turns in range(60):
        if turns == 30:  # from here on there is no space: the answer waits
            lease = await ns.acquire(await fill_dram(node, ns))
            await lease.wait()
        write = ns.write(keys_of(4, 100 + turns), timeout_s=5.0)
        task = asyncio.create_task(write.__aenter__())
        for _ in range(turns % 30):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await write.__aexit__(None, None, None)
    assert lease is not None
    lease.release()
    await ns.prefetch([b"n" * 32])  # answered behind all that was sent before
    await until(node.node.core.idle)
    assert node.usage().pending_bytes == node.usage().quarantined_bytes == 0
    assert node.node.core.pinned_blocks() == 0
    await node.idle()


async def test_a_durable_put_has_blocks_written_that_admission_passed_over(
    make_node: Callable[..., LocalNode],
) -> None:
    """The level reaches the node with the Reserve, before it says that it has the blocks."""
    node = make_node(dram=16 << 20, ssd=4 << 20, ssd_admission="reuse")
    await node.start()
    async with await AsyncClient.connect(node.address, name="test") as client:
        ns = await client.open_namespace(SPEC)
        wanted, keys = keys_of((4 << 20) // BLOCK_BYTES, seed=1), keys_of(4, seed=2)
        await ns.put(wanted, [data_of(key) for key in wanted], level=AckLevel.SYNCED)
        for _ in range(8):
            async with ns.read(wanted):
                pass

        async def put_and_look(level: AckLevel) -> set[bytes]:
            put = await ns.put(keys, [data_of(key) for key in keys], level=level)
            assert ReserveStatus.FULL not in put.statuses
            await node.idle()
            held = node.node.core.inventory()
            on_ssd = b"".join(part for _, tier, part in held if tier == Tier.SSD)
            return set(keys) & set(split_keys(on_ssd))

        assert not await put_and_look(AckLevel.MEMORY)
        assert await put_and_look(AckLevel.SYNCED) == set(keys)

import numpy as np
from kvstore_client import AckLevel, AsyncClient, EndReason, Namespace, ReserveStatus, Tier

from tests.client.fake_node import FakeNode


def blocks_of(count: int, nbytes: int = 8192, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count * nbytes, dtype=np.uint8)


async def test_what_is_written_is_matched_and_read_back(ns: Namespace) -> None:
    keys = ns.keys(range(20))
    data = blocks_of(5).reshape(5, -1)
    async with ns.write(keys) as write:
        assert write.statuses.tolist() == [ReserveStatus.SLOT] * 5
        for index, view in write.slots:
            view[:] = data[index].data
        levels = await write.commit()
    assert levels.tolist() == [AckLevel.MEMORY] * 5
    match = ns.match([*keys, b"x" * 32])
    assert (match.count, set(match.tiers.tolist())) == (5, {Tier.DRAM})
    async with ns.read(keys) as read:
        assert (read.count, read.reason) == (5, EndReason.COMPLETE)
        assert [bytes(view) for view in read.blocks] == [row.tobytes() for row in data]
        out = np.zeros_like(data)
        assert read.copy_into(out) == 5
    assert np.array_equal(out, data)


async def test_put_and_get_whole_chains(ns: Namespace, node: FakeNode, client: AsyncClient) -> None:
    keys = ns.keys(range(40))
    data = blocks_of(10)
    put = await ns.put(keys, data)
    assert put.stored == 10
    again = await ns.put(keys, data)
    assert set(again.statuses.tolist()) == {ReserveStatus.HAVE}
    assert again.stored == 0
    out = np.zeros_like(data)
    got = await ns.get(keys, out)
    assert (got.count, got.reason) == (10, EndReason.COMPLETE)
    assert np.array_equal(out, data)
    await client.close()
    assert node.pinned == {}
    assert node.open_slots() == 0

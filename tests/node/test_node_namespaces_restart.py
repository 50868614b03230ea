"""Namespaces that a node finds again on SSD, and what it could not read of them."""

import functools
from collections.abc import Callable

import pytest
from kvstore.core.spec import CacheSpec
from kvstore.core.types import CoreConfig
from kvstore.node.ssd_index import SsdIndex

from tests.node.rig import BLOCK_BYTES, SYNCED, LocalNode, RawSession, keys_of

MakeNode = Callable[..., LocalNode]


def index_of(node: LocalNode) -> SsdIndex:
    assert node.node.driver.ssd is not None
    return node.node.driver.ssd.index


async def test_I8_of_too_many_namespaces_on_ssd_those_written_last_are_found_again(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node()
    await node.start()
    sessions = [
        await RawSession.open(node.address, spec=CacheSpec.raw(str(i), block_bytes=BLOCK_BYTES))
        for i in range(5)
    ]
    sessions.sort(key=lambda session: session.root, reverse=True)  # the index lists the last first
    for seed, session in enumerate(sessions):
        assert await session.put(keys_of(1, seed), level=SYNCED) == bytes([SYNCED])
    for session in sessions:
        await session.goodbye()
    await node.stop()
    monkeypatch.setattr(
        "kvstore.node.node.CoreConfig", functools.partial(CoreConfig, namespaces_max=3)
    )
    again = make_node()
    await again.start()
    assert {n.root for n in again.node.core.namespaces()} == {s.root for s in sessions[-3:]}
    assert all(n.spec is not None for n in again.node.core.namespaces())
    assert again.node.core.counters["restored_blocks"] == 3
    await again.idle()


@pytest.mark.parametrize("note", [b"\xff", b""], ids=["no message", "of another root"])
async def test_a_note_that_cannot_be_read_is_made_anew_when_a_client_brings_it(
    make_node: MakeNode, note: bytes
) -> None:
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    await session.put(keys_of(4), level=SYNCED)
    await session.goodbye()
    await node.idle()
    good = index_of(node).namespaces()[session.root]
    assert index_of(node).add_namespace(session.root, note)
    await node.stop()
    again = make_node()
    await again.start()
    session = await RawSession.open(again.address)
    assert (await session.check(keys_of(4))).granted == 4
    assert index_of(again).namespaces() == {session.root: good}
    await session.goodbye()

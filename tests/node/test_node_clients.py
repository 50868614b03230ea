"""What becomes of a client's pins and reservations when it goes, in every way it can go."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.node.rig import (
    BLOCK_BYTES,
    BUSY,
    MEMORY,
    SLOT,
    SPEC,
    LocalNode,
    RawSession,
    hello_message,
    keys_of,
    until,
)

HOLDER = """
import asyncio, sys
sys.path.insert(0, {root!r})
from tests.node.rig import RawSession, keys_of

async def main():
    session = await RawSession.open({address!r}, client_id="holder")
    await session.acquire(keys_of(8, 1))
    await session.reserve(keys_of(16, 2))
    print("holding", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def counts(node: LocalNode) -> tuple[int, int]:
    """(pinned blocks, pending and quarantined bytes)"""
    usage = node.usage()
    return node.node.core.pinned_blocks(), usage.pending_bytes + usage.quarantined_bytes


async def hold(session: RawSession) -> None:
    """Holds 8 pins and 16 reserved slots."""
    await session.put(keys_of(8, 1))
    await session.acquire(keys_of(8, 1))
    await session.reserve(keys_of(16, 2))


async def test_I6_killed_client_gives_its_space_back_at_once(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    await session.put(keys_of(8, 1))
    await until(node.node.core.idle)
    before = node.usage()
    program = HOLDER.format(root=str(Path(__file__).parents[2]), address=node.address)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"holding\n"
    assert counts(node) == (8, 16 * 16384)
    child.kill()
    waited = await until(lambda: counts(node) == (0, 0), timeout_s=1.0)
    assert waited < 1.0
    assert node.usage() == before
    await child.wait()
    await node.idle()


async def test_goodbye_gives_everything_back(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    await hold(session)
    assert counts(node) == (8, 16 * 16384)
    await session.goodbye()
    assert counts(node) == (0, 0)
    await node.idle()


async def test_I4_living_client_without_a_stream_keeps_its_slots(node: LocalNode) -> None:
    session = await RawSession.open(node.address, client_id="me")
    await hold(session)
    await session.lose()
    await until(lambda: node.usage().quarantined_bytes == 16 * 16384)
    other = await RawSession.open(node.address)
    assert counts(node) == (8, 16 * 16384)
    assert (await other.reserve(keys_of(16, 2)))[1].statuses in (
        bytes([BUSY] * 16),
        bytes([SLOT] * 16),
    )
    await other.goodbye()
    again = await RawSession.open(node.address, client_id="me", settled=False)
    assert counts(node) == (8, 16 * 16384)
    await again.goodbye()
    settled = await RawSession.open(node.address, client_id="me", settled=True)
    assert counts(node) == (0, 0)
    await settled.goodbye()
    await node.idle()


async def test_settled_elsewhere_ends_the_older_stream(node: LocalNode) -> None:
    old = await RawSession.open(node.address, client_id="me")
    await hold(old)
    await RawSession.open(node.address, client_id="me", settled=True)
    assert counts(node) == (0, 0)
    await until(lambda: node.node.clients.open_count == 1)


@pytest.mark.parametrize("quarantine_s", [0.0, 0.3])
async def test_unseen_process_is_quarantined_for_a_while(
    make_node: Callable[..., LocalNode], quarantine_s: float
) -> None:
    node = make_node(quarantine_s=quarantine_s)
    await node.start()
    session = await RawSession.open(node.address, pid=0)
    await hold(session)
    start = asyncio.get_running_loop().time()
    await session.lose()
    await until(lambda: counts(node) == (0, 0))
    assert asyncio.get_running_loop().time() - start >= quarantine_s
    await node.idle()


async def test_process_that_ends_before_its_stream(node: LocalNode) -> None:
    """Its stream lives on here, as in a child that shares the mapping."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=subprocess.PIPE
    )
    from kvstore.node.process_watch import start_ticks

    hello = hello_message(pid=child.pid, process_start_ticks=start_ticks(child.pid))
    session = await RawSession.open(
        node.address, pid=hello.pid, process_start_ticks=hello.process_start_ticks
    )
    await hold(session)
    child.kill()
    await child.wait()
    await session.put(keys_of(2, 3))
    assert counts(node) == (8, 16 * 16384)
    await session.lose()
    await until(lambda: counts(node) == (0, 0), timeout_s=1.0)


async def test_I7_lost_sessions_that_hold_nothing_are_no_more(
    make_node: Callable[..., LocalNode],
) -> None:
    node = make_node(sessions_max=4)
    await node.start()
    for _ in range(40):  # more than the node keeps, open and lost together
        session = await RawSession.open(node.address)
        await session.lose()
        await until(lambda: node.node.clients.open_count == 0)
    await (await RawSession.open(node.address)).goodbye()


async def test_I7_process_that_never_settles_takes_no_session_from_others(
    make_node: Callable[..., LocalNode],
) -> None:
    node = make_node(sessions_max=32)
    await node.start()
    ids = iter(range(1000))
    refused: list[grpc.aio.AioRpcError] = []
    for _ in range(200):  # the node keeps 128, open and lost together
        session = RawSession(node.address)
        name = f"client-{next(ids)}"
        try:
            response = await session.call(hello=hello_message(client_id=name))
        except grpc.aio.AioRpcError as error:
            refused.append(error)
        else:
            session.welcome = response.welcome
            await session.open_namespace(SPEC)
            await session.reserve(keys_of(1, next(ids)))
        await session.lose()
        await until(lambda: node.node.clients.open_count == 0)
    assert len(refused) == 198
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert "settle" in (refused[0].details() or "")
    other = await RawSession.open(node.address, pid=0, client_id="other")
    assert await other.put(keys_of(2, 5000)) == bytes([MEMORY] * 2)
    await other.goodbye()
    back = await RawSession.open(node.address, client_id="client-0", settled=True)
    assert node.usage().quarantined_bytes == BLOCK_BYTES
    await back.goodbye()
    await (await RawSession.open(node.address)).goodbye()

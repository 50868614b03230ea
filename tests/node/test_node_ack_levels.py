"""The levels of an acknowledgement: chosen for each write, reported for each block, and kept.

Power loss, which ``synced`` survives, is tests/faults/test_f06_power_loss.py.
"""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from kvstore.faultpoint import enable_faultpoints

from tests.node.rig import (
    MEMORY,
    PERSISTED,
    SYNCED,
    Daemon,
    LocalNode,
    RawSession,
    keys_of,
)

WRITER = """
import sys
from kvstore_client import Client
from tests.node.rig import SPEC, data_of, keys_of
namespace = Client.connect(sys.argv[1]).open_namespace(SPEC)
keys = keys_of(4)
print(*namespace.put(keys, [data_of(key) for key in keys]).levels, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    yield
    enable_faultpoints({})


async def test_I3_memory_outlives_kill_9_of_the_client(node: LocalNode) -> None:
    command = [sys.executable, "-c", WRITER, node.address]
    client = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    assert await client.stdout.readline() == b"1 1 1 1\n"
    client.kill()
    await client.wait()
    session = await RawSession.open(node.address)
    assert (await session.check(keys_of(4))).granted == 4
    await session.goodbye()


@pytest.mark.parametrize("level", [PERSISTED, SYNCED])
async def test_I3_persisted_outlives_kill_9_of_the_node(
    make_daemon: Callable[..., Daemon], level: int
) -> None:
    daemon = make_daemon()
    daemon.wait_ready()
    session = await RawSession.open(daemon.address)
    keys = keys_of(8)
    assert await session.put(keys, level=level) == bytes([SYNCED] * 8), "reached together"
    daemon.kill()
    await session.lose()
    make_daemon().wait_ready()
    session = await RawSession.open(daemon.address)
    assert (await session.check(keys)).granted == 8
    await session.goodbye()


async def test_I3_the_level_is_chosen_for_each_write(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    assert await session.put(keys_of(2, 1)) == bytes([MEMORY] * 2)
    assert await session.put(keys_of(2, 2), level=MEMORY) == bytes([MEMORY] * 2)
    assert await session.put(keys_of(2, 3), level=SYNCED) == bytes([SYNCED] * 2)
    await session.goodbye()


async def test_I3_a_write_that_the_disk_refuses_says_memory(
    make_node: Callable[..., LocalNode],
) -> None:
    node = make_node(ssd=1 << 20)
    await node.start()
    session = await RawSession.open(node.address)
    enable_faultpoints({"KVSTORE_FAULTPOINTS": ",".join(f"ssd.data:eio@{n}" for n in range(1, 4))})
    first = await session.put(keys_of(1, 1), level=SYNCED)
    assert first == bytes([MEMORY]), "the disk refused it three times"
    assert await session.put(keys_of(1, 2), level=SYNCED) == bytes([SYNCED])
    await session.goodbye()


async def test_I3_a_node_without_ssd_answers_memory(make_node: Callable[..., LocalNode]) -> None:
    node = make_node(ssd=0)
    await node.start()
    session = await RawSession.open(node.address)
    for level in (PERSISTED, SYNCED):
        assert await session.put(keys_of(2, level), level=level) == bytes([MEMORY] * 2)
    await session.goodbye()

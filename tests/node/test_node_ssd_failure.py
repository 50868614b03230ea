"""An SSD that fails under a running node: what is acknowledged, what goes on, and who hears."""

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvstore.core.types import Tier
from kvstore.faultpoint import enable_faultpoints
from kvstore.node.metrics import node_registry
from kvstore.node.serving import SSD_SERVICE_NAME

from tests.node.rig import (
    BLOCK_BYTES,
    MEMORY,
    SYNCED,
    TIMEOUT_S,
    Daemon,
    LocalNode,
    RawSession,
    keys_of,
    until,
)

MakeNode = Callable[..., LocalNode]


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    yield
    enable_faultpoints({})


def arm(faults: str) -> None:
    enable_faultpoints({"KVSTORE_FAULTPOINTS": faults})


def forget_dram(node: LocalNode) -> None:
    """Leaves in DRAM only what is nowhere else."""
    effects, _ = node.node.core.evict(Tier.DRAM, b"", 0, False, node.node.driver.now())
    node.node.driver.apply(effects)


async def test_I3_F7_after_a_failed_fdatasync_dram_goes_on(make_node: MakeNode) -> None:
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    before, after = keys_of(8, 1), keys_of(8, 2)
    assert await session.put(before, level=SYNCED) == bytes([SYNCED] * 8)
    assert (await session.stats()).problems == []
    arm("ssd.sync:eio")
    assert await session.put(after, level=SYNCED) == bytes([MEMORY] * 8)
    assert await session.put(keys_of(8, 3), level=SYNCED) == bytes([MEMORY] * 8)
    [problem] = (await session.stats()).problems
    assert "SSD takes no more writes (fdatasync" in problem
    assert "restart the node" in problem
    name = "kvstore_node_ssd_failed"
    assert await asyncio.to_thread(node_registry(node.node).get_sample_value, name) == 1
    await node.idle()
    forget_dram(node)
    assert (await session.check(before)).granted == 8, "what was synced before is read"
    assert (await session.check(after)).granted == 8, "what is in DRAM is served"
    await session.goodbye()
    await node.stop()
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    assert (await session.stats()).problems == []
    assert (await session.check(before)).granted == 8
    assert (await session.check(after)).granted == 0, "never acknowledged as synced"
    assert await session.put(after, level=SYNCED) == bytes([SYNCED] * 8)
    await session.goodbye()


async def test_I3_F7_nothing_acknowledged_is_lost_whichever_sync_fails(
    make_node: MakeNode,
) -> None:
    acknowledged: list[list[bytes]] = []
    for cycle in range(1, 11):
        node = make_node()
        await node.start()
        session = await RawSession.open(node.address)
        for chain in acknowledged:
            assert (await session.check(chain)).granted == len(chain)
        arm(f"ssd.sync:eio@{cycle}")
        levels = []
        for number in range(cycle + 1):
            chain = keys_of(2, 100 * cycle + number)
            levels.append(set(await session.put(chain, level=SYNCED)))
            if levels[-1] == {SYNCED}:
                acknowledged.append(chain)
        assert levels[-1] == {MEMORY}, "nothing is acknowledged after the failure"
        assert node.node.problems()
        enable_faultpoints({})
        await session.goodbye()
        await node.stop()
    assert len(acknowledged) >= 10
    print(f"F7 fsync-eio: cycles=10 acked_synced={2 * len(acknowledged)} lost=0 wrong=0")


@pytest.mark.parametrize("code", ["eio", "enospc"])
async def test_one_write_that_fails_is_tried_again_elsewhere(
    make_node: MakeNode, code: str
) -> None:
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    for number in range(3):
        arm(f"ssd.data:{code}@1,ssd.data:{code}@2")  # the run, and then a block of it alone
        keys = keys_of(8, number)
        assert await session.put(keys, level=SYNCED) == bytes([SYNCED] * 8)
    assert node.node.core.counters["ssd_write_errors"] >= 3
    assert node.node.problems() == []
    forget_dram(node)
    assert (await session.check(keys)).granted == 8
    await node.idle()
    await session.goodbye()


async def test_I3_without_an_index_a_full_node_goes_on_in_dram(make_node: MakeNode) -> None:
    node = make_node(ssd=15 * BLOCK_BYTES)  # too small for space to be freed ahead
    await node.start()
    session = await RawSession.open(node.address)
    assert await session.put(keys_of(15), level=SYNCED) == bytes([SYNCED] * 15)
    arm("ssd.index:eio")
    for number in range(2, 5):
        keys = keys_of(8, number)
        assert await session.put(keys, level=SYNCED) == bytes([MEMORY] * 8)
    for number in range(5, 13):  # more than DRAM has
        keys = keys_of(32, number)
        # Writes that are about to fail hold their blocks for a moment.
        assert await session.put(keys, timeout_ms=5000) == bytes([MEMORY] * 32)
        assert (await session.check(keys)).granted == 32
    await session.goodbye()


async def test_F8_an_index_without_room_heals(make_node: MakeNode) -> None:
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    keys = keys_of(4)
    arm(",".join(f"ssd.index:enospc@{n}" for n in range(1, 5)))
    assert await session.put(keys, level=SYNCED) == bytes([MEMORY] * 4)
    [problem] = node.node.problems()
    assert "no room" in problem
    assert str(node.config.ssd_path) in problem
    assert (await session.check(keys)).granted == 4
    enable_faultpoints({})
    later = keys_of(4, 2)
    assert await session.put(later, level=SYNCED) == bytes([SYNCED] * 4)
    assert node.node.problems() == []
    await node.idle()
    await session.goodbye()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_F8_a_full_disk_costs_no_block_and_heals(
    make_node: MakeNode, small_disk: Path
) -> None:
    node = make_node(ssd=3 << 20, ssd_dir=str(small_disk / "ssd"))
    await node.start()
    session = await RawSession.open(node.address)
    before = keys_of(8)
    assert await session.put(before, level=SYNCED) == bytes([SYNCED] * 8)
    filler = small_disk / "filler"
    seed, levels = 2, {SYNCED}
    room = os.statvfs(small_disk)
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize))
    while levels == {SYNCED}:  # the index has some free pages of its own
        assert seed < 40, "the index never had no room"
        levels = set(await session.put(keys_of(4, seed), level=SYNCED))
        seed += 1
    assert levels == {MEMORY}
    assert "no room" in node.node.problems()[0]
    assert node.node.driver.ssd is not None
    assert not node.node.driver.ssd.failed
    forget_dram(node)
    assert (await session.check(before)).granted == 8
    filler.unlink()
    assert await session.put(keys_of(4, 1000), level=SYNCED) == bytes([SYNCED] * 4)
    assert node.node.problems() == []
    await node.idle()
    await session.goodbye()
    await node.stop()


async def test_health_and_log_show_it(
    make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_FAULTPOINTS", "ssd.sync:eio@2")
    daemon = make_daemon()
    daemon.wait_ready()
    session = await RawSession.open(daemon.address)
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def status(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return int((await health.Check(request)).status)

        async def becomes(service: str, expected: int) -> None:
            async with asyncio.timeout(TIMEOUT_S):
                request = health_pb2.HealthCheckRequest(service=service)
                async for response in health.Watch(request):
                    if response.status == expected:
                        return

        serving = health_pb2.HealthCheckResponse
        await becomes(SSD_SERVICE_NAME, serving.SERVING)
        assert await session.put(keys_of(2, 1), level=SYNCED) == bytes([SYNCED] * 2)
        assert await session.put(keys_of(2, 2), level=SYNCED) == bytes([MEMORY] * 2)
        await becomes(SSD_SERVICE_NAME, serving.NOT_SERVING)
        assert await status("kvstore.v1.Node") == serving.SERVING
        assert await status("") == serving.SERVING
    await session.goodbye()
    code, errors = daemon.stop()
    assert code == 0
    assert errors.count("SSD tier takes no more writes until the node is restarted") == 1


async def test_the_master_hears_of_it(make_node: MakeNode) -> None:
    node = make_node()
    await node.start()
    assert list(node.node.link._reports.heartbeat().heartbeat.problems) == []
    arm("ssd.sync:eio")
    session = await RawSession.open(node.address)
    await session.put(keys_of(1))
    await until(lambda: bool(node.node.problems()))
    assert list(node.node.link._reports.heartbeat().heartbeat.problems) == node.node.problems()
    await session.goodbye()

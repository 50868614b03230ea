"""The connector core with a real node: kills in the middle, reasons, what the node holds."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from kvstore.core.keys import block_keys, namespace_root
from kvstore_client import Client
from kvstore_connector.store import node_connect
from kvstore_proto import common_pb2

from tests.connector.daemons import NodeProcess
from tests.connector.rig import SPEC, Rig, wait_until

KEYS = block_keys(namespace_root(SPEC), list(range(4 * 12)), 4)


@pytest.fixture
def node() -> Iterator[NodeProcess]:
    """A node with a little DRAM."""
    node = NodeProcess(dram="4MiB")
    yield node
    node.close()


def dram_usage(observer: Client) -> common_pb2.TierUsage:
    (dram,) = [tier for tier in observer.stats().tiers if tier.tier == common_pb2.TIER_DRAM]
    return dram


def real_rig(node: NodeProcess) -> Rig:
    return Rig(connect=node_connect(node.address, "tests", 10.0))


def test_I2_I6_an_engine_killed_in_a_save_leaves_nothing_behind(node: NodeProcess) -> None:
    command = [sys.executable, "-m", "tests.connector.victim", node.address, "5"]
    with (
        subprocess.Popen(
            [*command, *[key.hex() for key in KEYS]], stdout=subprocess.PIPE, text=True
        ) as victim,
        Client.connect(node.address) as observer,
    ):
        assert victim.stdout is not None
        assert victim.stdout.readline() == "halfway\n"
        assert dram_usage(observer).pending_bytes > 0
        victim.kill()
        killed_s = time.monotonic()

        def settled() -> bool:
            dram = dram_usage(observer)
            held = dram.pending_bytes + dram.quarantined_bytes
            return not held and dram.free_bytes + dram.live_bytes == dram.capacity_bytes

        wait_until(settled, timeout_s=5)
        assert time.monotonic() - killed_s < 1
    rig = real_rig(node)
    result = rig.load(KEYS)
    assert (result.blocks, result.end_reason) == (5, "never_stored")
    assert rig.right(KEYS[:5])
    rig.core.close()


def test_blocks_survive_the_engine_that_saved_them(node: NodeProcess) -> None:
    first = real_rig(node)
    first.save(KEYS)
    first.wait(pages=12)
    first.core.close()
    second = real_rig(node)
    assert second.load(KEYS).blocks == 12
    assert second.right(KEYS)
    second.core.close()


def test_an_evicted_block_says_so(node: NodeProcess) -> None:
    rig = real_rig(node)
    rig.save(KEYS)
    rig.wait(pages=12)
    for seed in range(1, 200):
        keys = rig.keys(12, seed=seed)
        rig.save(keys)
        rig.wait(pages=12 * (seed + 1))
        rig.core.on_request("r", KEYS)
        if rig.core.match("r", 0)[0] < 12:
            break
        rig.core.request_finished("r")
    found, _ = rig.core.match("r", 0)
    if found:
        assert rig.load(KEYS).end_reason == "evicted"
    wait_until(lambda: rig.core.end_reason("r") == "evicted")
    rig.core.close()

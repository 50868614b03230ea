"""Promises as metrics: what would have broken one, and what an audit finds broken."""

import asyncio
from collections.abc import Callable

import pytest
from kvstore.core.types import Tier
from kvstore.errors import StaleEpochError
from kvstore.node import auditor
from kvstore.node.metrics import node_registry
from prometheus_client import CollectorRegistry, generate_latest

from tests.node.rig import SYNCED, LocalNode, RawSession, keys_of, until


async def lines(registry: CollectorRegistry) -> list[str]:
    return (await asyncio.to_thread(generate_latest, registry)).decode().splitlines()


async def test_I6_accounts_are_a_metric_and_balance(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    await session.put(keys_of(8), level=SYNCED)
    await session.reserve(keys_of(3, 2))
    acquired, _, _ = await session.acquire(keys_of(8)[:2])
    node.node.auditor.check()
    shown = await lines(node_registry(node.node))
    assert 'kvstore_node_space_imbalance_bytes{tier="dram"} 0.0' in shown
    assert 'kvstore_node_space_imbalance_bytes{tier="ssd"} 0.0' in shown
    assert 'kvstore_node_promise_broken_total{promise="I6"} 0.0' in shown
    assert 'kvstore_node_promise_broken_total{promise="I4"} 0.0' in shown
    assert acquired
    await session.goodbye()


async def test_I6_an_idle_node_finds_what_does_not_add_up(
    make_node: Callable[..., LocalNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor, "EVERY_S", 0.01)
    node = make_node()
    await node.start()
    registry = node_registry(node.node)
    node.node.core._blocks.dram.pending_bytes += 4096
    await until(lambda: node.node.auditor.broken["I6"] > 0)
    shown = await lines(registry)
    assert 'kvstore_node_space_imbalance_bytes{tier="dram"} 8192.0' in shown
    node.node.core._blocks.dram.pending_bytes -= 4096
    await until(lambda: not node.node.auditor.imbalance_bytes[Tier.DRAM])


async def test_I4_a_lease_of_nothing_is_found(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    await session.put(keys_of(1))
    blocks = node.node.core._blocks
    row = int(blocks.table.lookup(keys_of(1))[0])
    await session.acquire(keys_of(1))
    state = int(blocks.table.dram_state[row])
    blocks.table.dram_state[row] = 0
    on_ssd = int(blocks.table.ssd_state[row])
    blocks.table.ssd_state[row] = 0
    node.node.auditor.check()
    blocks.table.dram_state[row], blocks.table.ssd_state[row] = state, on_ssd
    assert node.node.auditor.broken["I4"] == 1
    await session.goodbye()


async def test_I5_a_refused_order_is_counted(node: LocalNode) -> None:
    node.node.core.epoch.admit(3)
    with pytest.raises(StaleEpochError):
        node.node.core.epoch.admit(2)
    shown = await lines(node_registry(node.node))
    assert 'kvstore_node_promise_guarded_total{promise="I5"} 1.0' in shown
    assert 'kvstore_node_promise_guarded_total{promise="I1"} 0.0' in shown

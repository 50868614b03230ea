import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from kvstore.errors import UnavailableError
from kvstore_client import AckLevel, AsyncClient, CacheSpec, EndReason, Namespace, Tier
from kvstore_client.session import Session
from kvstore_proto import common_pb2, node_pb2

from tests.cli.store import Store, running, short_directory
from tests.node.rig import Daemon

REPOSITORY = Path(__file__).parents[2]
BLOCK = 8192


@pytest.fixture
def hold(daemon: Daemon) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts processes that hold blocks, and ends them."""
    started: list[subprocess.Popen[str]] = []

    def start(mode: str) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("holder.py")
        process = subprocess.Popen(
            [sys.executable, str(script), daemon.address, mode], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def data_of(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, BLOCK), dtype=np.uint8)


def dram(stats: node_pb2.StatsResponse) -> common_pb2.TierUsage:
    """Space of the DRAM tier, which has to add up."""
    usage = next(tier for tier in stats.tiers if tier.tier == common_pb2.TIER_DRAM)
    parts = (usage.free_bytes, usage.live_bytes, usage.pending_bytes, usage.quarantined_bytes)
    assert sum(parts) == usage.capacity_bytes
    return usage


async def until(client: AsyncClient, good: Callable[[node_pb2.StatsResponse], bool]) -> None:
    """Asks for statistics until they are as they should be."""
    async with asyncio.timeout(1.0):
        while not good(await client.stats()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def opened(client: AsyncClient, spec: CacheSpec) -> tuple[Namespace, list[bytes]]:
    ns = await client.open_namespace(spec)
    return ns, ns.keys(range(64))


async def test_put_match_get_with_a_real_node(daemon: Daemon, spec: CacheSpec) -> None:
    data = data_of(16)
    async with await AsyncClient.connect(daemon.address) as client:
        ns, keys = await opened(client, spec)
        put = await ns.put(keys, data, level=AckLevel.SYNCED)
        assert put.levels.tolist() == [AckLevel.SYNCED] * 16
        match = ns.match([*keys, b"x" * 32])
        assert (match.count, set(match.tiers.tolist())) == (16, {Tier.DRAM})
        out = np.zeros_like(data)
        got = await ns.get([*keys, b"x" * 32], out)
        assert (got.count, got.reason) == (16, EndReason.NEVER_STORED)
        assert np.array_equal(out, data)
        assert (await ns.put(keys, data)).stored == 0
        assert await ns.prefetch(keys) == 0
        await until(client, lambda stats: stats.pinned_blocks == 0)
        assert dram(await client.stats()).pending_bytes == 0


async def test_more_than_dram_is_read_back_from_ssd(daemon: Daemon, spec: CacheSpec) -> None:
    count = (8 << 20) // BLOCK  # twice the DRAM tier
    data = data_of(count)
    async with await AsyncClient.connect(daemon.address, timeout_s=20) as client:
        ns = await client.open_namespace(spec)
        chains = [ns.keys([seed] * (128 * 4)) for seed in range(count // 128)]
        for number, keys in enumerate(chains):
            put = await ns.put(keys, data[128 * number : 128 * number + 128])
            assert put.stored == 128
        for number, keys in enumerate(chains):
            out = np.zeros((128, BLOCK), dtype=np.uint8)
            got = await ns.get(keys, out)
            assert (got.count, got.reason) == (128, EndReason.COMPLETE)
            assert np.array_equal(out, data[128 * number : 128 * number + 128])


async def test_I6_a_reader_killed_with_pins_gives_them_back(
    daemon: Daemon, spec: CacheSpec, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    async with await AsyncClient.connect(daemon.address) as client:
        ns, keys = await opened(client, spec)
        await ns.put(keys, data_of(16))
        holder = hold("read")
        assert holder.stdout is not None
        assert await asyncio.to_thread(holder.stdout.readline) == "16\n"
        assert (await client.stats()).pinned_blocks == 16
        holder.kill()
        await until(client, lambda stats: stats.pinned_blocks == 0)


async def test_I2_what_a_killed_writer_had_not_committed_is_never_seen(
    daemon: Daemon, spec: CacheSpec, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    async with await AsyncClient.connect(daemon.address) as client:
        holder = hold("write")
        assert holder.stdout is not None
        assert await asyncio.to_thread(holder.stdout.readline) == "14\n"
        assert dram(await client.stats()).pending_bytes == 14 * BLOCK
        ns, keys = await opened(client, spec)
        assert ns.match(keys).count == 2
        holder.kill()
        await until(client, lambda stats: dram(stats).pending_bytes == 0)
        async with ns.read(keys, timeout_s=0) as read:
            assert (read.count, read.reason) == (2, EndReason.NEVER_STORED)
        put = await ns.put(keys, data_of(16))
        assert put.stored == 14


async def test_I4_views_outlive_a_killed_node(daemon: Daemon, spec: CacheSpec) -> None:
    data = data_of(16)
    lost = asyncio.Event()
    client = await AsyncClient.connect(
        daemon.address, timeout_s=5, on_lost=lambda error: lost.set()
    )
    ns, keys = await opened(client, spec)
    await ns.put(keys, data, level=AckLevel.PERSISTED)
    lease = await ns.acquire(keys)
    assert await lease.wait() == 16
    daemon.kill()
    await asyncio.wait_for(lost.wait(), 5)
    out = np.zeros_like(data)
    assert lease.copy_into(out) == 16
    assert np.array_equal(out, data)
    with pytest.raises(UnavailableError):
        ns.match(keys)
    lease.release()

    again = Daemon(daemon.folder)
    try:
        again.wait_ready()
        await client.reconnect()
        assert ns.match(keys).tiers.tolist() == [Tier.SSD] * 16
        out[:] = 0
        assert (await ns.get(keys, out)).count == 16
        assert np.array_equal(out, data)
        await client.close()
    finally:
        again.kill()


async def test_I1_no_call_comes_between_the_old_memory_and_the_new_session(
    daemon: Daemon, spec: CacheSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = asyncio.Event()
    client = await AsyncClient.connect(daemon.address, timeout_s=5, on_lost=lambda _: lost.set())
    ns, keys = await opened(client, spec)
    await ns.put(keys, data_of(16))
    daemon.kill()
    await asyncio.wait_for(lost.wait(), 5)
    again = Daemon(daemon.folder)
    try:
        again.wait_ready()
        ask, asked = ns.ask, []

        async def ask_and_try(session: Session) -> node_pb2.NamespaceOpened:
            answer = await ask(session)
            asked.append(session.lost)
            assert client.closed
            for call in (ns.get(keys, np.zeros(16 * BLOCK, np.uint8)), ns.put(keys, data_of(16))):
                with pytest.raises(UnavailableError):
                    await call
            return answer

        monkeypatch.setattr(ns, "ask", ask_and_try)
        await client.reconnect()
        assert asked == [None]
        data = data_of(16)[::-1].copy()
        others = ns.keys(np.arange(16 * spec.block_tokens, dtype=np.uint32) + 7)
        assert (await ns.put(others, data)).stored == 16
        out = np.zeros_like(data)
        assert (await ns.get(others, out)).count == 16
        assert np.array_equal(out, data)
        await client.close()
    finally:
        again.kill()


async def test_a_lease_of_nothing_does_not_keep_a_client_from_reconnecting(
    daemon: Daemon, spec: CacheSpec
) -> None:
    lost = asyncio.Event()
    client = await AsyncClient.connect(daemon.address, on_lost=lambda _: lost.set())
    ns, _ = await opened(client, spec)
    daemon.process.send_signal(signal.SIGSTOP)
    lease = await ns.acquire([])
    daemon.kill()
    await asyncio.wait_for(lost.wait(), 5)
    lease.release()
    again = Daemon(daemon.folder)
    try:
        again.wait_ready()
        await client.reconnect()
        await client.close()
    finally:
        again.kill()


async def test_a_lost_stream_gives_all_back_when_the_client_settles(
    daemon: Daemon, spec: CacheSpec
) -> None:
    async with (
        await AsyncClient.connect(daemon.address) as client,
        await AsyncClient.connect(daemon.address) as watcher,
    ):
        ns, keys = await opened(client, spec)
        write = await ns.write(keys).__aenter__()
        client.session._stream.cancel()
        await until(watcher, lambda stats: dram(stats).quarantined_bytes == 16 * BLOCK)
        assert dram(await watcher.stats()).pending_bytes == 0
        await write.__aexit__(None, None, None)
        await client.reconnect()
        await until(watcher, lambda stats: dram(stats).quarantined_bytes == 0)
        assert (await ns.put(keys, data_of(16))).stored == 16


@pytest.mark.parametrize("name", ["put_get", "prefetch"])
def test_an_example_without_an_address_says_how_it_is_used(name: str) -> None:
    script = REPOSITORY / "examples" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"usage: python {script} ADDRESS, as `kvstore up` prints it\n"


@pytest.fixture
def store() -> Iterator[Store]:
    """`kvstore up` with room for the examples."""
    options = ("--dram", "40MiB", "--ssd", "64MiB")
    with short_directory() as data_dir, running(data_dir, *options) as started:
        yield started


def example(store: Store, name: str) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / f"{name}.py"), store.endpoints["node"]],
        env=os.environ | {"KVSTORE_MASTER": store.endpoints["master"]},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_run(store: Store) -> None:
    assert example(store, "put_get") == "stored: 16\nfound: 16 equal: True\n"
    assert example(store, "put_get") == "stored: 0\nfound: 16 equal: True\n"
    for _ in range(2):
        said = example(store, "prefetch")
        assert said.count("32 loads started") == 4
        assert said.count("32 of 32 blocks; the chain ended: <EndReason.COMPLETE: 1>") == 4

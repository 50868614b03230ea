"""Input that nobody sends by accident: malformed messages, impossible numbers, a damaged index."""

import asyncio
import logging
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import lmdb
import pytest
from kvstore.core.spec import CacheSpec
from kvstore.core.ssd_record import HEAD_BYTES
from kvstore.errors import ConfigError
from kvstore.node.settings import NodeConfig
from kvstore.node.ssd_index import SsdIndex
from kvstore_proto import node_pb2

from tests.node.rig import (
    BLOCK_BYTES,
    SPEC,
    SYNCED,
    LocalNode,
    RawSession,
    hello_message,
    keys_of,
)

NUMBERS = struct.Struct("<QQQ")  # of a record: nbytes, offset, sequence
NUMBERS_AT = HEAD_BYTES - 8 - NUMBERS.size


@pytest.mark.parametrize("pid", [2**31, 2**32 - 1])
async def test_I11_a_pid_that_cannot_be_leaves_no_session_behind(node: LocalNode, pid: int) -> None:
    session = RawSession(node.address)
    response = await session.call(hello=hello_message(pid=pid, client_id="impossible"))
    assert response.WhichOneof("response") == "welcome"
    assert node.node.clients.open_count == 1
    await session.goodbye()
    assert node.node.clients.open_count == 0


@pytest.mark.parametrize("method", ["Stats", "Session"])
async def test_I11_bytes_that_are_no_message_are_refused_without_noise(
    node: LocalNode, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with grpc.aio.insecure_channel(node.address) as channel:
        path = f"/kvstore.v1.Node/{method}"
        unary: Any = channel.unary_unary(path)
        stream: Any = channel.stream_stream(path)
        call = stream(iter([b"\xff\xff\xff"])) if method == "Session" else unary(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call.read() if method == "Session" else call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not caplog.records


@pytest.mark.parametrize("quarantine_s", [math.nan, math.inf, -1.0])
def test_a_quarantine_without_end_is_refused(tmp_path: Path, quarantine_s: float) -> None:
    with pytest.raises(ConfigError, match="quarantine_s"):
        NodeConfig(data_dir=tmp_path, quarantine_s=quarantine_s)


def rewrite_records(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes every second record of an SSD index."""
    env = lmdb.open(str(folder / "index"), max_dbs=3, map_size=1 << 28)
    table = env.open_db(b"blocks")
    with env.begin(write=True, db=table) as txn:
        for key, value in list(txn.cursor())[::2]:
            txn.put(key, change(bytes(value)))
    env.close()


@pytest.mark.parametrize("number", [0, 1, 2], ids=["nbytes", "offset", "sequence"])
async def test_I8_a_record_with_an_impossible_number_is_dropped(
    tmp_path: Path, number: int
) -> None:
    def change(record: bytes) -> bytes:
        numbers = list(NUMBERS.unpack_from(record, NUMBERS_AT))
        numbers[number] = 2**64 - 1
        end = NUMBERS_AT + NUMBERS.size
        return record[:NUMBERS_AT] + NUMBERS.pack(*numbers) + record[end:]

    keys = keys_of(8)
    first = LocalNode(tmp_path)
    await first.start()
    session = await RawSession.open(first.address)
    assert await session.put(keys, level=SYNCED) == bytes([SYNCED] * 8)
    await session.goodbye()
    await first.stop()
    rewrite_records(first.config.ssd_path, change)

    second = LocalNode(tmp_path)
    await second.start()
    session = await RawSession.open(second.address)
    granted = [(await session.check([key])).granted for key in keys]
    assert sum(granted) == 4
    assert await session.put(keys_of(4, seed=2), level=SYNCED) == bytes([SYNCED] * 4)
    await session.goodbye()
    await second.idle()
    await second.stop()


async def test_I9_a_bug_in_a_commit_fails_its_writes_and_no_later_one_waits(
    node: LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssd = node.node.driver.ssd
    assert ssd is not None

    def broken(changes: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ssd.index, "apply", broken)
    session = await RawSession.open(node.address)
    async with asyncio.timeout(10):
        levels = await session.put(keys_of(4), level=SYNCED)
        later = await session.put(keys_of(4, seed=2), level=SYNCED)
    assert SYNCED not in levels + later
    assert ssd.failed
    assert (await session.stub.Stats(node_pb2.StatsRequest())).counters["ssd_write_errors"]
    await session.goodbye()


async def test_I9_a_namespace_opens_on_a_full_disk(
    node: LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssd, keeper = node.node.driver.ssd, node.node.namespaces
    assert ssd is not None
    assert keeper is not None

    class FullDisk:
        def begin(self, **_: object) -> None:
            raise lmdb.DiskError("No space left on device")

        def close(self) -> None:
            """Nothing to close."""

    with monkeypatch.context() as patch:
        patch.setattr(ssd.index, "_env", FullDisk())
        session = await RawSession.open(node.address)
        assert session.namespace
        assert await session.put(keys_of(4)) == bytes([1] * 4)
        assert (await session.check(keys_of(4))).granted == 4
        assert session.root not in keeper.known
    await session.open_namespace(SPEC)
    assert session.root in keeper.known
    await session.goodbye()


async def test_I7_namespaces_without_blocks_do_not_outlive_the_node(tmp_path: Path) -> None:
    first = LocalNode(tmp_path)
    await first.start()
    session = await RawSession.open(first.address)
    await session.put(keys_of(2), level=SYNCED)
    used = session.root
    for i in range(5):
        await session.open_namespace(CacheSpec.raw(f"unused {i}", block_bytes=BLOCK_BYTES))
    assert len(first.node.core.namespaces()) == 6
    await session.goodbye()
    await first.stop()

    second = LocalNode(tmp_path)
    await second.start()
    assert [namespace.root for namespace in second.node.core.namespaces()] == [used]
    await second.stop()


def test_an_empty_index_file_is_a_new_index(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "data.mdb").touch()
    index = SsdIndex(tmp_path, 16, "node")
    assert index.entries() == ([], [])
    index.close()

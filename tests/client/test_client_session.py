import asyncio
import os
import socket
from pathlib import Path

import pytest
from kvstore.errors import (
    DeadlineError,
    InvalidArgumentError,
    KVStoreError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from kvstore_client import AsyncClient, CacheSpec, EndReason, Namespace, session
from kvstore_proto import node_pb2

from tests.cli.store import short_directory
from tests.client.fake_node import FakeNode, Request, Response
from tests.master.rig import start_master


async def test_without_a_node_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="kvstore up"):
        await AsyncClient.connect(f"unix:{tmp_path}/none.sock", timeout_s=2)


async def test_an_address_that_can_never_be_right_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="unix:/run"):
        await AsyncClient.connect("/run/kvstore/node.sock")


async def test_a_master_is_no_node(tmp_path: Path) -> None:
    async with start_master(tmp_path / "master") as master:
        with pytest.raises(PreconditionError, match="is a master, not a node"):
            await AsyncClient.connect(master.address)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_socket_of_another_user_is_a_clear_error() -> None:
    with short_directory() as folder, socket.socket(socket.AF_UNIX) as server:
        folder.chmod(0o755)
        server.bind(str(folder / "s"))
        server.listen()
        (folder / "s").chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(UnavailableError, match="belongs to another user"):
                await AsyncClient.connect(f"unix:{folder}/s", timeout_s=2)
        finally:
            os.seteuid(0)


async def test_hello_names_the_process(client: AsyncClient, node: FakeNode) -> None:
    hello = node.last("hello")
    assert hello.protocol_version == 2
    assert hello.pid > 1
    assert hello.pid_namespace > 0
    assert hello.process_start_ticks > 0
    assert hello.settled
    assert hello.name == "test"
    assert not client.closed
    assert not client.has_master


async def test_a_node_of_another_version_is_a_clear_error(node: FakeNode) -> None:
    node.refuse("hello", 9, "this node speaks protocol version 9")
    with pytest.raises(PreconditionError, match="version 9"):
        await AsyncClient.connect(node.address)


async def test_a_silent_node_is_given_up_in_time(node: FakeNode) -> None:
    node.ignore("hello")
    with pytest.raises(DeadlineError, match=r"within 0\.1 s"):
        await AsyncClient.connect(node.address, timeout_s=0.1)


@pytest.mark.parametrize("field", ["pool_path", "directory_path"])
async def test_memory_that_cannot_be_mapped_is_a_clear_error(node: FakeNode, field: str) -> None:
    def answer(request: Request) -> list[Response] | None:
        if request.WhichOneof("request") != "hello":
            return None
        (response,) = node.own_answer(request)
        setattr(response.welcome, field, "/nowhere/at/all")
        return [response]

    node.answer = answer
    with pytest.raises(PreconditionError, match="cannot map /nowhere"):
        await AsyncClient.connect(node.address)
    await node.wait_for("goodbye")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pool_bytes": 1 << 40}, "announced"), ({"instance": 9}, "another instance")],
)
async def test_a_welcome_that_contradicts_the_files_is_refused(
    node: FakeNode, change: dict[str, int], message: str
) -> None:
    def answer(request: Request) -> list[Response] | None:
        if request.WhichOneof("request") != "hello":
            return None
        (response,) = node.own_answer(request)
        response.welcome.MergeFrom(node_pb2.Welcome(**change))  # type: ignore[arg-type]
        return [response]

    node.answer = answer
    with pytest.raises(PreconditionError, match=message):
        await AsyncClient.connect(node.address)


async def test_every_page_is_mapped_after_connect(client: AsyncClient) -> None:
    assert await asyncio.to_thread(client.mapping.wait_populated, 5.0)


async def test_populating_can_be_left_out(node: FakeNode) -> None:
    async with await AsyncClient.connect(node.address, populate=False) as client:
        assert client.mapping.wait_populated(0.0)


async def test_an_error_answer_is_raised_as_its_type(ns: Namespace, node: FakeNode) -> None:
    node.refuse("prefetch", 8, "too many")
    with pytest.raises(ResourceExhaustedError, match="too many"):
        await ns.prefetch([b"k" * 32])


async def test_I9_no_call_outlives_its_deadline(node: FakeNode, spec: CacheSpec) -> None:
    async with await AsyncClient.connect(node.address, timeout_s=0.1) as client:
        ns = await client.open_namespace(spec)
        node.ignore("prefetch", "reserve")
        with pytest.raises(DeadlineError):
            await ns.prefetch([b"k" * 32])
        with pytest.raises(DeadlineError):
            async with ns.write([b"k" * 32]):
                raise AssertionError("nothing was reserved")
        await node.wait_for("abort")


async def test_answers_may_come_in_any_order(ns: Namespace, node: FakeNode) -> None:
    held: list[Response] = []

    def answer(request: Request) -> list[Response] | None:
        if request.WhichOneof("request") != "prefetch":
            return None
        (response,) = node.own_answer(request)
        response.id = request.id
        held.append(response)
        return held[::-1] if len(held) == 3 else []

    node.answer = answer
    started = await asyncio.gather(*(ns.prefetch([b"k" * 32] * n) for n in (1, 2, 3)))
    assert started == [1, 2, 3]


async def test_I7_outstanding_requests_have_a_limit(
    ns: Namespace, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "OUTSTANDING_MAX", 2)
    node.ignore("prefetch")
    waiting = [asyncio.create_task(ns.prefetch([b"k" * 32])) for _ in range(2)]
    await node.wait_for("prefetch", 2)
    with pytest.raises(ResourceExhaustedError, match="2 requests"):
        await ns.prefetch([b"k" * 32])
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_late_answer_is_dropped(ns: Namespace, node: FakeNode) -> None:
    node.ignore("prefetch")
    waiting = asyncio.create_task(ns.prefetch([b"k" * 32]))
    await node.wait_for("prefetch")
    waiting.cancel()
    late = node.requests[-1]

    def answer(request: Request) -> list[Response] | None:
        (response,) = node.own_answer(late)
        response.id = late.id
        return [response, *node.own_answer(request)]

    node.answer = answer
    assert await ns.prefetch([b"k" * 32, b"l" * 32]) == 2


async def test_a_lost_session_fails_everything_and_is_told(node: FakeNode, spec: CacheSpec) -> None:
    lost: list[KVStoreError] = []
    client = await AsyncClient.connect(node.address, timeout_s=2, on_lost=lost.append)
    ns = await client.open_namespace(spec)
    node.ignore("prefetch", "acquire")
    waiting = asyncio.create_task(ns.prefetch([b"k" * 32]))
    lease = await ns.acquire([b"k" * 32])
    await node.wait_for("acquire")
    node.hang_up.set()
    with pytest.raises(UnavailableError, match="lost"):
        await waiting
    with pytest.raises(UnavailableError, match="lost"):
        await lease.wait()
    assert client.closed
    assert len(lost) == 1
    with pytest.raises(UnavailableError):
        ns.match([b"k" * 32])
    with pytest.raises(UnavailableError):
        await ns.acquire([b"k" * 32])
    with pytest.raises(UnavailableError):
        await ns.prefetch([b"k" * 32])
    with pytest.raises(UnavailableError):
        await client.stats()
    lease.release()
    await client.close()
    assert len(lost) == 1


async def test_the_nodes_end_is_seen(client: AsyncClient, ns: Namespace, node: FakeNode) -> None:
    node.ignore("prefetch")
    waiting = asyncio.create_task(ns.prefetch([b"k" * 32]))
    await node.wait_for("prefetch")
    await node.stop()
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError, match="no node answers"):
        await client.reconnect(1.0)
    assert client.closed


async def test_namespaces_stay_good_over_a_reconnection(
    client: AsyncClient, ns: Namespace, node: FakeNode, tmp_path: Path
) -> None:
    await client.reconnect()
    assert node.kinds().count("hello") == 1
    await ns.put([b"a" * 32], bytes(8192))
    lost = asyncio.Event()
    client.on_lost = lambda _: lost.set()
    await node.stop()
    await asyncio.wait_for(lost.wait(), 5)
    (tmp_path / "again").mkdir()
    other = FakeNode(tmp_path / "again", instance=2)
    other.address = node.address
    await other.start()
    try:
        await client.reconnect()
        assert not client.closed
        assert other.last("hello").client_id == client.client_id
        assert other.last("hello").settled
        assert ns.match([b"a" * 32]).count == 0
        async with ns.read([b"a" * 32]) as read:
            assert read.reason == EndReason.NEVER_STORED
        assert await client.open_namespace(ns.spec) is ns
        await client.close()
    finally:
        await other.stop()


async def test_I4_reconnecting_waits_until_nothing_of_the_old_session_is_in_use(
    client: AsyncClient, ns: Namespace, node: FakeNode
) -> None:
    await ns.put([b"a" * 32], b"x" * 8192)
    lease = await ns.acquire([b"a" * 32])
    await lease.wait()
    lost = asyncio.Event()
    client.on_lost = lambda _: lost.set()
    node.hang_up.set()
    await asyncio.wait_for(lost.wait(), 5)
    node.hang_up.clear()
    with pytest.raises(DeadlineError, match="1 leases or writes"):
        await client.reconnect(0.05)
    again = asyncio.create_task(client.reconnect())
    await asyncio.sleep(0)
    assert bytes(lease.blocks[0][:1]) == b"x"
    lease.release()
    await again
    assert node.kinds().count("hello") == 2


async def test_close_says_goodbye_once(node: FakeNode) -> None:
    client = await AsyncClient.connect(node.address)
    await client.close()
    await client.close()
    await node.wait_for("goodbye")
    assert node.kinds() == ["hello", "goodbye"]


async def test_stats_come_from_the_node(client: AsyncClient, node: FakeNode) -> None:
    assert (await client.stats()).node_id == "fake"
    await node.stop()


async def test_hbm_events_travel_in_limited_messages(
    node: FakeNode, spec: CacheSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_client.namespace._HBM_KEYS_MAX", 2)
    async with await AsyncClient.connect(node.address, engine_id="e") as client:
        ns = await client.open_namespace(spec)
        ns.hbm_events(stored=[b"a" * 32] * 3, removed=[b"b" * 32], cleared=True)
        await node.wait_for("hbm_events", 2)
        first, second = (r.hbm_events for r in node.requests if r.HasField("hbm_events"))
    assert (len(first.stored), len(first.removed), first.cleared) == (64, 32, True)
    assert (len(second.stored), len(second.removed), second.cleared) == (32, 0, False)


async def test_hbm_events_need_an_engine(ns: Namespace) -> None:
    with pytest.raises(InvalidArgumentError, match="engine_id"):
        ns.hbm_events(cleared=True)

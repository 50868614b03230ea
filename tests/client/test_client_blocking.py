import asyncio
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kvstore.errors import UnavailableError
from kvstore_client import AckLevel, CacheSpec, Client, EndReason
from kvstore_client.blocking import LoopThread

from tests.client.fake_node import FakeNode

KEYS = [bytes([i]) * 32 for i in range(1, 4)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[FakeNode]:
    """A fake node on a loop of its own, as this test's thread blocks."""
    thread = LoopThread()

    async def start() -> FakeNode:
        node = FakeNode(tmp_path)
        await node.start()
        return node

    node = thread.run(start())
    yield node
    thread.run(node.stop())
    thread.stop()


def test_the_same_words_without_a_loop(served: FakeNode, spec: CacheSpec) -> None:
    data = np.random.default_rng(1).integers(0, 256, (3, 8192), dtype=np.uint8)
    with Client.connect(served.address, name="blocking") as client:
        ns = client.open_namespace(spec)
        assert ns.put(KEYS[:2], data[:2]).stored == 2
        with ns.write(KEYS) as write:
            assert [index for index, _ in write.slots] == [2]
            write.put(2, data[2])
            assert write.commit().tolist() == [AckLevel.MEMORY]
        with ns.write([b"x" * 32]) as write:
            assert write.abort() == 1
        assert ns.match(KEYS).count == 3
        assert ns.prefetch(KEYS) == 3
        with ns.read(KEYS) as read:
            assert (read.count, read.reason) == (3, EndReason.COMPLETE)
            assert np.array_equal(read.array(1), data[1])
        out = np.zeros_like(data)
        assert ns.get(KEYS, out).count == 3
        assert np.array_equal(out, data)
        assert client.stats().node_id == "fake"
        client.reconnect()
        assert ns.keys(range(4))
        assert ns.spec == spec
    assert client.closed
    client.close()
    with pytest.raises(UnavailableError, match="closed"):
        client.stats()
    assert served.pinned == {}
    assert served.open_slots() == 0
    assert not [t for t in threading.enumerate() if t.name == "kvstore-populate"]


def test_without_a_node_no_thread_is_left(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        Client.connect(f"unix:{tmp_path}/none.sock", timeout_s=2)
    assert not [t for t in threading.enumerate() if t.name == "kvstore-client"]


class CtrlC(BaseException):
    """Stands for Ctrl-C, which pytest would take as its own."""


def interrupt(signum: int, frame: object) -> None:
    raise CtrlC


def test_an_interrupted_call_is_cancelled() -> None:
    thread = LoopThread()
    cancelled = threading.Event()
    main = threading.get_ident()

    async def waits() -> None:
        try:
            signal.pthread_kill(main, signal.SIGUSR1)
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(CtrlC):
            thread.run(waits())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert cancelled.wait(5)
    thread.stop()
    thread.stop()

"""A thin blocking facade over the asyncio client, which runs on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
from kvstore.core.keys import DEFAULT_TENANT
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel
from kvstore.errors import UnavailableError
from kvstore_proto import node_pb2

from kvstore_client.bulk import Got, Put
from kvstore_client.client import AsyncClient
from kvstore_client.namespace import Namespace
from kvstore_client.reading import Read
from kvstore_client.wire import Keys
from kvstore_client.writing import Indices, Write

ResultT = TypeVar("ResultT")


class _Call(Generic[ResultT]):
    """Work that can be cancelled even if the caller was interrupted while it handed it over."""

    def __init__(self, work: Coroutine[Any, Any, ResultT]) -> None:
        self._work = work
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False

    async def run(self) -> ResultT:
        """The result of the work."""
        if self._cancelled:
            self._work.close()
            raise asyncio.CancelledError
        self._task = asyncio.current_task()
        return await self._work

    def cancel(self) -> None:
        """Cancels it, begun or not; nothing if it has ended. On the loop."""
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()


class LoopThread:
    """An event loop on its own thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kvstore-client", daemon=True
        )
        self._thread.start()

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """The result of ``work``; an interrupted caller cancels it."""
        if self.stopped:
            work.close()
            raise UnavailableError("this client is closed")
        call = _Call(work)
        try:
            return asyncio.run_coroutine_threadsafe(call.run(), self._loop).result()
        except BaseException:
            self._loop.call_soon_threadsafe(call.cancel)
            raise

    def stop(self) -> None:
        """Ends the thread."""
        if not self.stopped:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class BlockingWrite:
    """``Write`` whose commit blocks."""

    def __init__(self, thread: LoopThread, write: Write) -> None:
        self._thread = thread
        self._write = write
        self.statuses = write.statuses
        self.put = write.put
        self.array = write.array

    @property
    def slots(self) -> list[tuple[int, memoryview]]:
        """Index into the keys and slot, for every block that is still to be filled."""
        return self._write.slots

    def commit(self, indices: Indices | None = None) -> npt.NDArray[np.uint8]:
        """Makes blocks visible; the AckLevel reached for each."""
        return self._thread.run(self._write.commit(indices))

    def abort(self, indices: Indices | None = None) -> int:
        """Gives slots back unfilled; how many."""
        return self._thread.run(self._write.abort(indices))


class BlockingNamespace:
    """``Namespace`` whose calls block."""

    def __init__(self, thread: LoopThread, namespace: Namespace) -> None:
        self._thread = thread
        self._namespace = namespace
        self.spec = namespace.spec
        self.root = namespace.root
        self.keys = namespace.keys
        self.match = namespace.match

    @contextmanager
    def read(
        self, keys: Keys, parent: bytes | None = None, timeout_s: float | None = None
    ) -> Iterator[Read]:
        """``with ns.read(keys) as read``: the leading blocks, pinned until the exit."""
        read = self._thread.run(self._namespace.read(keys, parent, timeout_s).__aenter__())
        try:
            yield read
        finally:
            read.lease.release()

    @contextmanager
    def write(
        self,
        keys: Keys,
        parent: bytes | None = None,
        level: AckLevel = AckLevel.MEMORY,
        timeout_s: float | None = None,
    ) -> Iterator[BlockingWrite]:
        """``with ns.write(keys) as write``: slots to fill and commit."""
        write = self._namespace.write(keys, parent, level, timeout_s)
        self._thread.run(write.__aenter__())
        try:
            yield BlockingWrite(self._thread, write)
        finally:
            self._thread.run(write.__aexit__(None, None, None))

    def put(
        self,
        keys: Keys,
        data: Any,
        parent: bytes | None = None,
        level: AckLevel = AckLevel.MEMORY,
        timeout_s: float | None = None,
    ) -> Put:
        """Stores the blocks of a chain from ``data``: one buffer, or a list of one a block."""
        return self._thread.run(self._namespace.put(keys, data, parent, level, timeout_s))

    def get(
        self, keys: Keys, out: Any, parent: bytes | None = None, timeout_s: float | None = None
    ) -> Got:
        """Copies the leading blocks of a chain to ``out``: one buffer, or a list of one a block."""
        return self._thread.run(self._namespace.get(keys, out, parent, timeout_s))

    def prefetch(self, keys: Keys, parent: bytes | None = None) -> int:
        """Starts loading blocks into DRAM; how many were started."""
        return self._thread.run(self._namespace.prefetch(keys, parent))


class Client:
    """The blocking client: the same names as ``AsyncClient``, for programs without a loop."""

    def __init__(self, thread: LoopThread, client: AsyncClient) -> None:
        """Use ``connect``."""
        self._thread = thread
        self._client = client

    @classmethod
    def connect(
        cls, address: str, *, name: str = "", timeout_s: float = 5.0, populate: bool = True
    ) -> Self:
        """Opens a session with the node at ``address``, see ``AsyncClient.connect``."""
        thread = LoopThread()
        try:
            client = thread.run(
                AsyncClient.connect(address, name=name, timeout_s=timeout_s, populate=populate)
            )
        except BaseException:
            thread.stop()
            raise
        return cls(thread, client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the session is lost or was closed."""
        return self._client.closed

    def open_namespace(self, spec: CacheSpec, tenant: str = DEFAULT_TENANT) -> BlockingNamespace:
        """The namespace of ``spec``."""
        namespace = self._thread.run(self._client.open_namespace(spec, tenant))
        return BlockingNamespace(self._thread, namespace)

    def stats(self) -> node_pb2.StatsResponse:
        """Space and counters of the node."""
        return self._thread.run(self._client.stats())

    def reconnect(self, timeout_s: float | None = None) -> None:
        """Opens a new session in place of a lost one."""
        self._thread.run(self._client.reconnect(timeout_s))

    def close(self) -> None:
        """Says goodbye, and ends the thread."""
        if not self._thread.stopped:
            self._thread.run(self._client.close())
            self._thread.stop()

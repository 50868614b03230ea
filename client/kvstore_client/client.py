"""The asyncio client of a node."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc
from kvstore.core.keys import DEFAULT_TENANT
from kvstore.core.spec import CacheSpec
from kvstore.errors import DeadlineError, KVStoreError, UnavailableError
from kvstore_proto import node_pb2

from kvstore_client.mapping import Mapping
from kvstore_client.namespace import Namespace
from kvstore_client.process import this_process
from kvstore_client.session import Session
from kvstore_client.wire import PROTOCOL_VERSION, error_of_call

log = logging.getLogger(__name__)


class AsyncClient:
    """One session with the node of this host, and its shared memory.

    Make it with ``connect``. When the node goes away, ``closed`` is set, ``on_lost`` is called,
    and every call fails with UnavailableError until ``reconnect`` has succeeded.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str = "",
        engine_id: str = "",
        timeout_s: float = 5.0,
        client_id: str = "",
        on_lost: Callable[[KVStoreError], None] | None = None,
        populate: bool = True,
    ) -> None:
        """Use ``connect``; this alone opens nothing."""
        self.address = address
        self.timeout_s = timeout_s
        self.client_id = client_id or uuid.uuid4().hex
        self.on_lost = on_lost
        self.welcome = node_pb2.Welcome()
        self.engine_id = engine_id
        self._name = name or f"pid {os.getpid()}"
        self._populate = populate
        self._session: Session | None = None
        self._mapping: Mapping | None = None
        self._namespaces: dict[tuple[CacheSpec, str], Namespace] = {}
        self._holds: set[object] = set()
        self._no_holds = asyncio.Event()
        self._settling = False  # somebody waits for the event
        self._loop = asyncio.get_running_loop()
        self._reconnecting = asyncio.Lock()
        self.copy_turn = asyncio.Lock()  # of puts, which share this loop's thread
        self._closing = False

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        name: str = "",
        engine_id: str = "",
        timeout_s: float = 5.0,
        client_id: str = "",
        on_lost: Callable[[KVStoreError], None] | None = None,
        populate: bool = True,
    ) -> Self:
        """Opens a session with the node at ``address``, like ``unix:/run/kvstore/node.sock``.

        ``name`` is for people, ``engine_id`` marks an engine's own pages, ``timeout_s`` bounds
        every call that is given no other. Without ``populate`` pages are mapped when touched.
        Raises UnavailableError without a node, PreconditionError where it speaks another version
        or its memory cannot be mapped.
        """
        client = cls(
            address,
            name=name,
            engine_id=engine_id,
            timeout_s=timeout_s,
            client_id=client_id,
            on_lost=on_lost,
            populate=populate,
        )
        await client._open()
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def session(self) -> Session:
        """The current session; it may be lost."""
        assert self._session is not None, "make a client with AsyncClient.connect"
        return self._session

    @property
    def mapping(self) -> Mapping:
        """The shared memory of the node instance last connected to."""
        assert self._mapping is not None, "make a client with AsyncClient.connect"
        return self._mapping

    @property
    def closed(self) -> bool:
        """Whether the session is lost or was closed."""
        return self.session.lost is not None

    @property
    def has_master(self) -> bool:
        """Whether a master answered the node when this session was opened."""
        return self.welcome.has_master

    def check_open(self) -> None:
        """UnavailableError if the session is lost."""
        if self.session.lost is not None:
            raise UnavailableError(
                f"the session with {self.address} is lost: {self.session.lost}; reconnect first"
            )

    def hold(self) -> Callable[[], None]:
        """Notes that slots are in use; the returned call, from any thread, takes it back."""
        token = object()
        self._holds.add(token)

        def let_go() -> None:
            self._holds.discard(token)
            if self._settling and not self._holds:
                self._loop.call_soon_threadsafe(self._no_holds.set)

        return let_go

    async def open_namespace(self, spec: CacheSpec, tenant: str = DEFAULT_TENANT) -> Namespace:
        """The namespace of ``spec``; the same object each time it is asked for."""
        if (known := self._namespaces.get((spec, tenant))) is not None:
            return known
        namespace = Namespace(self, spec, tenant)
        await namespace.open()
        return self._namespaces.setdefault((spec, tenant), namespace)

    async def stats(self) -> node_pb2.StatsResponse:
        """Space and counters of the node."""
        self.check_open()
        try:
            stats: node_pb2.StatsResponse = await self.session.stub.Stats(
                node_pb2.StatsRequest(), timeout=self.timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error) from None
        return stats

    async def reconnect(self, timeout_s: float | None = None) -> None:
        """Opens a new session in place of a lost one; namespaces stay good.

        The node keeps what the old session held until this process says that it no longer touches
        it, so this waits until every lease and write of the old session is closed. Raises
        DeadlineError if they are not in time, UnavailableError if the node is still away.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        async with self._reconnecting:
            if self.closed:
                self._settling = True
                try:
                    await self._wait_until_settled(limit)
                finally:
                    self._settling = False
                await self.session.close(goodbye=False)
                await self._open()

    async def _wait_until_settled(self, limit: float) -> None:
        while self._holds:
            self._no_holds.clear()
            try:
                await asyncio.wait_for(self._no_holds.wait(), limit)
            except TimeoutError:
                raise DeadlineError(
                    f"{len(self._holds)} leases or writes of the lost session are still open after "
                    f"{limit:g} s: release them first"
                ) from None

    async def _open(self) -> None:
        identity = this_process()
        hello = node_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            client_id=self.client_id,
            pid=identity.pid,
            pid_namespace=identity.pid_namespace,
            process_start_ticks=identity.start_ticks,
            name=self._name,
            settled=True,
            engine_id=self.engine_id,
        )
        session = Session(self.address, self._lost)
        welcome = await session.open(hello, self.timeout_s)
        known = mapping = self._mapping
        try:
            if mapping is None or mapping.instance != welcome.instance:
                mapping = Mapping(welcome, populate=self._populate)
            namespaces = list(self._namespaces.values())
            opened = [await namespace.ask(session) for namespace in namespaces]
        except BaseException:
            await session.close()
            if mapping is not None and mapping is not known:
                mapping.close()
            raise
        # All at once, the session last: until then the lost one refuses every call, so that none
        # goes to the new node with the memory or the namespaces of the old one.
        self._mapping, self.welcome = mapping, welcome
        for namespace, answer in zip(namespaces, opened, strict=True):
            namespace.take(answer)
        self._session = session
        if known is not None and known is not mapping:
            known.close()

    def _lost(self, cause: KVStoreError) -> None:
        if self._closing or self._session is None:
            return
        log.info("session with %s lost: %s", self.address, cause)
        if self.on_lost is not None:
            self.on_lost(cause)

    async def close(self) -> None:
        """Says goodbye: the node frees everything of this client at once."""
        self._closing = True
        await self.session.close()
        if self._mapping is not None:
            await asyncio.to_thread(self._mapping.close)


connect = AsyncClient.connect

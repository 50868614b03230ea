"""The Master service: sessions of nodes, Locate, Watch."""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import grpc
from kvstore_proto import master_pb2, master_pb2_grpc

from kvstore.core.keys import KEY_BYTES
from kvstore.errors import (
    InvalidArgumentError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from kvstore.master.cluster import Cluster
from kvstore.master.membership import Node, NodeLink, check_hello
from kvstore.master.messages import check_namespace, check_root, end_value, run_message

log = logging.getLogger(__name__)

LOCATE_KEYS_MAX = 131_072
HELLO_TIMEOUT_S = 10.0
LAST_WRITE_S = 1.0
UNKEPT_MAX = 1024  # namespaces of one node that are tried again

Context = grpc.aio.ServicerContext[Any, Any]


class MasterService(master_pb2_grpc.MasterServicer):
    """Translates messages to calls of the cluster's parts and back."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    # A session is a coroutine that writes, not a generator that yields: its ``finally`` then runs
    # at the moment when the stream ends, and with it the node's blocks leave the index.
    async def Session(  # type: ignore[override]  # noqa: N802
        self,
        request_iterator: AsyncIterable[master_pb2.NodeReport],
        context: Context,
    ) -> None:
        """One node, from its hello to the end of its stream."""
        reports = aiter(request_iterator)
        hello = await _hello(reports)
        link = NodeLink(hello, asyncio.current_task())
        node = await self._cluster.join(hello, link)
        writer = asyncio.create_task(_write(self._cluster, link, context))
        try:
            async for report in reports:
                await self._take(node, link, report)
        except asyncio.CancelledError:
            if not link.ended_because:
                raise
            raise UnavailableError(f"the master ended this session: {link.ended_because}") from None
        finally:
            self._cluster.index.leave(link)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _take(self, node: Node, link: NodeLink, report: master_pb2.NodeReport) -> None:
        kind = report.WhichOneof("report")
        self._cluster.metrics.reports.labels(kind or "none").inc()
        self._cluster.index.take(node, link, report, time.monotonic())
        if kind == "namespace":
            await self._take_namespace(node, link, report.namespace)
        elif kind == "heartbeat":
            await self._keep_again(node, link)

    async def _take_namespace(
        self, node: Node, link: NodeLink, report: master_pb2.NamespaceReport
    ) -> None:
        check_root(report.root)
        try:
            check_namespace(report)
        except InvalidArgumentError as error:
            log.warning(
                "namespace %s of node %s is refused: %s", report.root.hex(), link.node_id, error
            )
        else:
            await self._keep(node, link, report)

    async def _keep(self, node: Node, link: NodeLink, report: master_pb2.NamespaceReport) -> bool:
        """Whether the namespace is kept now; if not, it is noted, for a node tells it once."""
        root = report.root
        link.held_up = True
        try:
            await self._cluster.add_namespace(report)
        except ResourceExhaustedError as error:
            if root not in link.unkept:
                log.warning("namespace %s is not kept: %s", root.hex(), error)
            if root in link.unkept or len(link.unkept) < UNKEPT_MAX:
                link.unkept[root] = report
            return False
        finally:
            link.held_up = False
            self._cluster.index.heard(node, link, time.monotonic())
        if link.unkept.pop(root, None) is not None:
            log.info("namespace %s is kept now", root.hex())
        self._cluster.index.has(node, link, root)
        return True

    async def _keep_again(self, node: Node, link: NodeLink) -> None:
        """Tries those that were not kept, until one still cannot be."""
        while link.unkept:
            if not await self._keep(node, link, next(iter(link.unkept.values()))):
                return

    async def Locate(  # noqa: N802
        self, request: master_pb2.LocateRequest, context: Context
    ) -> master_pb2.LocateResponse:
        """Best places of the leading keys, in runs."""
        del context
        if len(request.keys) > LOCATE_KEYS_MAX * KEY_BYTES:
            raise ResourceExhaustedError(f"Locate takes at most {LOCATE_KEYS_MAX} keys a call")
        metrics = self._cluster.metrics
        with metrics.locate_seconds.time():
            located = self._cluster.locations.locate(request.keys)
        metrics.located.labels(located.reason.name.lower()).inc()
        metrics.locate_keys.inc(len(request.keys) // KEY_BYTES)
        metrics.locate_found.inc(located.found)
        return master_pb2.LocateResponse(
            runs=[run_message(run) for run in located.runs],
            found=located.found,
            end=end_value(located.reason),
        )

    async def Watch(  # type: ignore[override]  # noqa: N802
        self, request: master_pb2.WatchRequest, context: Context
    ) -> None:
        """Block events until the caller ends the call."""
        if request.root:
            check_root(request.root)
        with self._cluster.watchers.subscribe(request.root) as watcher:
            # The caller may count on events from the moment when it sees the headers.
            await context.send_initial_metadata(())
            while True:
                await context.write(await watcher.next())


async def _hello(reports: AsyncIterator[master_pb2.NodeReport]) -> master_pb2.NodeHello:
    """The first report of a session; PreconditionError unless it is a hello, and comes soon."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await anext(reports, None)
    except TimeoutError:
        raise PreconditionError(f"no hello within {HELLO_TIMEOUT_S:g} s") from None
    if first is None or first.WhichOneof("report") != "hello":
        raise PreconditionError("the first report of a session must be hello")
    check_hello(first.hello)
    return first.hello


async def _write(cluster: Cluster, link: NodeLink, context: Context) -> None:
    """Writes directives, each under the master's epoch, until it is cancelled.

    Then it waits for the write that is under way: gRPC cannot take one back, and refuses to end a
    stream with a status during it.
    """
    write: asyncio.Future[None] | None = None
    try:
        while True:
            directive = await link.outgoing.get()
            directive.cluster_epoch = cluster.epoch
            write = asyncio.ensure_future(context.write(directive))
            await asyncio.shield(write)
    finally:
        if write is not None:
            await asyncio.wait({write}, timeout=LAST_WRITE_S)

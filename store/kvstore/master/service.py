"""The Master service: sessions of nodes, Locate, Watch."""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import grpc
from kvstore_proto import master_pb2, master_pb2_grpc

from kvstore.core.keys import KEY_BYTES
from kvstore.core.types import Tier
from kvstore.errors import (
    InvalidArgumentError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from kvstore.master.cluster import Cluster
from kvstore.master.membership import Node, NodeLink, NodeState, check_hello
from kvstore.master.messages import check_root, end_value, run_message

log = logging.getLogger(__name__)

LOCATE_KEYS_MAX = 131_072
RESYNCS_MAX = 3
HELLO_TIMEOUT_S = 10.0
LAST_WRITE_S = 1.0
PROBLEMS_MAX = 8  # of one node
PROBLEM_CHARS_MAX = 1024
INDEXED_TIERS = (Tier.HBM, Tier.DRAM, Tier.SSD)

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
            self._cluster.leave(link)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _take(self, node: Node, link: NodeLink, report: master_pb2.NodeReport) -> None:
        kind = report.WhichOneof("report")
        self._cluster.metrics.reports.labels(kind or "none").inc()
        node.last_seen = time.monotonic()
        match kind:
            case "namespace":
                await self._take_namespace(report.namespace)
            case "inventory":
                self._take_inventory(link, report.inventory)
            case "inventory_end":
                self._end_inventory(node, link, report.inventory_end.blocks)
            case "delta":
                self._index(link.node_id, report.delta)
            case "heartbeat":
                node.sessions = report.heartbeat.sessions
                node.tiers = list(report.heartbeat.tiers)
                node.problems = [
                    text[:PROBLEM_CHARS_MAX] for text in report.heartbeat.problems[:PROBLEMS_MAX]
                ]
            case "result":
                link.resolve(report.result)
            case "hello":
                raise PreconditionError("a session has one hello, the first report")

    async def _take_namespace(self, report: master_pb2.NamespaceReport) -> None:
        check_root(report.root)
        try:
            await self._cluster.add_namespace(report)
        except ResourceExhaustedError as error:
            log.warning("namespace %s is not kept: %s", report.root.hex(), error)

    def _take_inventory(self, link: NodeLink, events: master_pb2.BlockEvents) -> None:
        self._restart_inventory(link)
        link.inventory_keys += len(events.stored) // KEY_BYTES
        self._index(link.node_id, events)

    def _restart_inventory(self, link: NodeLink) -> None:
        if link.restart_inventory:
            link.restart_inventory = False
            link.inventory_keys = 0
            self._cluster.forget_blocks(link.node_id)

    def _end_inventory(self, node: Node, link: NodeLink, sent: int) -> None:
        """Checks that everything arrived; if not, asks for the whole inventory again."""
        self._restart_inventory(link)
        if link.inventory_keys == sent:
            node.state = NodeState.READY
            log.info("node %s is ready with %d blocks", link.node_id, sent)
            return
        log.error("node %s sent %d blocks, %d came", link.node_id, sent, link.inventory_keys)
        link.resyncs += 1
        self._cluster.metrics.resyncs.inc()
        if link.resyncs > RESYNCS_MAX:
            raise InvalidArgumentError(
                f"the inventory of {link.inventory_keys} blocks does not add up to the {sent} that "
                f"its end names, {link.resyncs} times in a row"
            )
        link.restart_inventory = True
        link.send(master_pb2.Directive(resync=master_pb2.Resync()))

    def _index(self, node_id: str, events: master_pb2.BlockEvents) -> None:
        """Applies what changed in one tier: cleared, then removed, then stored."""
        check_root(events.root)
        if int(events.tier) not in INDEXED_TIERS:
            raise InvalidArgumentError(
                f"blocks cannot be in tier {events.tier}; take HBM, DRAM, SSD"
            )
        locations = self._cluster.locations
        name = (node_id, Tier(events.tier), events.root, events.engine_id)
        if events.cleared:
            locations.clear(locations.place(*name))
        place = locations.place(*name)
        if events.removed:
            locations.removed(place, events.removed)
        if refused := locations.stored(place, events.stored) if events.stored else 0:
            self._cluster.metrics.refused.inc(refused)
        if len(self._cluster.watchers):
            events.node_id = node_id
            self._cluster.watchers.publish(events)

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

"""The parts of a master put together: index, members, watchers, durable state, epoch."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from kvstore_proto import master_pb2

from kvstore.errors import ConfigError, ResourceExhaustedError
from kvstore.master.cluster_index import ClusterIndex
from kvstore.master.config import MasterConfig
from kvstore.master.membership import Node, NodeLink
from kvstore.master.metrics import MasterMetrics, StateCollector
from kvstore.master.state.base import NAMESPACES_MAX, KnownNode, MasterState

log = logging.getLogger(__name__)


class Cluster:
    """Owns everything that the services answer from. Lives on one event loop."""

    def __init__(self, config: MasterConfig, state: MasterState) -> None:
        """Begins a new epoch, durable before anybody hears of it; ConfigError if it cannot be."""
        self.config = config
        self.started = time.monotonic()
        self.metrics = MasterMetrics()
        self.index = ClusterIndex(config, state.nodes(), _first_epoch(config, state), self.metrics)
        self.locations = self.index.locations
        self.members = self.index.members
        self.watchers = self.index.watchers
        self.metrics.registry.register(StateCollector(self.locations, self.members, self.watchers))
        # Those not reported since the master's start first, then the one reported longest ago.
        self.namespaces = {report.root: report for report in state.namespaces()}
        self._state = state
        self._writing = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        self._adding: Counter[bytes] = Counter()  # roots that callers wait for

    @property
    def epoch(self) -> int:
        """Of the cluster, newest."""
        return self.index.epoch

    async def join(self, hello: master_pb2.NodeHello, link: NodeLink) -> Node:
        """Lets a node in and welcomes it. It starts with no blocks in the index."""
        self.index.check_rival(hello, time.monotonic())  # before its address is written
        await self._whole(self._outgrow(hello.cluster_epoch))
        await self._remember(hello)
        # From here to the caller's ``finally`` nothing waits, so that no link is left behind.
        node = self.index.join(hello, link, time.monotonic())
        log.info("node %s joined from %s (%s)", hello.node_id, hello.hostname, hello.address)
        return node

    async def forget_node(self, node_id: str) -> None:
        """Forgets a node that is lost. It may join again, as a new one.

        NotFoundError if it is not known, PreconditionError while it is connected.
        """
        await self._whole(self._forget_node(node_id))

    async def _forget_node(self, node_id: str) -> None:
        async with self._writing:
            node = self.members.forget(node_id)
            try:
                await asyncio.to_thread(self._state.remove_node, node_id)
            except ResourceExhaustedError:
                self.members.nodes.setdefault(node_id, node)
                raise
        log.info("node %s is forgotten", node_id)

    async def add_namespace(self, report: master_pb2.NamespaceReport) -> None:
        """Keeps what a namespace is; a report without a spec leaves the one that is known.

        At the limit the one goes that was reported longest ago, of those that no node here has and
        that have no blocks; ResourceExhaustedError if there is none, or if it cannot be durable.
        """
        root = report.root
        self._adding[root] += 1  # else a writer behind this one would drop what it has written
        try:
            while not self._knows(report):
                await self._whole(self._put_namespace(report))
        finally:
            self._adding[root] -= 1
            self._adding += Counter()  # those that nobody waits for go
        self.namespaces[root] = self.namespaces.pop(root)

    def _knows(self, report: master_pb2.NamespaceReport) -> bool:
        known = self.namespaces.get(report.root)
        if known is None:
            return False
        return known == report or (known.HasField("spec") and not report.HasField("spec"))

    async def written(self) -> None:
        """Returns when no write is under way; to be awaited before the state is closed."""
        while self._writes:
            await asyncio.wait(self._writes)

    async def _whole(self, write: Coroutine[Any, Any, None]) -> None:
        """Carries out a write, and what follows from it in memory, though the caller may go."""
        task = asyncio.create_task(write)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        await asyncio.shield(task)

    async def _put_namespace(self, report: master_pb2.NamespaceReport) -> None:
        async with self._writing:
            if not self._knows(report):
                await self._write_namespace(report)

    async def _write_namespace(self, report: master_pb2.NamespaceReport) -> None:
        dropped = None
        if report.root not in self.namespaces and len(self.namespaces) >= NAMESPACES_MAX:
            # Before anything waits: a node that reports this one meanwhile has it put again.
            dropped = self.namespaces.pop(self._oldest_unused_namespace())
        try:
            await asyncio.to_thread(
                self._state.put_namespace, report, dropped.root if dropped else b""
            )
        except ResourceExhaustedError:
            if dropped is not None:
                self.namespaces.setdefault(dropped.root, dropped)
            raise
        self.namespaces[report.root] = report
        if dropped is not None:
            self.locations.forget_purge(dropped.root)
            log.info("namespace %s is dropped: no node has it", dropped.root.hex())

    def _oldest_unused_namespace(self) -> bytes:
        reported = self.index.reported
        if len(reported) < len(self.namespaces):
            used = self.locations.roots()
            for root in self.namespaces:
                if root not in reported and root not in used and root not in self._adding:
                    return root
        raise ResourceExhaustedError(
            f"{NAMESPACES_MAX} namespaces are known, the most that a master keeps, and each is on "
            "a node: purge those out of use (`kvstore purge --namespace ROOT`), and restart nodes "
            "that still have them"
        )

    async def watch_nodes(self) -> None:
        """Ends the sessions of nodes that fell silent, and lets the index forget; never returns."""
        while True:
            await asyncio.sleep(self.config.heartbeat_ms / 4000)
            self.locations.trim()
            self.index.end_silent(time.monotonic())

    async def _remember(self, hello: master_pb2.NodeHello) -> None:
        known = KnownNode(hello.node_id, hello.address, hello.hostname, hello.version)
        before = self.members.nodes.get(hello.node_id)
        if before is not None and before.known == known:
            return
        try:
            await self._whole(self._put_node(known))
        except ResourceExhaustedError as error:
            log.warning("node %s will not be remembered: %s", hello.node_id, error)

    async def _put_node(self, known: KnownNode) -> None:
        async with self._writing:
            await asyncio.to_thread(self._state.put_node, known)

    async def _outgrow(self, epoch: int) -> None:
        """Moves on to an epoch newer than one that a node has seen from another master."""
        if not self.index.must_outgrow(epoch):  # nor will it, as epochs only grow
            return
        async with self._writing:
            if not self.index.must_outgrow(epoch):
                return
            newer = await asyncio.to_thread(self._state.raise_epoch, epoch)
            log.warning("a node had seen epoch %d; this is epoch %d now", epoch, newer)
            self.index.outgrew(newer)


def _first_epoch(config: MasterConfig, state: MasterState) -> int:
    try:
        return state.raise_epoch()
    except ResourceExhaustedError as error:
        raise ConfigError(
            f"data_dir {config.data_dir}: {error}; look at the device and its free space"
        ) from None

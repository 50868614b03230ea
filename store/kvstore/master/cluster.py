"""The parts of a master put together: index, members, watchers, durable state, epoch."""

import asyncio
import logging
import time

from kvstore_proto import master_pb2

import kvstore
from kvstore.core.locations import Locations
from kvstore.errors import ResourceExhaustedError
from kvstore.master.config import MasterConfig
from kvstore.master.membership import Membership, Node, NodeLink
from kvstore.master.metrics import MasterMetrics, StateCollector
from kvstore.master.state.base import KnownNode, MasterState
from kvstore.master.watch import Watchers

log = logging.getLogger(__name__)


class Cluster:
    """Owns everything that the services answer from. Lives on one event loop."""

    def __init__(self, config: MasterConfig, state: MasterState) -> None:
        """Begins a new epoch, durable before anybody hears of it."""
        self.config = config
        self.started = time.monotonic()
        self.locations = Locations(keys_max=config.index_keys_max)
        self.members = Membership(state.nodes(), lost_after_s=config.lost_after_s)
        self.watchers = Watchers()
        self.metrics = MasterMetrics()
        self.metrics.registry.register(StateCollector(self.locations, self.members, self.watchers))
        self.namespaces = {report.root: report for report in state.namespaces()}
        self.epoch = state.raise_epoch()
        self._state = state
        self._writing = asyncio.Lock()

    async def join(self, hello: master_pb2.NodeHello, link: NodeLink) -> Node:
        """Lets a node in and welcomes it. It starts with no blocks in the index."""
        await self._outgrow(hello.cluster_epoch)
        await self._remember(hello)
        # From here to the caller's ``finally`` nothing waits, so that no link is left behind.
        older = self.members.nodes.get(hello.node_id)
        if older is not None and older.link is not None:
            older.link.end("a newer connection of the same node took over")
            self.leave(older.link)
        node = self.members.join(hello, link, time.monotonic())
        link.send(self._welcome())
        log.info("node %s joined from %s (%s)", hello.node_id, hello.hostname, hello.address)
        return node

    def leave(self, link: NodeLink) -> None:
        """The stream of a node is over: its blocks cannot be found any more, from now on."""
        link.ended()
        if self.members.leave(link):
            blocks = self.forget_blocks(link.node_id)
            log.info("node %s is gone, with %d blocks", link.node_id, blocks)

    async def forget_node(self, node_id: str) -> None:
        """Forgets a node that is lost. It may join again, as a new one.

        NotFoundError if it is not known, PreconditionError while it is connected.
        """
        async with self._writing:
            node = self.members.forget(node_id)
            try:
                await asyncio.to_thread(self._state.remove_node, node_id)
            except ResourceExhaustedError:
                self.members.nodes.setdefault(node_id, node)
                raise
        log.info("node %s is forgotten", node_id)

    def forget_blocks(self, node_id: str) -> int:
        """Removes a node's blocks from the index and tells the watchers; returns their number."""
        blocks = sum(n for p, n in self.locations.counts().items() if p.node_id == node_id)
        self.watchers.publish_cleared(self.locations.remove_node(node_id))
        return blocks

    async def add_namespace(self, report: master_pb2.NamespaceReport) -> None:
        """Keeps what a namespace is; ResourceExhaustedError where there are too many."""
        if self.namespaces.get(report.root) == report:
            return
        async with self._writing:
            await asyncio.to_thread(self._state.put_namespace, report)
        self.namespaces[report.root] = report

    async def watch_nodes(self) -> None:
        """Ends the sessions of nodes that fell silent, and lets the index forget; never returns."""
        while True:
            await asyncio.sleep(self.config.heartbeat_ms / 4000)
            self.locations.trim()
            for link in self.members.overdue(time.monotonic()):
                log.warning("node %s sent nothing for %g s", link.node_id, self.config.lost_after_s)
                link.end(f"no report for {self.config.lost_after_s:g} s")
                self.leave(link)

    async def _remember(self, hello: master_pb2.NodeHello) -> None:
        known = KnownNode(hello.node_id, hello.address, hello.hostname, hello.version)
        before = self.members.nodes.get(hello.node_id)
        if before is not None and before.known == known:
            return
        try:
            async with self._writing:
                await asyncio.to_thread(self._state.put_node, known)
        except ResourceExhaustedError as error:
            log.warning("node %s will not be remembered: %s", hello.node_id, error)

    async def _outgrow(self, epoch: int) -> None:
        """Moves on to an epoch newer than one that a node has seen from another master."""
        async with self._writing:
            if epoch <= self.epoch:
                return
            self.epoch = await asyncio.to_thread(self._state.raise_epoch, epoch)
        log.warning("a node had seen epoch %d; this is epoch %d now", epoch, self.epoch)
        for node in self.members.connected():
            if node.link is not None:
                node.link.send(self._welcome())

    def _welcome(self) -> master_pb2.Directive:
        return master_pb2.Directive(
            welcome=master_pb2.MasterWelcome(
                cluster_epoch=self.epoch,
                heartbeat_ms=self.config.heartbeat_ms,
                version=kvstore.__version__,
            )
        )

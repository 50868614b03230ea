"""The master of the simulation: the real index, membership and epoch over a virtual wire."""

from typing import TYPE_CHECKING

from kvstore.errors import KVStoreError
from kvstore.master.cluster_index import ClusterIndex
from kvstore.master.config import MasterConfig
from kvstore.master.membership import Node as Member
from kvstore.master.membership import NodeLink, NodeState, check_hello
from kvstore.master.metrics import MasterMetrics
from kvstore.node.reports import Report
from kvstore_proto import master_pb2

from tests.sim.network import Stream

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

CONFIG = MasterConfig(heartbeat_ms=1000)
METRICS = MasterMetrics()  # nobody looks at them here
Place = tuple[str, int, bytes, bytes]  # node, tier, root, key


class Master:
    """What survives a crash (the epoch), and the current life."""

    def __init__(self, cluster: "Cluster") -> None:
        self.world = cluster.world
        self.cluster = cluster
        self.epoch = 0  # durable
        self.up = False
        self._life = 0

    def start(self) -> None:
        """A new life, a new epoch, an empty index."""
        self.up = True
        self._life += 1
        self.epoch += 1
        self.index = ClusterIndex(CONFIG, [], self.epoch, METRICS)
        self.links: dict[Stream, tuple[Member, NodeLink]] = {}
        self.streams: dict[Stream, None] = {}
        self.world.after(0.25, "master watch", self._watch, self._life)

    def crash(self) -> None:
        """The process is gone."""
        self.up = False
        for stream in list(self.streams):
            stream.close(self)

    def _watch(self, life: int) -> bool:
        if not self.up or life != self._life:
            return False
        self.index.locations.trim()
        self.index.end_silent(self.world.now)
        self._flush()
        self.world.after(0.25, "master watch", self._watch, life)
        return True

    def received(self, stream: Stream, report: Report) -> None:
        """A report of a node."""
        entry = self.links.get(stream)
        try:
            if entry is not None:
                self.index.take(*entry, report, self.world.now)
            else:
                self._admit(stream, report.hello)
        except KVStoreError:
            self._end(stream)
        self._flush()

    def _admit(self, stream: Stream, hello: master_pb2.NodeHello) -> None:
        check_hello(hello)
        if self.index.must_outgrow(hello.cluster_epoch):
            self.epoch = max(self.epoch, hello.cluster_epoch) + 1
            self.index.outgrew(self.epoch)
        link = NodeLink(hello, None)
        self.links[stream] = (self.index.join(hello, link, self.world.now), link)

    def broken(self, stream: Stream) -> None:
        """A node's stream is over."""
        self.streams.pop(stream, None)
        entry = self.links.pop(stream, None)
        if entry is not None:
            self.index.leave(entry[1])

    def _end(self, stream: Stream) -> None:
        stream.close(self)
        self.broken(stream)

    def _flush(self) -> None:
        """Sends what is queued for the nodes, and ends the streams that are to end."""
        for stream, (_, link) in list(self.links.items()):
            while not link.outgoing.empty():
                directive = link.outgoing.get_nowait()
                directive.cluster_epoch = self.index.epoch
                stream.send(self, directive)
            if link.ended_because:
                self._end(stream)

    def order(self, directive: master_pb2.Directive) -> None:
        """Queues a directive for one of the nodes that are here."""
        links = [link for _, link in self.links.values()]
        if links:
            self.world.random.choice(links).send(directive)
            self._flush()

    def places(self) -> set[Place]:
        """All that the index knows."""
        pages = self.index.locations.pager()(lambda _place: True, b"", 1 << 30)
        return {
            (place.node_id, int(place.tier), place.root, key)
            for key, places in pages.rows
            for place in places
        }

    def ready(self) -> list[str]:
        """Nodes whose inventory is complete."""
        return [node.known.node_id for node in self.index.members.in_state(NodeState.READY)]

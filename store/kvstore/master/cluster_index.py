"""Members, the index of their blocks and the epoch, as reports and time change them; no I/O."""

import logging
import math
from collections import Counter

from kvstore_proto import common_pb2, master_pb2

import kvstore
from kvstore.core.keys import KEY_BYTES
from kvstore.core.locations import Locations
from kvstore.core.types import Tier
from kvstore.errors import InvalidArgumentError, PreconditionError
from kvstore.master.config import MasterConfig
from kvstore.master.membership import Membership, Node, NodeLink, NodeState
from kvstore.master.messages import REAL_TIERS, check_root, real_tiers
from kvstore.master.metrics import MasterMetrics
from kvstore.master.state.base import KnownNode
from kvstore.master.watch import Watchers

log = logging.getLogger(__name__)

EPOCH_STEP_MAX = 1 << 20  # a master begins one epoch a start
RESYNCS_MAX = 3
PROBLEMS_MAX = 8  # of one node
PROBLEM_CHARS_MAX = 1024
ENGINE_ID_CHARS_MAX = 256  # as nodes take them of their clients


class ClusterIndex:
    """What a master decides when a node comes, reports, falls silent or goes.

    A node's blocks can be found from the report that names them until its session ends. ``now``
    is monotonic seconds.
    """

    def __init__(
        self, config: MasterConfig, known: list[KnownNode], epoch: int, metrics: MasterMetrics
    ) -> None:
        self.config = config
        self.epoch = epoch
        self.locations = Locations(keys_max=config.index_keys_max)
        self.members = Membership(known, lost_after_s=config.lost_after_s)
        self.watchers = Watchers()
        self.reported: Counter[bytes] = Counter()  # roots, by how many of the nodes here have them
        self._metrics = metrics

    # Nodes

    def join(self, hello: master_pb2.NodeHello, link: NodeLink, now: float) -> Node:
        """Lets a node in and welcomes it. It starts with no blocks in the index.

        Its epoch must have been outgrown before: no node is welcomed under one that is not newer
        than what it has seen from another master.
        """
        self.check_rival(hello, now)
        older = self.members.nodes.get(hello.node_id)
        if older is not None and older.link is not None:
            if older.link.instance != hello.instance:
                older.replaced.append(older.link.instance)
            older.link.end(f"a newer connection of this node, from {hello.address}, took over")
            self.leave(older.link)
        node = self.members.join(hello, link, now)
        node.rival_at = -math.inf
        if hello.instance in node.replaced:
            node.replaced.remove(hello.instance)
        link.send(self._welcome())
        return node

    def check_rival(self, hello: master_pb2.NodeHello, now: float) -> None:
        """PreconditionError for a node whose id another one took over that is here.

        One that comes back after that lives: two nodes have one id, and would throw each other out
        for ever. The one that came last stays.
        """
        node = self.members.nodes.get(hello.node_id)
        if node is None or node.link is None or node.link.instance == hello.instance:
            return
        if hello.instance not in node.replaced:
            return
        error = (
            f"two nodes have the id {hello.node_id}: one at {node.known.address}, which is here, "
            f"and one at {hello.address}, which is refused; stop one of them, or give it a data "
            "directory and an id (--node-id) of its own"
        )
        if not node.has_rival(now):
            log.warning("%s", error)
        node.rival, node.rival_at = hello.address, now
        raise PreconditionError(error)

    def leave(self, link: NodeLink) -> None:
        """The stream of a node is over: its blocks cannot be found any more, from now on."""
        link.ended()
        for root in list(link.roots):
            self._has_no_more(link, root)
        if self.members.leave(link):
            blocks = self.forget_blocks(link.node_id)
            log.info("node %s is gone, with %d blocks", link.node_id, blocks)

    def forget_blocks(self, node_id: str) -> int:
        """Removes a node's blocks from the index and tells the watchers; returns their number."""
        blocks = sum(n for p, n in self.locations.counts().items() if p.node_id == node_id)
        self.watchers.publish_cleared(self.locations.remove_node(node_id))
        return blocks

    def end_silent(self, now: float) -> None:
        """Ends the sessions of nodes that fell silent; to be called several times a heartbeat."""
        for link in self.members.overdue(now):
            log.warning("node %s sent nothing for %g s", link.node_id, self.config.lost_after_s)
            link.end(f"no report for {self.config.lost_after_s:g} s")
            self.leave(link)

    # Namespaces

    def heard(self, node: Node, link: NodeLink, now: float) -> None:
        """What the node has said meanwhile can be read again."""
        if node.link is link:
            node.last_seen = now

    def has(self, node: Node, link: NodeLink, root: bytes) -> None:
        """The node has this namespace, which is kept, until it drops it or leaves."""
        if node.link is link and root not in link.roots:
            link.roots.add(root)
            self.reported[root] += 1

    def _has_no_more(self, link: NodeLink, root: bytes) -> None:
        if root in link.roots:
            link.roots.remove(root)
            self.reported[root] -= 1
            if not self.reported[root]:
                del self.reported[root]

    # The epoch

    def must_outgrow(self, seen: int) -> bool:
        """Whether a node has seen an epoch, from another master, that is newer than ours.

        InvalidArgumentError if it is so much newer that no master's starts can explain it: the
        step would be durable, and a few like it the end of all epochs.
        """
        if seen > self.epoch + EPOCH_STEP_MAX:
            raise InvalidArgumentError(
                f"cluster epoch {seen} is more than {EPOCH_STEP_MAX} above epoch {self.epoch} of "
                "this master; restart the node: it takes this master's epoch then"
            )
        return seen > self.epoch

    def outgrew(self, epoch: int) -> None:
        """A newer epoch is durable: the nodes that are here are moved on to it."""
        self.epoch = epoch
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

    # Reports

    def take(self, node: Node, link: NodeLink, report: master_pb2.NodeReport, now: float) -> None:
        """One report of a node that is here; a namespace that it has is the caller's to keep."""
        kind = report.WhichOneof("report")
        node.last_seen = now
        match kind:
            case "inventory":
                self._take_inventory(link, report.inventory)
            case "inventory_end":
                self._end_inventory(node, link, report.inventory_end.blocks)
            case "delta":
                self._index(link.node_id, report.delta)
            case "heartbeat":
                node.sessions = report.heartbeat.sessions
                node.tiers = self._real_tiers(link, report.heartbeat)
                node.ssd_admission = report.heartbeat.ssd_admission[:PROBLEM_CHARS_MAX]
                node.problems = [
                    text[:PROBLEM_CHARS_MAX] for text in report.heartbeat.problems[:PROBLEMS_MAX]
                ]
            case "dropped":
                check_root(report.dropped.root)
                self._has_no_more(link, report.dropped.root)
                link.unkept.pop(report.dropped.root, None)
                self.locations.remove_namespace(link.node_id, report.dropped.root)
            case "result":
                link.resolve(report.result)
            case "hello":
                raise PreconditionError("a session has one hello, the first report")

    def _real_tiers(
        self, link: NodeLink, heartbeat: master_pb2.Heartbeat
    ) -> list[common_pb2.TierUsage]:
        tiers = real_tiers(heartbeat.tiers)
        if len(tiers) < len(heartbeat.tiers) and not link.odd_tiers:
            link.odd_tiers = True
            log.warning(
                "node %s reports the space of tiers %s; of these only HBM (1), DRAM (2) and SSD "
                "(3) count, each once",
                link.node_id,
                ", ".join(str(int(usage.tier)) for usage in heartbeat.tiers[:8]),
            )
        return tiers

    def _take_inventory(self, link: NodeLink, events: master_pb2.BlockEvents) -> None:
        self._restart_inventory(link)
        link.inventory_keys += len(events.stored) // KEY_BYTES
        self._index(link.node_id, events)

    def _restart_inventory(self, link: NodeLink) -> None:
        if link.restart_inventory:
            link.restart_inventory = False
            link.inventory_keys = 0
            self.forget_blocks(link.node_id)

    def _end_inventory(self, node: Node, link: NodeLink, sent: int) -> None:
        """Checks that everything arrived; if not, asks for the whole inventory again."""
        self._restart_inventory(link)
        if link.inventory_keys == sent:
            node.state = NodeState.READY
            log.info("node %s is ready with %d blocks", link.node_id, sent)
            return
        log.error("node %s sent %d blocks, %d came", link.node_id, sent, link.inventory_keys)
        link.resyncs += 1
        self._metrics.resyncs.inc()
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
        if int(events.tier) not in REAL_TIERS:
            raise InvalidArgumentError(
                f"blocks cannot be in tier {events.tier}; take HBM, DRAM, SSD"
            )
        if len(events.engine_id) > ENGINE_ID_CHARS_MAX:
            raise InvalidArgumentError(
                f"an engine id has {len(events.engine_id)} characters; take at most "
                f"{ENGINE_ID_CHARS_MAX}"
            )
        name = (node_id, Tier(events.tier), events.root, events.engine_id)
        if events.cleared:
            self.locations.clear(self.locations.place(*name))
        # A place is made anew for each: one that nothing is in is forgotten.
        if events.removed:
            self.locations.removed(self.locations.place(*name), events.removed)
        if events.stored:
            refused = self.locations.stored(self.locations.place(*name), events.stored)
            self._metrics.refused.inc(refused)
        if len(self.watchers):
            events.node_id = node_id
            self.watchers.publish(events)

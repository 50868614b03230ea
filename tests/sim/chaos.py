"""What goes wrong, and when it is mended."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvstore.node.reports import Report
from kvstore_proto import common_pb2, master_pb2

from tests.sim.network import Stream
from tests.sim.oracle import must

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.node import Node

EVERY_S = 0.1
CALM_S = 2.0  # so long after the last fault the clients ask for less


class Impostor:
    """A master that was replaced, and answers still: its epoch is old, its orders do harm."""

    def __init__(self, cluster: "Cluster") -> None:
        self._master_epoch = max(1, cluster.master.epoch - 1)

    def received(self, stream: Stream, report: Report) -> None:
        """Welcomes whoever comes, and tells it to forget everything."""
        if report.WhichOneof("report") == "hello" and report.hello.cluster_epoch:
            epoch = min(self._master_epoch, report.hello.cluster_epoch - 1)
            welcome = master_pb2.MasterWelcome(cluster_epoch=epoch, heartbeat_ms=1000)
            stream.send(self, master_pb2.Directive(welcome=welcome, cluster_epoch=epoch))
            purge = master_pb2.PurgeNamespace()
            stream.send(self, master_pb2.Directive(id=9, purge=purge, cluster_epoch=epoch))
        stream.close(self)

    def broken(self, stream: Stream) -> None:
        """It does not care."""


class Chaos:
    """Draws faults; each ends by itself after a while, and all of them at ``end``."""

    def __init__(self, cluster: "Cluster") -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.faults = 0
        self.ended = False
        self._ended_at = 0.0
        self._swallow = 0.0
        self._impostor = 0.0
        self._kinds: list[tuple[Callable[[], None], float]] = [
            (self._break_session, 8),
            (self._break_link, 2),
            (self._trouble_link, 4),
            (self._cut_link, 2),
            (self._kill_client, 2),
            (self._crash_node, 1.5),
            (self._crash_master, 1),
            (self._flip, 3),
            (self._fail_disk, 2),
            (self._order, 3),
            (self._stale_order, 1),
            (self._scrub, 3),
            (self._swallow_reports, 1),
            (self._replace_master, 1),
        ]
        self._later(EVERY_S, "chaos", self._strike)

    def _later(self, delay_s: float, what: str, call: Callable[[], object]) -> None:
        self.world.after(delay_s, what, lambda: False if self.ended else call())

    def _strike(self) -> None:
        self._later(self.world.soon(EVERY_S), "chaos", self._strike)
        kinds, weights = zip(*self._kinds, strict=True)
        kind = self.world.random.choices(kinds, weights)[0]
        self.faults += 1
        self.world.note(kind.__name__)
        kind()

    def pause(self) -> float:
        """How long clients think, compared with their pace under faults.

        Two thirds of the load go on for a while after the faults; then a tenth, as what is left to
        show is that everything comes back in time.
        """
        if not self.ended:
            return 1.0
        return 1.5 if self.world.now < self._ended_at + CALM_S else 10.0

    def end(self) -> None:
        """Everything is mended at once."""
        cluster = self.cluster
        self.ended = True
        self._ended_at = self.world.now
        self._swallow = self._impostor = 0.0
        for link in cluster.links.values():
            link.heal()
        if not cluster.master.up:
            cluster.master.start()
        for node in cluster.nodes:
            if not node.up:
                node.start()
            node.device.failing = 0.0
        for client in cluster.clients:
            if not client.alive:
                client.start()

    # Wires

    def _break_session(self) -> None:
        """A client's stream ends, and its process lives."""
        clients = [c for c in self.cluster.clients if c.alive and c.stream is not None]
        if clients:
            # Rather of those who hold something: with them it matters.
            weights = [1 + 10 * sum(len(r.holds) for r in c.readings) for c in clients]
            stream = self.world.random.choices(clients, weights)[0].stream
            assert stream is not None
            stream.cut()

    def _break_link(self) -> None:
        """A node's stream to its master ends."""
        node = self.world.random.choice(self.cluster.nodes)
        if node.up and node.master.stream is not None:
            node.master.stream.cut()

    def _trouble_link(self) -> None:
        random = self.world.random
        link = random.choice(list(self.cluster.links.values()))
        link.lost, link.doubled = random.choice((0.0, 0.3)), random.choice((0.0, 0.3))
        link.delay_s = link.usual_s * random.choice((1, 1, 20))
        self._later(random.uniform(0.3, 2.0), "link mended", link.heal)

    def _cut_link(self) -> None:
        """Only between hosts: a client's wire to its node is a socket of one machine."""
        node = self.world.random.choice(self.cluster.nodes)
        link = self.cluster.links["master", node.node_id]
        link.cut = True
        self._later(self.world.random.choice((0.5, 1.5, 3.0)), "link mended", link.heal)

    def swallows(self) -> bool:
        """Whether this report of an inventory gets lost."""
        return bool(self._swallow) and self.world.chance(self._swallow)

    def _swallow_reports(self) -> None:
        self._swallow = 0.5
        self._later(1.0, "no report is swallowed", self._swallow_none)
        self._break_link()

    def _swallow_none(self) -> None:
        self._swallow = 0.0

    # Processes

    def _kill_client(self) -> None:
        client = self.world.random.choice(self.cluster.clients)
        if client.alive:
            client.kill()
            self._later(self.world.soon(0.3), f"{client.name} starts", client.start)

    def _crash_node(self) -> None:
        node = self.world.random.choice(self.cluster.nodes)
        if not node.up:
            return
        node.crash(power=self.world.chance(0.5))
        if self.world.chance(0.2):
            node.medium.cut_off(self.world)
        self._later(self.world.soon(0.4), f"{node.node_id} starts", node.start)

    def _crash_master(self) -> None:
        master = self.cluster.master
        if master.up:
            master.crash()
            if self.world.chance(0.3):
                master.epoch = max(0, master.epoch - 2)  # an older copy of its state
            self._later(self.world.soon(0.5), "master starts", master.start)

    def _replace_master(self) -> None:
        """For a while an older master answers in the place of the real one."""
        self._impostor = 0.7
        self._later(1.0, "the impostor goes", self._no_impostor)
        self._break_link()

    def _no_impostor(self) -> None:
        self._impostor = 0.0

    def impostor_answers(self) -> bool:
        """Whether a node that connects meets a master of an older epoch."""
        return bool(self._impostor) and self.world.chance(self._impostor)

    # Disks

    def _flip(self) -> None:
        self.world.random.choice(self.cluster.nodes).medium.flip(self.world)

    def _fail_disk(self) -> None:
        node = self.world.random.choice(self.cluster.nodes)
        if node.up:
            device = node.device
            device.failing = 0.3

            def works() -> None:
                device.failing = 0.0

            self._later(0.5, f"{node.node_id} disk works", works)

    def _scrub(self) -> None:
        for node in self.cluster.nodes:
            if node.up:
                node.scrub()

    # Administration

    def _directive(self, epoch: int = 0) -> master_pb2.Directive:
        random = self.world.random
        if random.random() < 0.3:
            root = random.choice([b"", *(space.root for space in self.cluster.spaces)])
            purge = master_pb2.PurgeNamespace(root=root)
            return master_pb2.Directive(id=7, purge=purge, cluster_epoch=epoch)
        chain = random.choice(random.choice(self.cluster.spaces).chains)
        keys = random.choice((b"", chain.joined))
        tier = master_pb2.EvictBlocks(
            tier=random.choice((common_pb2.TIER_DRAM, common_pb2.TIER_SSD)),
            keys=keys,
            bytes=random.choice((0, 8192)),
            drop=random.random() < 0.5,
        )
        return master_pb2.Directive(id=7, evict=tier, cluster_epoch=epoch)

    def _order(self) -> None:
        if self.cluster.master.up:
            self.cluster.master.order(self._directive())

    def _stale_order(self) -> None:
        """I5: what an old master ordered long ago comes now, and changes nothing."""
        node: Node = self.world.random.choice(self.cluster.nodes)
        newest = node.core.epoch.newest if node.up else 0
        if newest > 1:
            before = set(node.told)
            node.master.reports.obey(self._directive(newest - 1))
            must(node.told == before, "I5", "an order under an old epoch was carried out")
            must(node.core.epoch.newest == newest, "I5", "the epoch went back")

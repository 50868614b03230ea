"""The whole cluster in one process: a master, three nodes, four clients, and the checks."""

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.core.clients import Sight

from tests.sim.chaos import Chaos, Impostor
from tests.sim.client import Client
from tests.sim.final import final_reads
from tests.sim.master import Master
from tests.sim.master_session import MasterSession
from tests.sim.network import Link, Stream
from tests.sim.node import Node
from tests.sim.oracle import Oracle, must
from tests.sim.scenery import spaces
from tests.sim.world import World

NODES = 3
HOSTS = ((0, 0, 1, 2), (0, 0, 1, 1), (0, 1, 1, 1), (0, 0, 0, 2))  # the node of each client
TENANT_OF = ("red", "blue", "red", "blue")
CHECK_EVERY_STEPS = 20
HEAL_S = 5.0 + 2.0  # and two heartbeats
RECONNECT_S = 2.0
LEAVE_S = 2.5  # the quarantine, and some


@dataclass(frozen=True)
class Result:
    """What one seed did."""

    steps: int
    reads: int
    acked: int
    discarded: int
    faults: int
    trace_hash: str


class Cluster:
    """Everything of one seed."""

    def __init__(self, seed: int, show: Callable[[str], None] | None = None) -> None:
        self.world = World(seed, show)
        self.oracle = Oracle(seed)
        self.master = Master(self)
        self.nodes = [Node(self, number) for number in range(NODES)]
        self.links = {
            (end, node.node_id): Link(f"{end}-{node.node_id}", delay_s)
            for end, delay_s in (("master", 0.01), ("clients", 0.002))
            for node in self.nodes
        }
        self.chaos = Chaos(self)
        self.master.start()
        for node in self.nodes:
            node.start()
        first = self.nodes[0].namespaces
        self.spaces = spaces(self.world, {name: space.root for name, space in first.items()})
        hosts = self.world.random.choice(HOSTS)
        self.clients = [
            Client(self, number, self.nodes[at], tenant)
            for number, (at, tenant) in enumerate(zip(hosts, TENANT_OF, strict=True))
        ]
        for client in self.clients:
            client.start()

    # Wires

    def connect_node(self, client: Client, node: Node) -> Stream | None:
        """A stream of a client to its node; None where nobody listens."""
        if not node.up:
            return None
        stream = Stream(self.world, self.links["clients", node.node_id], client, node)
        node.by_stream[stream] = None
        return stream

    def connect_master(self, session: MasterSession) -> Stream | None:
        """A stream of a node to the master, or to whoever answers in its place."""
        link = self.links["master", session.node.node_id]
        if self.chaos.impostor_answers():
            return Stream(self.world, link, session, Impostor(self))
        if not self.master.up:
            return None
        stream = Stream(self.world, link, session, self.master)
        self.master.streams[stream] = None
        return stream

    def swallows(self) -> bool:
        """Whether a report of an inventory never arrives, though its stream lives."""
        return self.chaos.swallows()

    def locate(self, keys: bytes) -> None:
        """A question to the master, which may come twice, late, or never."""
        link = self.links["master", "node0"]
        for _ in range(2 if self.world.chance(0.1) else 1):
            if not self.world.chance(0.1):
                self.world.after(self.world.soon(link.delay_s), "locate", self._locate, keys)

    def _locate(self, keys: bytes) -> bool:
        if not self.master.up:
            return False
        locations = self.master.index.locations
        located = locations.locate(keys)
        for run in located.runs:
            for index in range(run.first, run.first + run.count):
                places = locations.places_of(keys[index * 32 : index * 32 + 32])
                must(run.place in places, "I1", "Locate names a place without the block")
        return True

    # Processes

    def sight_of(self, process: str) -> Sight:
        """What a pidfd says."""
        lives = any(c.alive and c.process == process for c in self.clients)
        return Sight.ALIVE if lives else Sight.GONE

    def quarantine_over(self, client_id: str) -> None:
        """A node waits no longer for a lost client that it cannot see."""
        for client in self.clients:
            if client.alive and client.client_id == client_id:
                for work in client.works():
                    if not work.session_lives:
                        work.in_doubt()

    # The run

    def run(self, steps: int) -> Result:
        """So many steps under faults; then all heals, and must be well again."""
        world = self.world
        for number in range(steps):
            world.step()
            if number % CHECK_EVERY_STEPS == 0:
                self._check(self.nodes[number // CHECK_EVERY_STEPS % NODES])
        self._heal()
        return Result(
            steps,
            self.oracle.reads,
            self.oracle.acked,
            self.oracle.discarded,
            self.chaos.faults,
            world.trace_hash,
        )

    def _check(self, node: Node) -> None:
        if node.up:
            node.check()
        for client in self.clients:
            if client.alive and client.node is node:
                for reading in client.readings:
                    reading.check()

    def _run_until(self, time: float) -> None:
        while self.world.now < time:
            self.world.step()

    def _heal(self) -> None:
        self.world.note("heal")
        self.chaos.end()
        self._run_until(self.world.now + HEAL_S)
        self._all_here()
        self._have_sessions()
        for client in self.clients:
            client.stopping = True
        self._run_until(self.world.now + 0.5)
        for client in self.clients:
            client.leave()
            client.kill()
        self._run_until(self.world.now + LEAVE_S)
        self._converged()
        for node in self.nodes:
            self._idle(node)
            final_reads(self, node)
            self._idle(node)
            node.check()

    def _have_sessions(self) -> None:
        """A client comes back once nothing of its lost session is in use any more."""
        late = [c for c in self.clients if c.stream is None and not c.works()]
        if late:
            self._run_until(self.world.now + RECONNECT_S)
        for client in late:
            must(client.stream is not None, "I9", f"{client.name} has no session")

    def _all_here(self) -> None:
        ids = [node.node_id for node in self.nodes]
        must(self.master.ready() == ids, "I9", f"only {self.master.ready()} are ready")
        for node in self.nodes:
            epoch = node.core.epoch.newest
            must(epoch == self.master.epoch, "I5", f"{node.node_id} is in epoch {epoch}")

    def _converged(self) -> None:
        held = {(node.node_id, *place) for node in self.nodes for place in node.reported}
        places = self.master.places()
        must(places == held, "I9", f"the index differs in {len(places ^ held)} places")

    def _idle(self, node: Node) -> None:
        core = node.core
        must(core.idle(), "I9", f"{node.node_id} waits for something")
        must(core.next_deadline() is None, "I9", f"{node.node_id} has a deadline")
        must(core.pinned_blocks() == 0, "I6", f"{node.node_id} has pins of nobody")
        for usage in core.usage():
            taken = usage.pending_bytes + usage.quarantined_bytes
            must(taken == 0, "I6", f"{node.node_id} leaks space: {usage}")

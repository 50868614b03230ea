"""A client of the simulation: one process with one session, its reads and its writes."""

import itertools
from typing import TYPE_CHECKING, Any

from tests.sim.network import Stream
from tests.sim.node import Hello, Node, Welcome
from tests.sim.reading import Reading
from tests.sim.scenery import Chain, Space
from tests.sim.writing import Writing

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

THINK_S = 0.2
HEAT = (8, 2, 3, 3, 3)  # how often each chain of a space is wanted


class Client:
    """A process of one tenant on one node's host; it is killed and started again."""

    def __init__(self, cluster: "Cluster", number: int, node: Node, tenant: str) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.node = node
        self.tenant = tenant
        self.name = f"client{number}"
        self.lives = 0
        self.alive = False
        self.stopping = False

    # Life and death

    def start(self) -> None:
        """A new process."""
        self.alive = True
        self.lives += 1
        self.process = self.client_id = f"{self.name}.{self.lives}"
        self.seen = self.world.chance(0.35)
        self.ids = itertools.count(1)
        self.stream: Stream | None = None
        self.welcome: Welcome | None = None
        self.receivers: dict[int, Any] = {}
        self.readings: list[Reading] = []
        self.writings: list[Writing] = []
        self._connect()
        self.later("think", self.world.soon(THINK_S), self._think)

    def kill(self) -> None:
        """SIGKILL: nothing of it touches anything any more."""
        self.alive = False
        for work in self.works():
            work.drop()
        if self.stream is not None:
            self.stream.close(self)
        if self.seen:
            delay = self.world.soon(0.05)
            self.world.after(delay, f"{self.name} pidfd", self._tell_end, self.process)

    def _tell_end(self, process: str) -> bool:
        if self.node.up:
            self.node.process_ended(process)
        return self.node.up

    def later(self, what: str, delay_s: float, call: Any, *arguments: Any) -> None:
        """Has ``call`` happen in this life of the process."""
        life = self.lives

        def happen() -> object:
            return call(*arguments) if self.alive and life == self.lives else False

        self.world.after(delay_s, f"{self.name} {what}", happen)

    def works(self) -> list[Reading | Writing]:
        """All that holds, or waits for, something."""
        return [*self.readings, *self.writings]

    # The session

    def _connect(self) -> None:
        self.stream = self.cluster.connect_node(self, self.node)
        if self.stream is None:
            self.later("reconnect", 0.3, self._reconnect)
            return
        self.stream.send(self, Hello(self.client_id, self.process, True, self.seen))

    def _reconnect(self) -> bool:
        """Comes back once nothing of the lost session is in use."""
        if self.stream is not None:
            return False
        if self.readings or self.writings:
            self.later("settle", 0.2, self._reconnect)
            return False
        self._connect()
        return True

    def broken(self, stream: Stream) -> None:
        """The node's end is gone, or the wire: what is held is in doubt."""
        if not self.alive or stream is not self.stream:
            return
        self.stream = self.welcome = None
        self.receivers.clear()
        for reading in self.readings:
            reading.lost()
        for writing in list(self.writings):
            writing.lost()
        self.later("reconnect", self.world.soon(0.5), self._reconnect)

    def leave(self) -> None:
        """Says goodbye; comes back unless it is stopping."""
        if self.stream is None or self.welcome is None:
            return
        self.stream.send(self, "goodbye")
        for work in self.works():
            work.drop()
        self.readings.clear()
        self.writings.clear()
        self.receivers.clear()
        self.stream.close(self)
        self.stream = self.welcome = None
        if not self.stopping:
            self.later("reconnect", self.world.soon(0.5), self._reconnect)

    def received(self, stream: Stream, message: Any) -> None:
        """An answer."""
        if not self.alive or stream is not self.stream:
            return
        if isinstance(message, Welcome):
            self.welcome = message
            return
        request, body = message
        receiver = self.receivers.get(request)
        if receiver is not None:
            receiver(body)

    def ask(self, receiver: Any, kind: str, *rest: Any) -> int:
        """Sends a request; its answers go to ``receiver``."""
        request = next(self.ids)
        if receiver is not None:
            self.receivers[request] = receiver
        if self.stream is not None:
            self.stream.send(self, (kind, request, *rest))
        return request

    # What it does

    def _think(self) -> bool:
        if self.stopping:
            return False
        self.later("think", self.world.soon(self.cluster.chaos.pause() * THINK_S), self._think)
        if self.welcome is None:
            return False
        action = self.world.random.choices(
            (self._read, self._write, self._prefetch, self._match, self._locate, self.leave),
            (10, 9, 2, 1, 2, 0 if self.cluster.chaos.ended else 0.3),
        )[0]
        action()
        return True

    def part(self) -> tuple[Space, Chain, int, int]:
        """Some consecutive keys of a chain of its tenant."""
        random = self.world.random
        mine = [space for space in self.cluster.spaces if space.tenant == self.tenant]
        space = random.choices(mine, (5, 1))[0]
        chain = random.choices(space.chains, HEAT[: len(space.chains)])[0]
        count = len(chain.keys)
        first = random.choice((0, 0, 0, random.randrange(count)))
        return space, chain, first, random.randint(first + 1, count)

    def _read(self) -> None:
        if len(self.readings) < 6:
            self.readings.append(Reading(self, *self.part()))

    def _write(self) -> None:
        if len(self.writings) < 6:
            self.writings.append(Writing(self, *self.part()))

    def _prefetch(self) -> None:
        space, chain, first, last = self.part()
        keys = b"".join(chain.keys[first:last])
        parent = chain.keys[first - 1] if first else b""
        self.ask(None, "prefetch", self.namespace(space), keys, parent)

    def _match(self) -> None:
        """Looks into the directory; what it says is a hint, so only that it can be read."""
        _, chain, first, last = self.part()
        assert self.welcome is not None
        self.welcome.directory.match(b"".join(chain.keys[first:last]))

    def _locate(self) -> None:
        _, chain, first, last = self.part()
        self.cluster.locate(b"".join(chain.keys[first:last]))

    def namespace(self, space: Space) -> int:
        """Of this life of the node."""
        assert self.welcome is not None
        return self.welcome.namespaces[space.tenant, space.spec].id

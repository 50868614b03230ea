"""A node's session with its master: the wire and the timers around the real Reports."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvstore.core.types import Tier
from kvstore.errors import KVStoreError
from kvstore.node.master_link import BACKOFF_MAX_S, BACKOFF_MIN_S, BATCH_S
from kvstore.node.reports import Report, Reports
from kvstore_proto import master_pb2

from tests.sim.network import Stream
from tests.sim.oracle import must

if TYPE_CHECKING:
    from tests.sim.node import Node

WELCOME_TIMEOUT_S = 5.0


class MasterSession:
    """One life of a node, as its master sees it: connects, tells, obeys, connects again."""

    def __init__(self, node: "Node") -> None:
        self.node = node
        self.world = node.world
        self.reports = Reports(node)
        self.stream: Stream | None = None
        self._dead = False
        self._backoff_s = BACKOFF_MIN_S
        self._due: Iterator[Report] | None = None
        self._waking = False
        self._more = False  # came after the current round began
        self._beat_s = 1.0

    def start(self) -> None:
        """Begins to connect."""
        self._again("connect", 0.01, self._connect)

    def die(self) -> None:
        """The node's process is gone."""
        self._dead = True
        if self.stream is not None:
            self.stream.close(self)
            self.stream = None

    def _again(self, what: str, delay_s: float, call: Any, *arguments: Any) -> None:
        def happen() -> object:
            return False if self._dead else call(*arguments)

        self.world.after(delay_s, f"{self.node.node_id} {what}", happen)

    def _connect(self) -> None:
        self.stream = self.node.cluster.connect_master(self)
        if self.stream is None:
            self._lost()
            return
        self.stream.send(self, self.reports.hello())
        self._again("welcome timeout", WELCOME_TIMEOUT_S, self._check_welcome, self.stream)

    def _check_welcome(self, stream: Stream) -> bool:
        if stream is not self.stream or self.reports.connected:
            return False
        self._end()
        return True

    def _end(self) -> None:
        if self.stream is not None:
            self.stream.close(self)
        self._lost()

    def _lost(self) -> None:
        connected = self.reports.connected
        self._backoff_s = BACKOFF_MIN_S if connected else min(2 * self._backoff_s, BACKOFF_MAX_S)
        self.reports.ended()
        self.stream = self._due = None
        wait = self._backoff_s * self.world.random.uniform(0.5, 1.0)
        self._again("reconnect", wait, self._connect)

    def broken(self, stream: Stream) -> None:
        """The stream is over."""
        if stream is self.stream:
            self._lost()

    def received(self, stream: Stream, message: master_pb2.Directive) -> None:
        """A directive."""
        if stream is not self.stream:
            return
        before, held = self.node.core.epoch.newest, len(self.node.told)
        ordered = max(message.cluster_epoch, message.welcome.cluster_epoch)
        if not self.reports.connected:
            try:
                self.reports.welcomed(message.welcome)
            except KVStoreError:
                self._end()
                return
            self._beat_s = message.welcome.heartbeat_ms / 2000
            self._wake()
            self._again("heartbeat", 0.0, self._beat, stream)
        else:
            self.reports.obey(message)
            self._wake()
        must(self.node.core.epoch.newest >= before, "I5", "the epoch went back")
        if ordered < before:
            must(len(self.node.told) == held, "I5", "an order under an old epoch was carried out")

    def changed(self, root: bytes, tier: Tier, stored: bytes, removed: bytes) -> None:
        """Blocks came into or left a tier."""
        self.reports.changed(root, tier, "", stored, removed)
        self._wake()

    def _wake(self) -> None:
        self._more = True
        if self.reports.connected and not self._waking:
            self._waking = True
            self._again("tell", 0.0 if self.reports.urgent else BATCH_S, self._tell)

    def _tell(self) -> bool:
        """Sends some of what is due; a slow stream takes the rest later."""
        self._waking = False
        if self.stream is None or not self.reports.connected:
            return False
        if self._due is None:
            self._more = False
            self._due = self.reports.due()
        for _ in range(self.world.random.choice((2, 100))):
            report = next(self._due, None)
            if report is None:
                self._due = None
                if self._more:
                    self._wake()
                return True
            if report.WhichOneof("report") == "inventory" and self.node.cluster.swallows():
                continue
            self.stream.send(self, report)
        self._waking = True
        self._again("tell on", 0.02, self._tell)
        return True

    def _beat(self, stream: Stream) -> bool:
        if stream is not self.stream:
            return False
        stream.send(self, self.reports.heartbeat())
        self._again("heartbeat", self._beat_s, self._beat, stream)
        return True

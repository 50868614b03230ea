"""Who the clients are: their sessions, and what becomes of what they held when they are lost."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore_proto import node_pb2

from kvstore.errors import (
    InvalidArgumentError,
    KVStoreError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from kvstore.node.driver import Driver, ReplySink
from kvstore.node.process_watch import ProcessWatch, Sight

log = logging.getLogger(__name__)

NAME_CHARS_MAX = 256


@dataclass(eq=False)
class Client:
    """One session of one client process."""

    id: int
    client_id: str
    name: str
    engine_id: str
    end_stream: Callable[[KVStoreError], None]
    watch: ProcessWatch | None = None
    lost: bool = False  # the stream has ended without a Goodbye
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Clients:
    """All sessions from their Hello until nothing that they held can be in use any more.

    After its stream, a session holds its space until the process is gone as well; where the
    process cannot be seen, for ``quarantine_s``. A client that says it is settled ends that wait.
    """

    def __init__(self, driver: Driver, *, quarantine_s: float, sessions_max: int) -> None:
        self._driver = driver
        self._quarantine_s = quarantine_s
        self._sessions_max = sessions_max
        self._ids = itertools.count(1)
        self._clients: dict[int, Client] = {}

    @property
    def open_count(self) -> int:
        """Sessions whose stream is open."""
        return sum(not client.lost for client in self._clients.values())

    def has_engine(self, engine_id: str) -> bool:
        """Whether a session of this engine is open."""
        return any(c.engine_id == engine_id and not c.lost for c in self._clients.values())

    def admit(
        self, hello: node_pb2.Hello, sink: ReplySink, end_stream: Callable[[KVStoreError], None]
    ) -> Client:
        """Opens a session; ``end_stream`` ends its stream from this side."""
        if not hello.client_id or max(map(len, (hello.client_id, hello.name, hello.engine_id))) > (
            NAME_CHARS_MAX
        ):
            raise InvalidArgumentError(
                f"Hello needs a client_id, and names of at most {NAME_CHARS_MAX} characters"
            )
        if hello.settled:
            for client in [c for c in self._clients.values() if c.client_id == hello.client_id]:
                self.settle(client)
                if not client.lost:
                    client.end_stream(PreconditionError("this client says it is settled elsewhere"))
        if self.open_count >= self._sessions_max:
            raise ResourceExhaustedError(
                f"{self._sessions_max} sessions are open; close some, or raise sessions_max"
            )
        client = Client(next(self._ids), hello.client_id, hello.name, hello.engine_id, end_stream)
        self._driver.core.open_session(client.id)
        self._clients[client.id] = client
        client.watch = ProcessWatch(
            hello.pid,
            hello.pid_namespace,
            hello.process_start_ticks,
            lambda: self._process_ended(client),
        )
        self._driver.sinks[client.id] = sink
        log.info("client %s (%s) is here, process %s", *_label(client), client.watch.sight.value)
        return client

    def stream_ended(self, client: Client) -> None:
        """The stream is over and no Goodbye was said: waits for the process to end."""
        if client.id not in self._clients:
            return
        client.lost = True
        self._driver.sinks.pop(client.id, None)
        sight = client.watch.sight if client.watch else Sight.UNSEEN
        if sight is Sight.GONE:
            self.settle(client)
            return
        self._driver.apply(self._driver.core.session_quarantined(client.id, self._driver.now()))
        log.info("client %s (%s) lost its stream, process %s", *_label(client), sight.value)
        if sight is Sight.UNSEEN:
            loop = asyncio.get_running_loop()
            client.timer = loop.call_later(self._quarantine_s, self.settle, client)

    def goodbye(self, client: Client) -> None:
        """The client said that it holds nothing any more."""
        self.settle(client)

    def settle(self, client: Client) -> None:
        """Nothing that the session held is in use: all of it is free at once."""
        if self._clients.pop(client.id, None) is None:
            return
        self._driver.sinks.pop(client.id, None)
        self._forget(client)
        self._driver.apply(self._driver.core.session_settled(client.id, self._driver.now()))
        log.info("client %s (%s) is settled", *_label(client))

    def end_all(self) -> None:
        """The node is about to stop: ends every stream."""
        for client in self._clients.values():
            if not client.lost:
                client.end_stream(UnavailableError("the node is stopping"))

    def close(self) -> None:
        """Watches no process any more."""
        for client in self._clients.values():
            self._forget(client)

    def _process_ended(self, client: Client) -> None:
        # Its stream may live on in a child that shares the mapping, and then waits for its end.
        if client.lost:
            self.settle(client)

    @staticmethod
    def _forget(client: Client) -> None:
        if client.watch is not None:
            client.watch.close()
        if client.timer is not None:
            client.timer.cancel()


def _label(client: Client) -> tuple[str, str]:
    return client.client_id, client.name

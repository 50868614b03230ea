"""Who the clients are: their sessions, and what becomes of what they held when they are lost."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore_proto import node_pb2

from kvstore.core.clients import ClientSession, ClientSessions, Sight
from kvstore.errors import (
    InvalidArgumentError,
    KVStoreError,
    PreconditionError,
    UnavailableError,
)
from kvstore.node.driver import Driver, ReplySink
from kvstore.node.process_watch import ProcessWatch

log = logging.getLogger(__name__)

NAME_CHARS_MAX = 256


@dataclass(eq=False)
class Client(ClientSession):
    """One session of one client process, its stream, and the watch over the process."""

    name: str = ""
    engine_id: str = ""
    end_stream: Callable[[KVStoreError], None] = field(default=lambda _error: None, repr=False)
    watch: ProcessWatch | None = None
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Clients:
    """Gives the sessions their streams, process watches and timers; ClientSessions decides."""

    def __init__(self, driver: Driver, *, quarantine_s: float, sessions_max: int) -> None:
        self._driver = driver
        self._ids = itertools.count(1)
        self._sessions: ClientSessions[Client] = ClientSessions(
            driver.core, quarantine_s=quarantine_s, sessions_max=sessions_max
        )

    @property
    def open_count(self) -> int:
        """Sessions whose stream is open."""
        return self._sessions.open_count

    def has_engine(self, engine_id: str) -> bool:
        """Whether a session of this engine is open."""
        return any(c.engine_id == engine_id and not c.lost for c in self._sessions.all())

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
        returns = False
        if hello.settled:
            for older in self._sessions.of_client(hello.client_id):
                returns |= older.lost
                self.settle(older)
                if not older.lost:
                    older.end_stream(PreconditionError("this client says it is settled elsewhere"))
        client = Client(
            next(self._ids),
            hello.client_id,
            _process_of(hello),
            name=hello.name,
            engine_id=hello.engine_id,
            end_stream=end_stream,
        )
        self._sessions.open(client, returns=returns)
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
        if not self._sessions.holds(client):
            return
        sight = client.watch.sight if client.watch else Sight.UNSEEN
        self._driver.sinks.pop(client.id, None)
        self._driver.apply(self._sessions.stream_ended(client, sight, self._driver.now()))
        log.info("client %s (%s) lost its stream, process %s", *_label(client), sight.value)
        if not self._sessions.holds(client):
            self._forget(client)
        elif client.settles_at is not None:
            loop = asyncio.get_running_loop()
            client.timer = loop.call_at(client.settles_at, self.settle, client)

    def goodbye(self, client: Client) -> None:
        """The client said that it holds nothing any more."""
        self.settle(client)

    def settle(self, client: Client) -> None:
        """Nothing that the session held is in use: all of it is free at once."""
        if not self._sessions.holds(client):
            return
        self._driver.sinks.pop(client.id, None)
        self._forget(client)
        self._driver.apply(self._sessions.settle(client, self._driver.now()))
        log.info("client %s (%s) is settled", *_label(client))

    def end_all(self) -> None:
        """The node is about to stop: ends every stream."""
        for client in self._sessions.all():
            if not client.lost:
                client.end_stream(UnavailableError("the node is stopping"))

    def close(self) -> None:
        """Watches no process any more."""
        for client in self._sessions.all():
            self._forget(client)

    def _process_ended(self, client: Client) -> None:
        self._driver.apply(self._sessions.process_ended(client, self._driver.now()))
        if not self._sessions.holds(client):
            self._forget(client)

    @staticmethod
    def _forget(client: Client) -> None:
        if client.watch is not None:
            client.watch.close()
        if client.timer is not None:
            client.timer.cancel()


def _process_of(hello: node_pb2.Hello) -> str:
    """The process as it names itself; a client that cannot name its own stands for itself."""
    if not hello.pid or not hello.pid_namespace:
        return hello.client_id
    return f"{hello.pid_namespace}:{hello.pid}:{hello.process_start_ticks}"


def _label(client: Client) -> tuple[str, str]:
    return client.client_id, client.name

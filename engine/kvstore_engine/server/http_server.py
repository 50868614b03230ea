"""uvicorn with limits: on connections, and on how long each may take over a request."""

import asyncio
import contextlib
import logging
import math
import resource
import socket
from collections.abc import Iterator

import h11
import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvstore_engine.server.bodies import BODY_S
from kvstore_engine.server.errors import ApiError

HEAD_S = 10.0  # for a request's head; its body has BODY_S
ANSWER_S = 5.0  # a body that is late is answered before its connection is closed
CONNECTIONS_MAX = 4096
FILES_KEPT = 128  # of the limit of open files, for what is no connection
LEAVING_S = 5  # connections that are left have this long to end: a busy loop takes its turns late
ACCEPT_RETRY_S = 1.0
ACCEPT_LOG_S = 60.0  # between two lines that say the same

log = logging.getLogger(__name__)


class Connection(H11Protocol):
    """A connection that is closed where a request does not come in time.

    uvicorn's own limit is on the silence between two requests.
    """

    idle_since = 0.0
    _limited: object = None  # what the timer is for: the cycle whose body comes, or "head"
    _timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request waits for its answer, and none is on its way to the client."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.transport.get_write_buffer_size()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self._limit("head", HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._limit(self.cycle, BODY_S + ANSWER_S)
        elif state is h11.IDLE and self.timeout_keep_alive_task is None:
            self._limit("head", HEAD_S)
        else:
            self._limit(None)

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # its answer is on the way already
            self.transport.close()

    def _should_upgrade(self) -> bool:
        return False

    def _limit(self, what: object, seconds: float = 0.0) -> None:
        if what is self._limited:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._limited = what
        self._timer = None
        if what is not None:
            self._timer = self.loop.call_later(seconds, self.transport.close)


class HttpServer(uvicorn.Server):
    """Serves one listening socket; signals are for its owner, since the engine has to end too.

    At ``connections_max`` a new connection takes the place of the one that is idle for longest.
    """

    def __init__(self, config: uvicorn.Config, connections_max: int | None = None) -> None:
        super().__init__(config)
        self._connections_max = connections_max or connections_allowed()
        self._accepting: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the owner."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts by a loop of its own: asyncio's takes connections without a limit."""
        assert sockets is not None
        await self.lifespan.startup()
        self.servers = []
        self._accepting = asyncio.create_task(self._accept_all(sockets[0]))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets open requests end; leaves clients that do not take their answers in time."""
        assert self._accepting is not None
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        patience_s = max(0, (self.config.timeout_graceful_shutdown or 0) - LEAVING_S)
        leaving = asyncio.get_running_loop().call_later(patience_s, self.abandon)
        await super().shutdown(sockets)
        leaving.cancel()

    def abandon(self) -> None:
        """Ends all connections, whatever they wait for."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        told_s = -math.inf
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
                if self._make_room():
                    await loop.connect_accepted_socket(self._connection, accepted)
                else:
                    _refuse(accepted)
                    await asyncio.sleep(0)  # while connections wait, sock_accept does not
            except ConnectionError:
                await asyncio.sleep(0)
            except OSError as error:
                if loop.time() > told_s + ACCEPT_LOG_S:
                    told_s = loop.time()
                    log.error("cannot accept connections for now: %s", error.strerror or error)
                await asyncio.sleep(ACCEPT_RETRY_S)
            except Exception:
                log.exception("a connection could not be accepted")
                await asyncio.sleep(ACCEPT_RETRY_S)

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)

    def _make_room(self) -> bool:
        """Whether there is room for one more connection."""
        connections = self.server_state.connections
        if len(connections) < self._connections_max:
            return True
        idle = (c for c in connections if isinstance(c, Connection) and c.idle)
        open_ = (c for c in idle if not c.transport.is_closing())
        longest = min(open_, key=lambda connection: connection.idle_since, default=None)
        if longest is None:
            return False
        longest.transport.close()
        return True


def connections_allowed() -> int:
    """How many connections the limit of open files leaves room for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return min(CONNECTIONS_MAX, max(files - FILES_KEPT, files // 2))


def _refuse(accepted: socket.socket) -> None:
    body = msgspec.json.encode(ApiError(503, "too many connections; try again later").body())
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with contextlib.closing(accepted), contextlib.suppress(OSError):
        accepted.send(head.encode() + body)

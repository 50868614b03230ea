"""One client's stream: reads requests, calls the core, writes the answers in their order."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from kvstore_proto import node_pb2

import kvstore
from kvstore.core.effects import Effects, Reply
from kvstore.core.keys import KEY_BYTES
from kvstore.core.types import AckLevel
from kvstore.errors import (
    InternalError,
    InvalidArgumentError,
    KVStoreError,
    PreconditionError,
    ResourceExhaustedError,
)
from kvstore.node import translate
from kvstore.node.clients import Client
from kvstore.node.node import Node

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 2
RELEASED_MAX = 256  # leases let go with one request: nobody else is served meanwhile
OUTBOX_PAUSE = 1024  # answers that wait; more, and no further request is read
OUTBOX_MAX = 65536  # answers that wait; more, and the stream is ended
OUTBOX_PAUSE_BYTES = 4 << 20
OUTBOX_BYTES_MAX = 64 << 20
HELLO_TIMEOUT_S = 10.0
LAST_WRITE_S = 1.0

Handler = Callable[[int, Any, float], Effects | Awaitable[None] | None]


class Outbox:
    """Answers on their way to one client; one writer, as a stream takes one message at a time."""

    def __init__(self, context: Any, end_stream: Callable[[KVStoreError], None]) -> None:
        self._context = context
        self._end_stream = end_stream
        self._waiting: deque[tuple[node_pb2.SessionResponse, int]] = deque()
        self._bytes = 0  # about what those that wait take
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._stopping = False

    def put(self, response: node_pb2.SessionResponse, nbytes: int = 0) -> None:
        """Queues an answer, which takes about ``nbytes`` beside itself."""
        self._waiting.append((response, nbytes))
        self._bytes += nbytes
        self._wake.set()
        if self._crowded():
            self._room.clear()
            if len(self._waiting) > OUTBOX_MAX or self._bytes > OUTBOX_BYTES_MAX:
                self._end_stream(
                    ResourceExhaustedError(
                        f"{len(self._waiting)} answers wait; this client reads none"
                    )
                )

    def _crowded(self) -> bool:
        return len(self._waiting) > OUTBOX_PAUSE or self._bytes > OUTBOX_PAUSE_BYTES

    def put_reply(self, reply: Reply) -> None:
        """Queues an answer of the core; an End goes with the Granted before it, if that waits."""
        message = translate.reply_to_message(reply)
        last = self._waiting[-1][0] if self._waiting else None
        if last and last.id == message.id and last.HasField("granted") and message.HasField("end"):
            last.granted.end.CopyFrom(message.end)
        else:
            self.put(message, translate.answer_bytes(reply.body))

    async def room(self) -> None:
        """Returns when there is room for the answers to another request."""
        await self._room.wait()

    async def write_all(self) -> None:
        """Writes what is queued, as long as the stream lives."""
        waiting, write = self._waiting, self._context.write
        while not self._stopping:
            while waiting and not self._stopping:
                message, nbytes = waiting.popleft()
                self._bytes -= nbytes
                await write(message)
                if not self._crowded():
                    self._room.set()
            self._wake.clear()
            if not self._stopping:
                await self._wake.wait()

    async def stop(self, writer: "asyncio.Task[None]") -> None:
        """Ends ``write_all`` after the write that is under way.

        gRPC cannot take a write back, and refuses to end a stream with a status during one. A
        write to a stream that its client has ended fails, which is nothing to tell anybody.
        """
        self._stopping = True
        self._wake.set()
        writer.add_done_callback(_heard)
        await asyncio.wait({writer}, timeout=LAST_WRITE_S)
        writer.cancel()


def _heard(writer: "asyncio.Task[None]") -> None:
    if not writer.cancelled() and (error := writer.exception()) is not None:
        log.debug("the last write of a stream failed: %r", error)


class Session:
    """The life of one stream, from Hello to its end, whichever way it ends."""

    def __init__(self, node: Node, context: Any) -> None:
        self._node = node
        self._core = node.driver.core
        self._context = context
        self._task = asyncio.current_task()
        self._ended_by: KVStoreError | None = None
        self._outbox = Outbox(context, self._end)
        self._client: Client
        self._handlers: dict[str | None, Handler] = {
            "open_namespace": self._open_namespace,
            "acquire": self._acquire,
            "release": self._release,
            "reserve": self._reserve,
            "commit": self._commit,
            "abort": self._abort,
            "prefetch": self._prefetch,
            "match": self._match,
            "hbm_events": self._hbm_events,
            "hello": self._second_hello,
            None: self._unknown,
        }

    async def run(self) -> None:
        """Serves the stream to its end; raises the error that ends it, if one does."""
        self._client = await self._admit()
        writer = asyncio.create_task(self._outbox.write_all())
        try:
            await self._serve()
        except asyncio.CancelledError:
            if self._ended_by is None or self._task is None:
                raise
            self._task.uncancel()
            raise self._ended_by from None
        finally:
            self._node.clients.stream_ended(self._client)
            self._node.session_ended(self._client.engine_id)
            await self._outbox.stop(writer)

    def _end(self, error: KVStoreError) -> None:
        """Ends the stream from this side, with ``error`` as its status."""
        if self._ended_by is None and self._task is not None:
            self._ended_by = error
            self._task.cancel()

    async def _admit(self) -> Client:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await self._context.read()
        except TimeoutError:
            raise PreconditionError(f"no Hello within {HELLO_TIMEOUT_S:.0f} s") from None
        if first is grpc.aio.EOF or first.WhichOneof("request") != "hello":
            raise PreconditionError("the first request of a session must be Hello")
        hello = first.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise PreconditionError(
                f"this client speaks protocol version {hello.protocol_version}, this node "
                f"{PROTOCOL_VERSION} (kvstore {kvstore.__version__}): run the same release on both"
            )
        client = self._node.clients.admit(hello, self._outbox.put_reply, self._end)
        self._outbox.put(node_pb2.SessionResponse(id=first.id, welcome=self._node.welcome()))
        return client

    async def _serve(self) -> None:
        read, handlers, driver = self._context.read, self._handlers, self._node.driver
        while (request := await read()) is not grpc.aio.EOF:
            kind = request.WhichOneof("request")
            if kind == "goodbye":
                self._node.clients.goodbye(self._client)
                return
            try:
                if not request.id:
                    raise InvalidArgumentError("a request's id is never 0")
                if request.released and kind != "hello":
                    self._release_all(request.released)
                outcome = handlers[kind](request.id, getattr(request, kind or "id"), driver.now())
                if isinstance(outcome, Effects):
                    driver.apply(outcome)
                elif outcome is not None:
                    await outcome
            except KVStoreError as error:
                self._outbox.put(translate.error_response(request.id, error))
            except Exception:
                log.exception("request %s failed", kind)
                bug = InternalError(f"{kind} failed by a bug; the node's log has it")
                self._outbox.put(translate.error_response(request.id, bug))
            await self._outbox.room()

    async def _open_namespace(
        self, request_id: int, request: node_pb2.OpenNamespace, now: float
    ) -> None:
        del now
        spec = translate.spec_from_message(request.spec)
        namespace = await self._node.open_namespace(spec, request.tenant, self._client.id)
        opened = node_pb2.NamespaceOpened(namespace_id=namespace.id, root=namespace.root)
        self._outbox.put(node_pb2.SessionResponse(id=request_id, namespace_opened=opened))

    def _acquire(self, request_id: int, request: node_pb2.Acquire, now: float) -> Effects:
        return self._core.acquire(
            self._client.id,
            request_id,
            request.namespace_id,
            request.keys,
            request.parent,
            request.timeout_ms / 1000,
            now,
        )

    def _release(self, request_id: int, request: node_pb2.Release, now: float) -> Effects:
        del request_id
        return self._core.release(
            self._client.id, request.acquire_id, request.first, request.count, now
        )

    def _release_all(self, released: Sequence[node_pb2.Release]) -> None:
        """What a request carries."""
        if (count := len(released)) > RELEASED_MAX:
            raise InvalidArgumentError(
                f"{count} releases with one request; send {RELEASED_MAX} at most"
            )
        now = self._node.driver.now()
        for release in released:
            try:
                self._node.driver.apply(self._release(0, release, now))
            except Exception:  # a bug, of which the request and the other leases know nothing
                log.exception("a release failed")

    def _reserve(self, request_id: int, request: node_pb2.Reserve, now: float) -> Effects:
        return self._core.reserve(
            self._client.id,
            request_id,
            request.namespace_id,
            request.keys,
            request.parent,
            request.timeout_ms / 1000,
            now,
            shard_index=request.shard_index,
            num_shards=request.num_shards or 1,
            level=_ack_level(request.level),
        )

    def _commit(self, request_id: int, request: node_pb2.Commit, now: float) -> Effects:
        return self._core.commit(
            self._client.id,
            request_id,
            request.reserve_id,
            request.indices,
            request.checksums,
            _ack_level(request.level),
            now,
        )

    def _abort(self, request_id: int, request: node_pb2.Abort, now: float) -> Effects:
        return self._core.abort(
            self._client.id, request_id, request.reserve_id, request.indices, now
        )

    def _prefetch(self, request_id: int, request: node_pb2.Prefetch, now: float) -> Effects:
        return self._core.prefetch(
            self._client.id, request_id, request.namespace_id, request.keys, request.parent, now
        )

    def _match(self, request_id: int, request: node_pb2.Match, now: float) -> Effects:
        del now
        return self._core.match(self._client.id, request_id, request.namespace_id, request.keys)

    def _hbm_events(self, request_id: int, request: node_pb2.HbmEvents, now: float) -> None:
        del request_id, now
        if not self._client.engine_id:
            raise InvalidArgumentError("HBM events need an engine_id in Hello")
        keys_max = self._core.config.keys_per_request_max
        if (count := (len(request.stored) + len(request.removed)) // KEY_BYTES) > keys_max:
            raise InvalidArgumentError(f"{count} keys in one; send {keys_max} at most")
        self._node.hbm_events(self._client.engine_id, request)

    def _second_hello(self, request_id: int, request: node_pb2.Hello, now: float) -> None:
        del request_id, request, now
        raise PreconditionError("a session has one Hello, its first request")

    def _unknown(self, request_id: int, request: object, now: float) -> None:
        del request_id, request, now
        raise InvalidArgumentError("a request of a kind that this node does not know")


def _ack_level(level: int) -> AckLevel:
    try:
        return AckLevel(level or AckLevel.MEMORY)
    except ValueError:
        raise InvalidArgumentError(f"acknowledgement level {level}; take 1 to 3") from None

"""The session: the one stream to the node that owns everything this process holds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import grpc
from kvstore.errors import (
    DeadlineError,
    InvalidArgumentError,
    KVStoreError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
    error_from_code,
)
from kvstore_proto import node_pb2, node_pb2_grpc

from kvstore_client.wire import MESSAGE_BYTES_MAX, error_of_call

log = logging.getLogger(__name__)

OUTSTANDING_MAX = 4096
_RELEASED_MAX = 256  # with one request, as the protocol says
_CLOSE_TIMEOUT_S = 1.0
_PERMISSION_DENIED = "Permission denied"  # what gRPC says of a Unix socket
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # Else a new channel waits out the back-off of the one that lost the node.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


class Receiver(Protocol):
    """Whoever waits for the answers to one request. Called on the session's loop."""

    def on_response(self, response: node_pb2.SessionResponse) -> None:
        """One answer."""

    def on_error(self, error: KVStoreError) -> None:
        """The request failed, or the session is lost; nothing follows."""


class Answer:
    """Receiver of a request that is answered once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[node_pb2.SessionResponse] = loop.create_future()

    def on_response(self, response: node_pb2.SessionResponse) -> None:
        """Hands the answer over."""
        if not self.future.done():
            self.future.set_result(response)

    def on_error(self, error: KVStoreError) -> None:
        """Fails whoever waits."""
        if not self.future.done():
            self.future.set_exception(error)


class Session:
    """Sends requests in order and hands each answer to the receiver of its id.

    Once lost, it stays lost: every outstanding request fails with UnavailableError, and so does
    every later one. Only ``post`` may be called from another thread than the loop's.
    """

    def __init__(self, address: str, on_lost: Callable[[KVStoreError], None]) -> None:
        if not (address.startswith("unix:") or address.rpartition(":")[2].isdecimal()):
            raise InvalidArgumentError(
                f"node address {address!r}; write it like unix:/run/kvstore/node.sock"
            )
        self.address = address
        self.lost: KVStoreError | None = None
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._ids = itertools.count(1)
        self._receivers: dict[int, Receiver] = {}
        self._outgoing: deque[node_pb2.SessionRequest] = deque()
        self._pump_task: asyncio.Task[None] | None = None
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self.stub: Any = node_pb2_grpc.NodeStub(self._channel)
        self._stream: Any = None
        self._reading: asyncio.Task[None] | None = None
        self._welcomed = False

    async def open(self, hello: node_pb2.Hello, timeout_s: float) -> node_pb2.Welcome:
        """Introduces this process; the error says why the node refused or is not there."""
        self._stream = self.stub.Session()
        self._reading = self._loop.create_task(self._read())
        try:
            response = await self.call(node_pb2.SessionRequest(hello=hello), timeout_s)
        except KVStoreError as error:
            cause = self.lost
            await self.close(goodbye=False)
            if _PERMISSION_DENIED in str(cause or error):
                raise UnavailableError(
                    f"permission denied: {self.address} belongs to another user; run this process "
                    "as the user who runs the node"
                ) from None
            if isinstance(cause or error, UnavailableError):
                raise UnavailableError(
                    f"no node answers at {self.address}: {cause or error}; "
                    "start one with `kvstore up` or `kvstore-node`"
                ) from None
            raise (cause or error) from None
        self._welcomed = True
        return response.welcome

    async def call(
        self, request: node_pb2.SessionRequest, timeout_s: float
    ) -> node_pb2.SessionResponse:
        """Sends ``request`` under an id of its own and returns its one answer."""
        return await self.ask(request, timeout_s)

    def ask(
        self, request: node_pb2.SessionRequest, timeout_s: float
    ) -> asyncio.Future[node_pb2.SessionResponse]:
        """``call`` for who wants to do something else meanwhile; cancel what is not awaited."""
        answer = Answer(self._loop)
        request.id = self.expect(answer)
        timer = self._loop.call_later(timeout_s, self._time_out, answer, timeout_s)

        def done(_: object) -> None:
            timer.cancel()
            self.forget(request.id)

        answer.future.add_done_callback(done)
        self.post(request)
        return answer.future

    def _time_out(self, answer: Answer, timeout_s: float) -> None:
        answer.on_error(
            DeadlineError(f"the node at {self.address} did not answer within {timeout_s:g} s")
        )

    def expect(self, receiver: Receiver) -> int:
        """An id whose answers go to ``receiver`` until ``forget``."""
        if self.lost is not None:
            raise UnavailableError(f"the session with {self.address} is lost: {self.lost}")
        if len(self._receivers) >= OUTSTANDING_MAX:
            raise ResourceExhaustedError(
                f"{OUTSTANDING_MAX} requests are outstanding on this session; await some first"
            )
        request_id = next(self._ids)
        self._receivers[request_id] = receiver
        return request_id

    def next_id(self) -> int:
        """An id for a request that is not answered."""
        return next(self._ids)

    def forget(self, request_id: int) -> None:
        """Later answers to this id are dropped."""
        self._receivers.pop(request_id, None)

    def post(self, request: node_pb2.SessionRequest) -> None:
        """Sends ``request`` soon, from any thread; after the loss of the session, never."""
        if threading.get_ident() == self._thread:
            self._enqueue(request)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and so the session lost
            self._loop.call_soon_threadsafe(self._enqueue, request)

    def _enqueue(self, request: node_pb2.SessionRequest) -> None:
        if self.lost is not None:
            return
        self._outgoing.append(request)
        if self._pump_task is None:
            self._pump_task = self._loop.create_task(self._pump())

    async def _pump(self) -> None:
        """Writes what is queued: a gRPC stream takes one message at a time."""
        try:
            while self._outgoing:
                await self._stream.write(self._next_message())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            log.debug("write on the session failed: %s", error)  # the reader learns why
        finally:
            self._pump_task = None

    def _next_message(self) -> node_pb2.SessionRequest:
        """The next request, with the releases that were posted before it: a message costs more
        than what is in it.
        """
        request = self._outgoing.popleft()
        before: list[node_pb2.Release] = []
        while (
            self._outgoing
            and len(before) < _RELEASED_MAX
            and request.WhichOneof("request") == "release"
        ):
            before.append(request.release)
            request = self._outgoing.popleft()
        del request.released[:]  # of a request that was sent before
        request.released.extend(before)
        return request

    async def _read(self) -> None:
        try:
            while (response := await self._stream.read()) is not grpc.aio.EOF:
                self._dispatch(response)
            self._lose(UnavailableError("the node ended it"))
        except grpc.aio.AioRpcError as error:
            self._lose(self._cause(error))
        except asyncio.CancelledError:
            self._lose(UnavailableError("its stream was cancelled"))
            raise

    def _cause(self, error: grpc.aio.AioRpcError) -> KVStoreError:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return PreconditionError(
                f"what answers at {self.address} is a master, not a node (or a node of another "
                "version); `kvstore nodes` shows the addresses of nodes"
            )
        return error_of_call(error)

    def _dispatch(self, response: node_pb2.SessionResponse) -> None:
        receiver = self._receivers.get(response.id)
        if receiver is None:
            return
        if response.WhichOneof("response") == "error":
            self.forget(response.id)
            receiver.on_error(error_from_code(response.error.code, response.error.message))
        else:
            receiver.on_response(response)

    def _lose(self, cause: KVStoreError) -> None:
        if self.lost is not None:
            return
        self.lost = cause
        receivers, self._receivers = self._receivers, {}
        self._outgoing.clear()
        for receiver in receivers.values():
            receiver.on_error(UnavailableError(f"the session with {self.address} is lost: {cause}"))
        if self._welcomed:
            self._on_lost(cause)

    async def close(self, *, goodbye: bool = True) -> None:
        """Ends the session; with ``goodbye`` the node frees all that it owned at once."""
        if goodbye and self.lost is None:
            self.post(node_pb2.SessionRequest(id=self.next_id(), goodbye=node_pb2.Goodbye()))
            with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    if self._pump_task is not None:
                        await self._pump_task
                    await self._stream.done_writing()
                    if self._reading is not None:
                        await asyncio.wait((self._reading,))
        self._lose(UnavailableError("this client closed it"))
        tasks = [task for task in (self._reading, self._pump_task) if task is not None]
        if self._stream is not None:
            self._stream.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close()

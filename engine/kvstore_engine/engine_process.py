"""The engine process: the engine loop, fed over ZeroMQ by the server process.

The server binds two ZeroMQ sockets, best ``ipc://`` in a private temporary directory: a PUSH for
requests and a PULL for outputs. Then it runs ``python -m kvstore_engine.engine_process`` and writes
one line of JSON, ``wire.encode_launch(wire.Launch(config, requests, outputs))``, to its stdin:

    {"engine": {"model": "tiny-random", ...}, "requests": "ipc://...", "outputs": "ipc://..."}

Frames are ``wire.encode([...])`` of ``messages``. The first message is EngineReady or EngineFailed;
after EngineFailed the process exits with 2 (the user's input, ``usage``) or 1. EngineStats come
about once a second while they change. ``Shutdown`` or SIGTERM ends it with 0; SIGINT is ignored,
since a Ctrl-C reaches the server too, which then says Shutdown. It ends by itself when its parent
process ends. A stop token (EOS or one of ``stop_token_ids``) is the last of ``tokens`` with
``finish_reason`` "stop". An unknown or already ended id in AbortRequest is ignored; an aborted
request sends nothing more.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from types import FrameType

import msgspec
import zmq
from kvstore.errors import ConfigError, KVStoreError

from kvstore_engine.build import build_engine
from kvstore_engine.engine import Engine
from kvstore_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    RequestOutput,
    ResetCache,
    ToEngine,
)
from kvstore_engine.wire import Launch, decode_launch, decode_to_engine, encode

STATS_INTERVAL_S = 1.0
STUCK_LOOK_MS = 1000  # how often the wait for a server that takes nothing looks for its end

log = logging.getLogger("kvstore_engine")


class Channel:
    """The two sockets to the server."""

    def __init__(self, launch: Launch, parent_fd: int) -> None:
        """``parent_fd``: readable once the server process has ended."""
        self.closing = False  # what nobody takes is not waited for any more
        self._context = zmq.Context(io_threads=1)
        self.requests: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self.requests.connect(launch.requests)
        self._outputs: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._outputs.setsockopt(zmq.LINGER, 2000)
        self._outputs.connect(launch.outputs)
        self._room = zmq.Poller()
        self._room.register(self._outputs, zmq.POLLOUT)
        self._room.register(parent_fd, zmq.POLLIN)
        self._parent_fd = parent_fd

    def send(self, *messages: FromEngine) -> None:
        """One frame. A server that stands still is waited for, until it goes on or has ended."""
        frame = encode(messages)
        while True:
            with contextlib.suppress(zmq.Again):
                self._outputs.send(frame, zmq.NOBLOCK)
                return
            if self.closing or self._parent_fd in dict(self._room.poll(STUCK_LOOK_MS)):
                return

    def receive(self) -> list[ToEngine]:
        """Everything that is there."""
        messages: list[ToEngine] = []
        with contextlib.suppress(zmq.Again):
            while True:
                messages += decode_to_engine(self.requests.recv(zmq.NOBLOCK))
        return messages

    def close(self) -> None:
        """Sends what is queued, for at most two seconds."""
        self.requests.close(0)
        self._outputs.close()
        self._context.term()


class EngineLoop:
    """Feeds the engine and sends what it says, until told to stop or the parent is gone."""

    def __init__(self, engine: Engine, channel: Channel, parent_fd: int) -> None:
        self._engine = engine
        self._channel = channel
        self._parent_fd = parent_fd
        self._stopping = False
        self._last_stats: EngineStats | None = None
        self._stats_due = 0.0
        self._poller = zmq.Poller()
        self._poller.register(channel.requests, zmq.POLLIN)
        self._poller.register(parent_fd, zmq.POLLIN)
        if engine.transfers.connector is not None:
            self._poller.register(engine.transfers.connector.wake_fd, zmq.POLLIN)

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Ends ``run`` after the step that is under way; also a signal handler."""
        self._stopping = self._channel.closing = True

    def run(self) -> None:
        """Steps as long as there is work, and otherwise waits for some."""
        while not self._stopping:
            ready = dict(self._poller.poll(self._timeout_ms()))
            if self._parent_fd in ready:
                log.warning("the server process has ended; so does the engine")
                return
            if self._channel.requests in ready:
                for message in self._channel.receive():
                    self._take(message)
            outputs = self._engine.step()
            if outputs:
                self._channel.send(*outputs)
            self._report()

    def _timeout_ms(self) -> int:
        wait_s = self._engine.wait_s()
        limit_s = STATS_INTERVAL_S
        return math.ceil(1000 * (limit_s if wait_s is None else min(wait_s, limit_s)))

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, AddRequest):
            for choice in message.choices():
                self._add(choice)
        elif isinstance(message, AbortRequest):
            self._engine.abort(message.request_id)
        elif isinstance(message, ResetCache):
            self._engine.reset_cache()
        else:
            self.stop()

    def _add(self, request: AddRequest) -> None:
        try:
            self._engine.add_request(request)
        except KVStoreError as error:
            name = request.request_id
            self._channel.send(RequestOutput(name, [], finish_reason="error", error=str(error)))

    def _report(self) -> None:
        now = time.monotonic()
        if now < self._stats_due:
            return
        self._stats_due = now + STATS_INTERVAL_S
        stats = self._engine.stats()
        if stats != self._last_stats:
            self._last_stats = stats
            self._channel.send(stats)


def run(launch: Launch, parent_fd: int) -> int:
    """Builds the engine and runs it; returns the exit code."""
    channel = Channel(launch, parent_fd)
    try:
        engine = build_engine(launch.engine)
        engine.start()
    except (KVStoreError, OSError, RuntimeError, MemoryError) as error:
        usage = isinstance(error, ConfigError)
        if not usage:
            log.exception("the engine cannot start")
        channel.send(EngineFailed(str(error), usage))
        channel.close()
        return 2 if usage else 1
    loop = EngineLoop(engine, channel, parent_fd)
    signal.signal(signal.SIGTERM, loop.stop)
    config = launch.engine
    channel.send(
        EngineReady(
            model=config.served_model_name or config.model,
            max_context=engine.max_context,
            num_pages=engine.blocks.num_pages,
            page_tokens=config.page_tokens,
            vocab_size=engine.vocab_size,
        )
    )
    try:
        loop.run()
    finally:
        engine.close()
        channel.close()
    return 0


def main() -> None:
    """Entry point of ``python -m kvstore_engine.engine_process``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # Taken first: a parent that ends while the model is loading is noticed all the same. One that
    # ended before has left this process to another, which is compared below.
    try:
        parent_fd = os.pidfd_open(os.getppid())
    except ProcessLookupError:
        sys.exit(1)
    try:
        launch = decode_launch(sys.stdin.buffer.readline())
    except msgspec.MsgspecError as error:
        sys.exit(f"engine process: stdin holds no launch line: {error}")
    if launch.server not in (0, os.getppid()):
        sys.exit(1)
    sys.exit(run(launch, parent_fd))


if __name__ == "__main__":
    main()

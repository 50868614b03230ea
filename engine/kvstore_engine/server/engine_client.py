"""The server's end of the engine process: starts it, speaks with it, notices its end."""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import zmq
import zmq.asyncio
from kvstore.entry import GRPC_EXPERIMENTS
from kvstore.errors import ConfigError, UnavailableError

from kvstore_engine import wire
from kvstore_engine.config import EngineConfig
from kvstore_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    RequestOutput,
    ResetCache,
    Shutdown,
    ToEngine,
)

log = logging.getLogger(__name__)

EngineState = Literal["loading", "ready", "dead"]
Sink = Callable[[RequestOutput], None]

ENGINE_COMMAND = (sys.executable, "-m", "kvstore_engine.engine_process")
LAST_WORDS_S = 1.0  # what an ended process still has on the way is waited for this long
STOP_TIMEOUT_S = 5.0
CONNECT_POLL_MS = 1000
STDERR = 2  # stdout is for the line that says ready


# Iterations; libgomp's own 300,000 keep the core of a waiting thread from whoever has work, such as
# the thread that it waits for: docs/decisions/0001-openmp-spinning.md has the figures.
OPENMP_SPINS = "10000"
# Weights and activations in huge pages: docs/decisions/0004-engine-in-huge-pages.md.
ALLOCATOR_SETTINGS = "glibc.malloc.hugetlb=1"


def _engine_environment() -> dict[str, str]:
    """The environment of the engine process; what the user set for it stays."""
    environment = dict(os.environ)
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)
    environment.setdefault("GLIBC_TUNABLES", ALLOCATOR_SETTINGS)
    environment.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)
    return environment


class EngineClient:
    """One engine process and its open requests. Everything runs on one event loop.

    ``add``, ``abort`` and ``reset_cache`` only queue a message, so that they also work while a
    task is being cancelled. Each added request gets its outputs on its sink, the last of them
    with a finish reason, unless it is aborted: then nothing more comes.
    """

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self.state: EngineState = "loading"
        self.ready: EngineReady | None = None
        self.stats: EngineStats | None = None
        self.death = ""  # why the engine ended, once it has
        self.ended = asyncio.Event()
        self.idle = asyncio.Event()  # no request is open
        self.idle.set()
        self._command = command
        self._reached = asyncio.Event()  # the engine is connected to what is sent to it
        self._sinks: dict[str, Sink] = {}
        self._outgoing: asyncio.Queue[ToEngine] = asyncio.Queue()
        self._started: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._directory = Path(tempfile.mkdtemp(prefix="kvstore-engine-"))
        self._context = zmq.asyncio.Context()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def open_requests(self) -> int:
        """Requests that were added and have not ended."""
        return len(self._sinks)

    async def start(self, config: EngineConfig) -> None:
        """Starts the process; ``wait_ready`` tells when and whether it can serve."""
        push, pull = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        for socket in (push, pull):
            socket.setsockopt(zmq.LINGER, 0)
        requests, outputs = (f"ipc://{self._directory}/{name}" for name in ("in", "out"))
        push.bind(requests)
        pull.bind(outputs)
        # A process group of its own: Ctrl-C in a terminal is for the server, which then ends it.
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=STDERR,
            env=_engine_environment(),
            process_group=0,
        )
        launch = wire.encode_launch(wire.Launch(config, requests, outputs, os.getpid()))
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it ended already: the watcher says so
            self._process.stdin.write(launch)
            await self._process.stdin.drain()
        self._process.stdin.close()
        loops = (self._send(push), self._receive(pull), self._watch(self._process))
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def wait_ready(self) -> EngineReady:
        """Waits until the model is loaded.

        Raises ConfigError where the user's input was wrong, UnavailableError for the rest.
        """
        return await asyncio.shield(self._started)

    def add(self, request: AddRequest, sink: Sink) -> None:
        """Hands a validated request to the engine; the outputs of all choices go to ``sink``."""
        if self.state != "ready":
            raise UnavailableError(self.death or "the model is still being loaded")
        self._sinks |= dict.fromkeys(request.request_ids, sink)
        self.idle.clear()
        self._outgoing.put_nowait(request)

    def abort(self, request_id: str) -> None:
        """Ends a request early; without effect if it has ended."""
        if self._forget(request_id):
            self._outgoing.put_nowait(AbortRequest(request_id))

    def reset_cache(self) -> None:
        """Has the engine forget the prefix cache in its own pages."""
        self._outgoing.put_nowait(ResetCache())

    def retire(self, why: str) -> None:
        """Ends every open request with the error ``why``, and takes no more."""
        self.death = self.death or why
        self.state = "dead"
        for request_id, sink in list(self._sinks.items()):
            self.abort(request_id)
            sink(RequestOutput(request_id, [], finish_reason="error", error=self.death))

    async def close(self, hurry: asyncio.Event | None = None) -> None:
        """Ends the process, by force where it does not answer or once ``hurry`` is set, and
        removes the sockets.
        """
        process = self._process
        if process is not None and process.returncode is None:
            self._outgoing.put_nowait(Shutdown())
            if self.ready is None:
                process.terminate()  # it reads no messages while it loads
            await self._end(process, hurry or asyncio.Event())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._started.done():
            self._started.cancel()
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _end(self, process: asyncio.subprocess.Process, hurry: asyncio.Event) -> None:
        waits = [asyncio.create_task(wait) for wait in (process.wait(), hurry.wait())]
        await asyncio.wait(waits, timeout=STOP_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if process.returncode is None:
            if not hurry.is_set():
                log.warning("the engine process did not stop within %.0f s", STOP_TIMEOUT_S)
            process.kill()
            await process.wait()

    async def _send(self, push: zmq.asyncio.Socket) -> None:
        # Sockets connect when they like: an engine may be ready before its receiving end is.
        while not await push.poll(CONNECT_POLL_MS, zmq.POLLOUT):  # type: ignore[call-arg]
            pass
        self._reached.set()
        while True:
            messages = [await self._outgoing.get()]
            while not self._outgoing.empty():
                messages.append(self._outgoing.get_nowait())
            await push.send(self._frame(messages))

    async def _remove_names(self) -> None:
        """Of the sockets, once both ends are connected: they would only outlive a kill -9."""
        await self._reached.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _frame(self, messages: Sequence[ToEngine]) -> bytes:
        """One frame of all that can be sent; a request that cannot must not stop the others."""
        try:
            return wire.encode(messages)
        except (ValueError, TypeError, OverflowError):
            return wire.encode([message for message in messages if self._sendable(message)])

    def _sendable(self, message: ToEngine) -> bool:
        try:
            wire.encode([message])
        except (ValueError, TypeError, OverflowError) as error:
            log.exception("a message to the engine cannot be encoded")
            if isinstance(message, AddRequest):
                reason = f"the engine cannot be given this request: {error}"
                for name in message.request_ids:
                    self._on_output(RequestOutput(name, [], finish_reason="error", error=reason))
            return False
        return True

    async def _receive(self, pull: zmq.asyncio.Socket) -> None:
        while True:
            frame = await pull.recv()
            try:
                messages = wire.decode_from_engine(frame)
            except msgspec.MsgspecError as error:
                log.error("the engine process sent a frame that is none: %s", error)
                continue
            for message in messages:
                self._on_message(message)

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case RequestOutput():
                self._on_output(message)
            case EngineStats():
                self.stats = message
            case EngineReady():
                self._tasks.append(asyncio.create_task(self._remove_names()))
                self.ready, self.state = message, "ready"
                if not self._started.done():
                    self._started.set_result(message)
            case EngineFailed():
                self.death = message.message
                self._fail_start(
                    ConfigError(message.message)
                    if message.usage
                    else UnavailableError(message.message)
                )

    def _on_output(self, output: RequestOutput) -> None:
        sink = self._sinks.get(output.request_id)
        if sink is None:
            return  # aborted while this was on its way
        if output.finish_reason is not None:
            self._forget(output.request_id)
        sink(output)

    def _forget(self, request_id: str) -> bool:
        known = self._sinks.pop(request_id, None) is not None
        if not self._sinks:
            self.idle.set()
        return known

    def _fail_start(self, error: Exception) -> None:
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # nobody may be waiting

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Ends all that is open once the engine process has ended."""
        code = await process.wait()
        with contextlib.suppress(TimeoutError, ConfigError, UnavailableError):
            await asyncio.wait_for(self.wait_ready(), LAST_WORDS_S)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self.retire(f"the engine process ended {how}")
        self._fail_start(UnavailableError(self.death))
        self.ended.set()

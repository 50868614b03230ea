"""The node's stream to its master: everything it holds at connect, then what changes."""

import asyncio
import contextlib
import logging
import random
import time
from typing import Any

import grpc
from kvstore_proto import master_pb2_grpc

from kvstore.config import split_host_port
from kvstore.daemon import MESSAGE_BYTES_MAX
from kvstore.errors import KVStoreError, PreconditionError, UnavailableError
from kvstore.node.reports import ReportingNode, Reports

log = logging.getLogger(__name__)

BACKOFF_MIN_S = 0.2
BACKOFF_MAX_S = 2.0
HEARTBEAT_MIN_S = 0.1  # whatever a master asks for
BATCH_S = 0.02  # changes that come together are told together
PACE_S = 0.5  # from one batch of changes to the next
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # The link has a back-off of its own; a shared channel would add the one of its last failure.
    ("grpc.use_local_subchannel_pool", 1),
)
WELCOME_TIMEOUT_S = 5.0
REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)


class MasterLink:
    """Keeps one session with the master, for as long as the node lives; Reports decides.

    Without a master, and while it is away, the node works on alone.
    """

    def __init__(self, address: str, node: ReportingNode) -> None:
        self._address = address
        self._reports = Reports(node)
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        if address:
            split_host_port(address)

    @property
    def connected(self) -> bool:
        """Whether a master has let this node in."""
        return self._reports.connected

    def start(self) -> None:
        """Begins to connect; returns at once."""
        if not self._address:
            log.info("no master is configured: this node works alone")
            return
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends the session."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def changed(
        self,
        root: bytes,
        tier: int,
        engine_id: str,
        stored: bytes,
        removed: bytes,
        *,
        cleared: bool = False,
    ) -> None:
        """Blocks came into or left a tier."""
        self._reports.changed(root, tier, engine_id, stored, removed, cleared=cleared)
        self._wake.set()

    def namespaces_changed(self) -> None:
        """A client opened a namespace, and another one may have gone for it."""
        self._reports.namespaces_changed()
        self._wake_at_once()

    def _wake_at_once(self) -> None:
        self._wake.set()
        self._hurry.set()

    async def _run(self) -> None:
        backoff_s, away, told = BACKOFF_MIN_S, False, ""
        while True:
            refusal = ""
            try:
                await self._session()
                reason = "it ended the session"
            # InvalidStateError is what a write to a stream that has just ended raises.
            except (
                grpc.aio.AioRpcError,
                asyncio.InvalidStateError,
                KVStoreError,
                TimeoutError,
            ) as error:
                reason = _reason(error)
                if isinstance(error, grpc.aio.AioRpcError) and error.code() in REFUSALS:
                    refusal = reason
            except Exception as error:  # such as a message that is none, or a bug
                log.exception("the session with master %s failed", self._address)
                reason = _reason(error)
            if self.connected or not away or refusal not in ("", told):
                log.warning("master %s is away, working alone: %s", self._address, reason)
            backoff_s = BACKOFF_MIN_S if self.connected else min(2 * backoff_s, BACKOFF_MAX_S)
            away, told = True, refusal or told
            self._reports.ended()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _session(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            stream: Any = master_pb2_grpc.MasterStub(channel).Session()
            try:
                async with asyncio.timeout(WELCOME_TIMEOUT_S):
                    await stream.write(self._reports.hello())
                    first = await stream.read()
            except TimeoutError:
                raise UnavailableError(
                    f"what answers there said nothing for {WELCOME_TIMEOUT_S:.0f} s"
                ) from None
            if first is grpc.aio.EOF or first.WhichOneof("directive") != "welcome":
                raise PreconditionError("it did not answer with a welcome")
            self._reports.welcomed(first.welcome)
            epoch = first.welcome.cluster_epoch
            heartbeat_s = max(HEARTBEAT_MIN_S, first.welcome.heartbeat_ms / 1000)
            log.info("master %s is here, cluster epoch %d", self._address, epoch)
            tasks = [
                asyncio.create_task(self._send_all(stream, heartbeat_s)),
                asyncio.create_task(self._obey(stream)),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_all(self, stream: Any, heartbeat_s: float) -> None:
        """The only writer of the stream; twice the heartbeats asked for, against lost time."""
        due = told = 0.0
        while True:
            self._wake.clear()
            self._hurry.clear()
            for report in self._reports.due():
                await stream.write(report)
                told = time.monotonic()
            if (now := time.monotonic()) >= due:
                due = now + heartbeat_s / 2
                await stream.write(self._reports.heartbeat())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - time.monotonic())):
                    await self._wake.wait()
                    wait_s = max(BATCH_S, told + PACE_S - time.monotonic())
                    async with asyncio.timeout(wait_s):
                        await self._hurry.wait()

    async def _obey(self, stream: Any) -> None:
        while (directive := await stream.read()) is not grpc.aio.EOF:
            self._reports.obey(directive)
            self._wake_at_once()


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return "what answers there is no master; take its address as --master"
        return error.details() or error.code().name
    return str(error) or type(error).__name__

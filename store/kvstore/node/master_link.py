"""The node's stream to its master: everything it holds at connect, then what changes."""

import asyncio
import contextlib
import logging
import random
import socket
import time
from collections import deque
from typing import Any, Protocol

import grpc
from kvstore_proto import master_pb2, master_pb2_grpc

import kvstore
from kvstore.core.keys import KEY_BYTES
from kvstore.core.node_core import NodeCore
from kvstore.core.types import Removal, Tier
from kvstore.daemon import MESSAGE_BYTES_MAX, split_host_port
from kvstore.errors import (
    InvalidArgumentError,
    KVStoreError,
    PreconditionError,
    ResourceExhaustedError,
    StaleEpochError,
)
from kvstore.node import translate
from kvstore.node.clients import Clients
from kvstore.node.deltas import Deltas
from kvstore.node.driver import Driver
from kvstore.node.hbm import HbmInventory

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
BACKOFF_MIN_S = 0.2
BACKOFF_MAX_S = 2.0
BATCH_S = 0.1
INVENTORY_KEYS = 8192
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # The link has a back-off of its own; a shared channel would add the one of its last failure.
    ("grpc.use_local_subchannel_pool", 1),
)
WELCOME_TIMEOUT_S = 5.0
Report = master_pb2.NodeReport


class LinkedNode(Protocol):
    """What the link needs of its node."""

    node_id: str
    instance: int
    address: str
    core: NodeCore
    driver: Driver
    clients: Clients
    hbm: HbmInventory

    def problems(self) -> list[str]:
        """What an operator should look at."""


class MasterLink:
    """Keeps one session with the master, for as long as the node lives.

    Without a master, and while it is away, the node works on alone. After every connect the master
    gets the whole inventory, so that nothing has to be remembered while it is away.
    """

    def __init__(self, address: str, node: LinkedNode) -> None:
        self.connected = False
        self.cluster_epoch = 0
        self._address = address
        self._node = node
        self._deltas = Deltas()
        self._outgoing: deque[Report] = deque()
        self._resync = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        if address:
            split_host_port(address)

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
        if self.connected:
            self._deltas.add(root, tier, engine_id, stored, removed, cleared)
            self._wake.set()

    def namespace_opened(self, report: master_pb2.NamespaceReport) -> None:
        """A client opened a namespace."""
        if self.connected:
            self._send(Report(namespace=report))

    def _send(self, report: Report) -> None:
        self._outgoing.append(report)
        self._wake.set()

    async def _run(self) -> None:
        backoff_s, away = BACKOFF_MIN_S, False
        while True:
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
            if self.connected or not away:
                log.warning("master %s is away, working alone: %s", self._address, reason)
            backoff_s = BACKOFF_MIN_S if self.connected else min(2 * backoff_s, BACKOFF_MAX_S)
            self.connected, away = False, True
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _session(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            stream: Any = master_pb2_grpc.MasterStub(channel).Session()
            await stream.write(Report(hello=self._hello()))
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                first = await stream.read()
            if first is grpc.aio.EOF or first.WhichOneof("directive") != "welcome":
                raise PreconditionError("it did not answer with a welcome")
            self._welcomed(first.welcome)
            tasks = [
                asyncio.create_task(self._send_all(stream, first.welcome.heartbeat_ms / 1000)),
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

    def _hello(self) -> master_pb2.NodeHello:
        return master_pb2.NodeHello(
            protocol_version=PROTOCOL_VERSION,
            node_id=self._node.node_id,
            instance=self._node.instance,
            address=self._node.address,
            version=kvstore.__version__,
            cluster_epoch=self.cluster_epoch,
            hostname=socket.gethostname(),
        )

    def _welcomed(self, welcome: master_pb2.MasterWelcome) -> None:
        if welcome.cluster_epoch < self.cluster_epoch:
            raise StaleEpochError(
                f"its cluster epoch {welcome.cluster_epoch} is older than {self.cluster_epoch}"
            )
        self.cluster_epoch = welcome.cluster_epoch
        self._deltas.clear()
        self._outgoing.clear()
        self._resync = True
        self.connected = True
        self._wake.set()
        log.info("master %s is here, cluster epoch %d", self._address, self.cluster_epoch)

    # Reports

    async def _send_all(self, stream: Any, heartbeat_s: float) -> None:
        """The only writer of the stream; twice the heartbeats asked for, against lost time."""
        due = 0.0
        while True:
            self._wake.clear()
            while self._outgoing:
                await stream.write(self._outgoing.popleft())
            if self._resync:
                self._resync = False
                await self._send_inventory(stream)
            await self._send_deltas(stream)
            if (now := time.monotonic()) >= due:
                due = now + heartbeat_s / 2
                await stream.write(Report(heartbeat=self._heartbeat()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - time.monotonic())):
                    await self._wake.wait()
                    if not self._outgoing:
                        await asyncio.sleep(BATCH_S)

    async def _send_deltas(self, stream: Any) -> None:
        if self._deltas.overflowed:
            raise ResourceExhaustedError("it reads too slowly; it gets the whole inventory anew")
        for event in self._deltas.take():
            await stream.write(Report(delta=event))

    async def _send_inventory(self, stream: Any) -> None:
        """Every namespace, then every block, as they are at one moment.

        Changes from then on wait until all of it is sent. Those that were waiting before are told
        once more, in their order, which ends in the same state.
        """
        core, sent = self._node.core, 0
        namespaces = core.namespaces()
        held = [(root, int(tier), "", keys) for root, tier, keys in core.inventory(INVENTORY_KEYS)]
        for root, engine_id, keys in self._node.hbm.inventory(INVENTORY_KEYS):
            held.append((root, int(Tier.HBM), engine_id, keys))
        for namespace in namespaces:
            await stream.write(Report(namespace=translate.namespace_to_message(namespace)))
        for root, tier_number, engine_id, keys in held:
            await stream.write(Report(inventory=_stored(root, tier_number, engine_id, keys)))
            sent += len(keys) // KEY_BYTES
        await stream.write(Report(inventory_end=master_pb2.InventoryEnd(blocks=sent)))

    def _heartbeat(self) -> master_pb2.Heartbeat:
        return master_pb2.Heartbeat(
            tiers=[translate.usage_to_message(usage) for usage in self._node.core.usage()],
            sessions=self._node.clients.open_count,
            sent_unix_ms=time.time_ns() // 1_000_000,
            problems=self._node.problems(),
        )

    # Directives

    async def _obey(self, stream: Any) -> None:
        while (directive := await stream.read()) is not grpc.aio.EOF:
            result = master_pb2.DirectiveResult(id=directive.id)
            try:
                removal = self._carry_out(directive)
                result.blocks, result.bytes = removal.blocks, removal.bytes
                result.pinned = removal.pinned
            except (KVStoreError, ValueError) as error:
                result.error = str(error)
            if directive.id:
                self._send(Report(result=result))

    def _carry_out(self, directive: master_pb2.Directive) -> Removal:
        core, now = self._node.core, self._node.driver.now()
        match directive.WhichOneof("directive"):
            case "evict":
                order = directive.evict
                if int(order.tier) not in (Tier.DRAM, Tier.SSD):
                    raise InvalidArgumentError(f"tier {order.tier}; take 2 (DRAM) or 3 (SSD)")
                effects, removal = core.evict(
                    Tier(order.tier), order.keys, order.bytes, order.drop, now
                )
            case "purge":
                effects, removal = core.purge(directive.purge.root or None, now)
            case "resync":
                self._resync = True
                self._wake.set()
                return Removal(0, 0, 0)
            case kind:
                raise InvalidArgumentError(f"this node does not know the directive {kind}")
        self._node.driver.apply(effects)
        return removal


def _stored(root: bytes, tier: int, engine_id: str, keys: bytes) -> master_pb2.BlockEvents:
    return master_pb2.BlockEvents(
        root=root, tier=translate.number(tier), engine_id=engine_id, stored=keys
    )


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return str(error) or type(error).__name__

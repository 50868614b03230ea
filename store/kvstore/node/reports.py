"""What a node tells its master, and what it does on the master's word; without I/O."""

import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from kvstore_proto import master_pb2

import kvstore
from kvstore.core.effects import Effects
from kvstore.core.keys import KEY_BYTES
from kvstore.core.node_core import NodeCore
from kvstore.core.types import Namespace, Removal, Tier
from kvstore.errors import (
    InvalidArgumentError,
    KVStoreError,
    ResourceExhaustedError,
)
from kvstore.node import translate
from kvstore.node.deltas import Deltas
from kvstore.node.hbm import HbmInventory

PROTOCOL_VERSION = 1
INVENTORY_KEYS = 8192
Report = master_pb2.NodeReport


class ReportingNode(Protocol):
    """What the reports need of their node."""

    node_id: str
    instance: int
    address: str
    core: NodeCore
    hbm: HbmInventory

    def sessions_open(self) -> int:
        """Sessions of clients whose stream is open."""

    def problems(self) -> list[str]:
        """What an operator should look at."""

    def now(self) -> float:
        """Monotonic seconds."""

    def apply(self, effects: Effects) -> None:
        """Carries out what a call of the core wants done."""


class Reports:
    """The node's side of its session with the master.

    After every connect, and when the master asks, it gets the whole inventory, so that nothing has
    to be remembered while it is away; from then on what changes, in order.
    """

    def __init__(self, node: ReportingNode) -> None:
        self.connected = False
        self._node = node
        self._deltas = Deltas()
        self._outgoing: deque[Report] = deque()
        self._told: dict[bytes, bool] = {}  # roots of namespaces, and whether their spec was known
        self._retell = False
        self._resync = False

    # The session

    def hello(self) -> Report:
        """The first report of a session."""
        return Report(
            hello=master_pb2.NodeHello(
                protocol_version=PROTOCOL_VERSION,
                node_id=self._node.node_id,
                instance=self._node.instance,
                address=self._node.address,
                version=kvstore.__version__,
                cluster_epoch=self._node.core.epoch.newest,
                hostname=socket.gethostname(),
            )
        )

    def welcomed(self, welcome: master_pb2.MasterWelcome) -> None:
        """The master let this node in. StaleEpochError if it is one of an older epoch."""
        self._node.core.epoch.admit(welcome.cluster_epoch)
        self._deltas.clear()
        self._outgoing.clear()
        self._told.clear()
        self._retell, self._resync = False, True
        self.connected = True

    def ended(self) -> None:
        """The session is over."""
        self.connected = False

    # What there is to tell

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

    def namespaces_changed(self) -> None:
        """A client opened a namespace, and another one may have gone for it."""
        self._retell = True

    @property
    def urgent(self) -> bool:
        """Whether something waits that is not to be gathered with what comes next."""
        return self._retell or bool(self._outgoing)

    def due(self) -> Iterator[Report]:
        """All that is to be told now, in its order, made as it is taken.

        ResourceExhaustedError if so much waited that the session must begin anew.
        """
        while self._outgoing:
            yield self._outgoing.popleft()
        yield from self._tell_new()
        if self._resync:
            self._resync = False
            yield from self._inventory()
        yield from self._tell_new()  # before their blocks, which came while others were told
        if self._deltas.overflowed:  # nothing waits between this and ``take``
            raise ResourceExhaustedError("it reads too slowly; it gets the whole inventory anew")
        # A namespace goes after its last block: what of its blocks waits now is all there will be.
        events = self._deltas.take()
        roots = self._told.keys() | {event.root for event in events}
        gone = roots - {namespace.root for namespace in self._node.core.namespaces()}
        for event in events:
            yield Report(delta=event)
        for root in gone:
            self._told.pop(root, None)
            yield Report(dropped=master_pb2.NamespaceDropped(root=root))

    def _tell_new(self) -> Iterator[Report]:
        """The namespaces that were opened, or whose spec became known, until there is none."""
        while self._retell:
            self._retell = False
            known = self._told.items()
            namespaces = self._node.core.namespaces()
            yield from self._tell(
                [n for n in namespaces if (n.root, n.spec is not None) not in known]
            )

    def _tell(self, namespaces: Iterable[Namespace]) -> Iterator[Report]:
        for namespace in namespaces:
            self._told[namespace.root] = namespace.spec is not None
            yield Report(namespace=translate.namespace_to_message(namespace))

    def _inventory(self) -> Iterator[Report]:
        """Every namespace, then every block, as they are at one moment.

        Changes from then on wait until all of it is sent. Those that were waiting before are told
        once more, in their order, which ends in the same state.
        """
        core, sent = self._node.core, 0
        namespaces = core.namespaces()
        held = [(root, int(tier), "", keys) for root, tier, keys in core.inventory(INVENTORY_KEYS)]
        for root, engine_id, keys in self._node.hbm.inventory(INVENTORY_KEYS):
            held.append((root, int(Tier.HBM), engine_id, keys))
        yield from self._tell(namespaces)
        for root, tier_number, engine_id, keys in held:
            yield Report(inventory=_stored(root, tier_number, engine_id, keys))
            sent += len(keys) // KEY_BYTES
        yield Report(inventory_end=master_pb2.InventoryEnd(blocks=sent))

    def heartbeat(self) -> Report:
        """Space, and that the node lives."""
        config = self._node.core.config
        return Report(
            heartbeat=master_pb2.Heartbeat(
                tiers=[translate.usage_to_message(usage) for usage in self._node.core.usage()],
                sessions=self._node.sessions_open(),
                sent_unix_ms=time.time_ns() // 1_000_000,
                problems=self._node.problems(),
                ssd_admission=config.ssd_admission if config.ssd_bytes else "",
            )
        )

    # Directives

    def obey(self, directive: master_pb2.Directive) -> None:
        """Does what the master says; its result, if one is expected, is to be told."""
        result = master_pb2.DirectiveResult(id=directive.id)
        try:
            removal = self._carry_out(directive)
            result.blocks, result.bytes = removal.blocks, removal.bytes
            result.pinned = removal.pinned
        except (KVStoreError, ValueError) as error:
            result.error = str(error)
        if directive.id:
            self._outgoing.append(Report(result=result))

    def _carry_out(self, directive: master_pb2.Directive) -> Removal:
        core, now = self._node.core, self._node.now()
        core.epoch.admit(directive.cluster_epoch)
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
                return Removal(0, 0, 0)
            case "welcome":
                core.epoch.admit(directive.welcome.cluster_epoch)
                return Removal(0, 0, 0)
            case kind:
                raise InvalidArgumentError(f"this node does not know the directive {kind}")
        self._node.apply(effects)
        return removal


def _stored(root: bytes, tier: int, engine_id: str, keys: bytes) -> master_pb2.BlockEvents:
    return master_pb2.BlockEvents(
        root=root, tier=translate.number(tier), engine_id=engine_id, stored=keys
    )

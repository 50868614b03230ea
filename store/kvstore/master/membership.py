"""Which nodes there are, in which state, and the link to each one that is connected."""

import asyncio
import itertools
import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from kvstore_proto import common_pb2, master_pb2

from kvstore.errors import (
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from kvstore.master.state.base import KnownNode

PROTOCOL_VERSION = 1
ADDRESS_CHARS_MAX = 1024
DIRECTIVES_QUEUED_MAX = 1024
REPLACED_MAX = 16
RIVAL_SHOWN_S = 30.0
_NODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class NodeState(StrEnum):
    """Life of a node, as its master sees it."""

    SYNCING = "syncing"  # connected, its inventory is on the way
    READY = "ready"
    LOST = "lost"  # known, but not connected


class NodeLink:
    """One stream of a node: directives to send, and the results that are waited for."""

    def __init__(self, hello: master_pb2.NodeHello, task: "asyncio.Task[object] | None") -> None:
        self.node_id = hello.node_id
        self.instance = hello.instance
        self.outgoing: asyncio.Queue[master_pb2.Directive] = asyncio.Queue(DIRECTIVES_QUEUED_MAX)
        self.inventory_keys = 0
        self.resyncs = 0
        self.restart_inventory = False
        self.ended_because = ""
        self.held_up = False  # whether its reports wait for a write of this master
        self.roots: set[bytes] = set()  # namespaces that this node has
        self.unkept: dict[bytes, master_pb2.NamespaceReport] = {}  # those that were not kept yet
        self.odd_tiers = False  # whether it was logged that this node names tiers that are none
        self._task = task
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[master_pb2.DirectiveResult]] = {}

    def send(self, directive: master_pb2.Directive) -> None:
        """Queues a directive that has no result; a node that reads none of them is ended."""
        try:
            self.outgoing.put_nowait(directive)
        except asyncio.QueueFull:
            self.end("it does not read its directives")

    async def ask(
        self, directive: master_pb2.Directive, timeout_s: float
    ) -> master_pb2.DirectiveResult:
        """Sends a directive and waits for its result.

        Raises UnavailableError if the node goes or does not answer within ``timeout_s``.
        """
        directive.id = next(self._ids)
        future: asyncio.Future[master_pb2.DirectiveResult] = asyncio.Future()
        self._waiting[directive.id] = future
        self.send(directive)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise UnavailableError(f"no answer within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(directive.id, None)

    def resolve(self, result: master_pb2.DirectiveResult) -> None:
        """Hands a result to whoever waits for it; a late one is ignored."""
        future = self._waiting.get(result.id)
        if future is not None and not future.done():
            future.set_result(result)

    def end(self, why: str) -> None:
        """Ends the stream from this side."""
        self.ended_because = self.ended_because or why
        if self._task is not None:
            self._task.cancel()

    def ended(self) -> None:
        """The stream is over: fails what is still waited for."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(UnavailableError("the node's connection ended"))


@dataclass(slots=True)
class Node:
    """What the master knows of one node."""

    known: KnownNode
    state: NodeState = NodeState.LOST
    last_seen: float | None = None  # monotonic seconds; None: not since the master's start
    sessions: int = 0
    tiers: list[common_pb2.TierUsage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ssd_admission: str = ""
    link: NodeLink | None = None
    # Instances whose place another one took, while they may still live.
    replaced: deque[int] = field(default_factory=lambda: deque(maxlen=REPLACED_MAX))
    rival: str = ""  # address of another node that wants this id
    rival_at: float = -math.inf  # when it was refused last

    def problems_at(self, now: float) -> list[str]:
        """What an operator should look at."""
        if self.link is None:
            return []
        if not self.has_rival(now):
            return self.problems
        return [*self.problems, f"another node, at {self.rival}, has the same id and is refused"]

    def has_rival(self, now: float) -> bool:
        """Whether another node with this id was refused not long ago."""
        return now - self.rival_at < RIVAL_SHOWN_S


def check_hello(hello: master_pb2.NodeHello) -> None:
    """Raises where a node cannot be let in."""
    if hello.protocol_version != PROTOCOL_VERSION:
        raise PreconditionError(
            f"node {hello.node_id} speaks protocol version {hello.protocol_version}, this master "
            f"{PROTOCOL_VERSION}: run the same release on both"
        )
    if not _NODE_ID.fullmatch(hello.node_id):
        raise InvalidArgumentError(
            f"node id {hello.node_id[:200]!r}; take 1 to 128 letters, digits and ._:-"
        )
    if max(map(len, (hello.address, hello.hostname, hello.version))) > ADDRESS_CHARS_MAX:
        raise InvalidArgumentError(
            f"node {hello.node_id}: a name has over {ADDRESS_CHARS_MAX} characters"
        )


class Membership:
    """All known nodes. Time comes in as monotonic seconds."""

    def __init__(self, known: list[KnownNode], *, lost_after_s: float) -> None:
        self.nodes = {node.node_id: Node(node) for node in known}
        self.lost_total = 0
        self._lost_after_s = lost_after_s
        self._checked_at = -math.inf  # the first check may come late as well

    def join(self, hello: master_pb2.NodeHello, link: NodeLink, now: float) -> Node:
        """Takes a node in as syncing. An older link of the same node must have left before."""
        known = KnownNode(hello.node_id, hello.address, hello.hostname, hello.version)
        node = self.nodes.setdefault(hello.node_id, Node(known))
        node.known = known
        node.state = NodeState.SYNCING
        node.last_seen = now
        node.link = link
        return node

    def leave(self, link: NodeLink) -> bool:
        """A link is over. False where another link has taken the node over since."""
        node = self.nodes.get(link.node_id)
        if node is None or node.link is not link:
            return False
        node.link = None
        node.state = NodeState.LOST
        node.sessions = 0
        node.tiers = []
        node.ssd_admission = ""
        self.lost_total += 1
        return True

    def forget(self, node_id: str) -> Node:
        """Takes a lost node out.

        NotFoundError if it is not known, PreconditionError while it is connected.
        """
        node = self.nodes.get(node_id)
        if node is None:
            raise NotFoundError(f"no node {node_id!r}; `kvstore nodes` lists them")
        if node.link is not None:
            raise PreconditionError(
                f"node {node_id!r} is connected ({node.state}): stop it first, or its next start "
                "brings it back"
            )
        return self.nodes.pop(node_id)

    def overdue(self, now: float) -> list[NodeLink]:
        """Links that were silent for too long. To be called several times a heartbeat.

        Time that this process itself did not run (stopped, or a machine asleep) is not held
        against the nodes: their reports may be waiting to be read.
        """
        pause = now - self._checked_at
        self._checked_at = now
        late = []
        for node in self.connected():
            if pause > self._lost_after_s / 2:
                node.last_seen = now
            elif node.link and not node.link.held_up and self._silent(node, now):
                late.append(node.link)
        return late

    def _silent(self, node: Node, now: float) -> bool:
        return now - (node.last_seen or 0.0) > self._lost_after_s

    def connected(self) -> list[Node]:
        """Nodes with a link, in the order of their ids."""
        return self._where(lambda node: node.link is not None)

    def in_state(self, state: NodeState) -> list[Node]:
        """Nodes in ``state``, in the order of their ids."""
        return self._where(lambda node: node.state is state)

    def _where(self, wanted: Callable[[Node], bool]) -> list[Node]:
        return [node for _, node in sorted(self.nodes.items()) if wanted(node)]

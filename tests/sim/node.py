"""A node of the simulation: the real core, sessions and reports between virtual wires and disks."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from kvstore.core.clients import ClientSession, ClientSessions, Sight
from kvstore.core.directory import (
    ENTRY_WORDS,
    HEADER_BYTES,
    TOMBSTONE,
    DirectoryReader,
    DirectoryWriter,
)
from kvstore.core.effects import Body, Committed, DropSsd, Effects, ReadSsd, WriteSsd
from kvstore.core.node_core import NodeCore
from kvstore.core.spec import CacheSpec
from kvstore.core.ssd_record import SsdRecord
from kvstore.core.types import AckLevel, CoreConfig, IoOutcome, Namespace, Tier
from kvstore.errors import KVStoreError
from kvstore.node import ssd_block
from kvstore.node.hbm import HbmInventory
from kvstore_proto import node_pb2

from tests.sim.disk import Device, Medium
from tests.sim.master_session import MasterSession
from tests.sim.network import Stream
from tests.sim.oracle import Broken, Commit, must
from tests.sim.scenery import LARGE, SMALL, TENANTS

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

QUARANTINE_S = 1.5
DIRECTORY_ENTRIES = 256
WHOLE_CHAINS_EVERY = 4  # checks
Place = tuple[int, bytes, bytes]  # tier, root, key


@dataclass
class Hello:
    """The first message of a client's session."""

    client_id: str
    process: str
    settled: bool
    seen: bool  # whether the node can see the process


@dataclass
class Welcome:
    """What a client needs of this life of the node."""

    instance: int
    pool: "np.ndarray[Any, np.dtype[np.uint8]]"
    directory: DirectoryReader
    namespaces: dict[tuple[str, CacheSpec], Namespace]


@dataclass(eq=False)
class NodeSession(ClientSession):
    """A client's session, its stream, and what the node sees of its process."""

    stream: Stream | None = None
    sight: Sight = Sight.UNSEEN


class Node:
    """What survives a crash (the medium), and the current life (everything else)."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        self.world = cluster.world
        self.cluster = cluster
        self.node_id = f"node{number}"
        self.address = self.node_id
        random = self.world.random
        self.config = CoreConfig(
            dram_bytes=random.choice((8, 12, 20)) * 4096,
            ssd_bytes=random.choice((0, 8, 20, 48)) * 4096,
            segment_bytes=random.choice((4096, 8192)),
            dram_policy=random.choice(("lru", "s3fifo")),
            ssd_policy=random.choice(("lru", "s3fifo")),
            ghost_entries=64,
            reads_in_flight_max=4,
            writes_in_flight_max=6,
            prefetch_max=8,
            blocks_max=random.choice((24, 48, 128)),
            holds_per_session_max=32,
            shard_timeout_s=2.0,
        )
        self.medium = Medium(self.config.ssd_bytes)
        self.up = False
        self.lives = 0
        self.sessions_seen = itertools.count(1)

    # Life and death

    def start(self) -> None:
        """A new life: an empty pool, and the blocks that the medium has."""
        self.up = True
        self.lives += 1
        self.instance = int(self.node_id[-1]) * 1000 + self.lives
        self.pool = bytearray(self.config.dram_bytes)
        nbytes = DirectoryWriter.size_bytes(DIRECTORY_ENTRIES, self.config.dram_bytes)
        buffer = bytearray(nbytes)
        writer = DirectoryWriter(
            buffer,
            entries=DIRECTORY_ENTRIES,
            pool_bytes=self.config.dram_bytes,
            instance=self.instance,
        )
        self.directory = DirectoryReader(buffer)
        table = np.frombuffer(buffer, "<u8", DIRECTORY_ENTRIES * ENTRY_WORDS, HEADER_BYTES)
        self.directory_heads = table[::ENTRY_WORDS]
        self.core = NodeCore(self.config, writer, TENANTS)
        self.hbm = HbmInventory()
        self.device = Device(self.world, self.node_id, self.medium, self.pool)
        self.device.reports = self
        self.sessions: ClientSessions[NodeSession] = ClientSessions(
            self.core, quarantine_s=QUARANTINE_S, sessions_max=16
        )
        self.by_stream: dict[Stream, NodeSession | None] = {}
        self.commits: dict[tuple[int, int], Commit] = {}  # not acknowledged yet
        self.told: set[Place] = set()
        self.checks = 0
        self.scrub_row = 0
        self._listeners: dict[int, Callable[[int, Body], None]] = {}
        self._tick_at: float | None = None
        self.master = MasterSession(self)
        self.namespaces = {
            (tenant, spec): self.core.open_namespace(spec, tenant)
            for tenant in TENANTS
            for spec in (SMALL, LARGE)
        }
        self._restore()
        self.master.start()

    def _restore(self) -> None:
        records = [SsdRecord.decode(key, value) for key, value in self.medium.index.items()]
        self.apply(self.core.restore(records))
        kept = {(root, key) for tier, root, key in self.told if tier == Tier.SSD}
        for root, key in sorted(self.cluster.oracle.synced[self.node_id] - kept):
            raise Broken(
                "I3", f"{self.node_id} lost block {key.hex()[:16]} of {root.hex()[:8]}", lost=True
            )

    def crash(self, *, power: bool) -> None:
        """The process is gone, and with the power all that was not synced."""
        self.up = False
        self.device.dead = True
        self.master.die()
        for stream in list(self.by_stream):
            stream.close(self)
        self.by_stream.clear()
        if power:
            self.medium.lose_power(self.world)

    # What the product asks of a node

    def now(self) -> float:
        """Monotonic seconds."""
        return self.world.now

    def sessions_open(self) -> int:
        """Sessions of clients whose stream is open."""
        return self.sessions.open_count

    def problems(self) -> list[str]:
        """None that matter here."""
        return []

    def apply(self, effects: Effects) -> None:
        """As the driver does: answers, reads, removals, writes, events."""
        for event in effects.events:
            self._told(event.root, event.tier, event.keys, event.stored)
        for reply in effects.replies:
            if isinstance(reply.body, Committed):
                self._acknowledged(reply.session_id, reply.request_id, reply.body.levels)
            if (listener := self._listeners.get(reply.session_id)) is not None:
                listener(reply.request_id, reply.body)
            session = self._session(reply.session_id)
            if session is not None and session.stream is not None and not session.lost:
                session.stream.send(self, (reply.request_id, reply.body))
        if effects.reads:
            self.device.submit_reads(effects.reads)
        if effects.drops:
            self.device.submit_drops(effects.drops)
        if effects.writes:
            self.device.submit_writes(effects.writes)
        for event in effects.events:
            come, gone = (event.keys, b"") if event.stored else (b"", event.keys)
            self.master.changed(event.root, event.tier, come, gone)
        self._set_tick()

    def listen(self, session_id: int, listener: Callable[[int, Body], None]) -> None:
        """Has the answers to a session of the checks go to ``listener``."""
        self._listeners[session_id] = listener

    @property
    def reported(self) -> set[Place]:
        """What the master should know of this node."""
        return self.told

    def _session(self, session_id: int) -> NodeSession | None:
        return next((s for s in self.sessions.all() if s.id == session_id), None)

    def _told(self, root: bytes, tier: Tier, joined: bytes, stored: bool) -> None:
        synced = self.cluster.oracle.synced[self.node_id]
        for at in range(0, len(joined), 32):
            place = (int(tier), root, joined[at : at + 32])
            must((place in self.told) != stored, "I6", "an event came twice")
            if stored:
                self.told.add(place)
                if tier == Tier.SSD:
                    good = self._is_durable(root, place[2])
                    must(good, "I3", f"{place[2].hex()[:16]} is called durable and is not")
                    for commit in self.commits.values():
                        if commit.namespace.root == root:
                            commit.durable.add(place[2])
            else:
                self.told.discard(place)
                if tier == Tier.SSD:
                    synced.discard((root, place[2]))

    def _acknowledged(self, session_id: int, request_id: int, levels: bytes) -> None:
        commit = self.commits.pop((session_id, request_id))
        namespace, oracle = commit.namespace, self.cluster.oracle
        for key, level in zip(commit.keys, levels, strict=True):
            if level >= AckLevel.PERSISTED:
                oracle.acked += 1
                # Other keys of the commit may have come later: it can be gone by now.
                early = f"{key.hex()[:16]} acknowledged before it was durable"
                must(key in commit.durable, "I3", early)
                if (int(Tier.SSD), namespace.root, key) in self.told:
                    oracle.synced[self.node_id].add((namespace.root, key))

    def _is_durable(self, root: bytes, key: bytes) -> bool:
        """Whether the block would be there, and right, after a loss of power now."""
        value = self.medium.index.get(key)
        if value is None:
            return False
        record = SsdRecord.decode(key, value)
        if self.medium.is_damaged(record.ssd_offset, record.nbytes):
            return True
        data = self.medium.read(record.ssd_offset, record.nbytes, durable=True)
        tenant = next(n.tenant for n in self.namespaces.values() if n.root == root)
        return self.cluster.oracle.is_right(tenant, key, data)

    # Time and the disk

    def _set_tick(self) -> None:
        due = self.core.next_deadline()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            delay = max(0.0, due - self.world.now)
            self.world.after(delay, f"{self.node_id} tick", self._tick, self.lives)

    def _tick(self, life: int) -> bool:
        if not self.up or life != self.lives:
            return False
        self._tick_at = None
        self.apply(self.core.tick(self.world.now))
        return True

    def reads_done(self, done: Sequence[tuple[ReadSsd, IoOutcome]]) -> None:
        """Reads ended."""
        self.apply(self.core.reads_done(done, self.world.now))

    def writes_done(self, done: Sequence[WriteSsd], ok: bool) -> None:
        """Writes of one group ended alike."""
        self.apply(self.core.writes_done(done, ok, self.world.now))

    def drops_done(self, done: Sequence[DropSsd]) -> None:
        """Removals are durable."""
        effects = Effects()
        for op in done:
            if op.row >= 0:
                effects.extend(self.core.drops_done([op], self.world.now))
        self.apply(effects)

    def scrub(self) -> None:
        """Looks again at a few copies."""
        copies, row = self.core.scrub_next(self.scrub_row, 3 * 4096)
        self.scrub_row = max(0, row)
        seen = []
        for copy in copies:
            data = self.medium.read(copy.ssd_offset, copy.nbytes)
            good = ssd_block.verify(memoryview(data), copy.checksums)
            seen.append((copy, IoOutcome.OK if good else IoOutcome.CORRUPT))
        self.apply(self.core.scrub_done(seen, self.world.now))

    # Clients

    def received(self, stream: Stream, message: Any) -> None:
        """The next message of a client, or of the hello of one that comes."""
        session = self.by_stream.get(stream)
        if isinstance(message, Hello):
            self._admit(stream, message)
        elif session is None:
            return
        elif message == "goodbye":
            self.apply(self.sessions.settle(session, self.world.now))
        elif isinstance(message, node_pb2.SessionRequest):
            part = message.release
            self.apply(
                self.core.release(
                    session.id, part.acquire_id, part.first, part.count, self.world.now
                )
            )
        else:
            self._request(session, *message)

    def _request(self, session: NodeSession, kind: str, request: int, *rest: Any) -> None:
        if kind == "commit":
            reserve, indices, sums, level, namespace, keys = rest
            self.commits[session.id, request] = Commit(namespace, keys)
            effects = self.core.commit(
                session.id, request, reserve, indices, sums, level, self.world.now
            )
            self.apply(effects)
            return
        call = getattr(self.core, kind)
        shard = {}
        if kind == "reserve":
            shard = {"shard_index": rest[-2], "num_shards": rest[-1]}
            rest = rest[:-2]
        self.apply(call(session.id, request, *rest, self.world.now, **shard))

    def _admit(self, stream: Stream, hello: Hello) -> None:
        returns = False
        if hello.settled:
            for older in self.sessions.of_client(hello.client_id):
                returns |= older.lost
                self.apply(self.sessions.settle(older, self.world.now))
                if older.stream is not None and not older.lost:
                    self._end_stream(older.stream)
        session = NodeSession(
            next(self.sessions_seen), hello.client_id, hello.process, stream=stream
        )
        session.sight = self.cluster.sight_of(hello.process) if hello.seen else Sight.UNSEEN
        try:
            self.sessions.open(session, returns=returns)
        except KVStoreError:
            self._end_stream(stream)
            return
        self.by_stream[stream] = session
        pool = np.frombuffer(self.pool, dtype=np.uint8)
        stream.send(self, Welcome(self.instance, pool, self.directory, self.namespaces))

    def _end_stream(self, stream: Stream) -> None:
        stream.close(self)
        self.by_stream.pop(stream, None)

    def broken(self, stream: Stream) -> None:
        """A client's stream is over."""
        session = self.by_stream.pop(stream, None)
        if session is None:
            return
        self.apply(self.sessions.stream_ended(session, session.sight, self.world.now))
        if session.settles_at is not None:
            delay = session.settles_at - self.world.now
            label = f"{self.node_id} quarantine"
            self.world.after(delay, label, self._quarantine_over, session, self.lives)

    def _quarantine_over(self, session: NodeSession, life: int) -> bool:
        if not self.up or life != self.lives or not self.sessions.holds(session):
            return False
        self.cluster.quarantine_over(session.client_id)
        self.apply(self.sessions.settle(session, self.world.now))
        return True

    def process_ended(self, process: str) -> None:
        """The pidfd of a client became readable."""
        for session in self.sessions.all():
            if session.process == process and session.sight is Sight.ALIVE:
                session.sight = Sight.GONE
                self.apply(self.sessions.process_ended(session, self.world.now))

    # Checks

    def check(self) -> None:
        """Everything adds up, slowly: rows, space, the directory, and what was told."""
        self.core.check_integrity()
        self.checks += 1
        held = {
            (int(tier), root, joined[at : at + 32])
            for root, tier, joined in self.core.inventory(1 << 16)
            for at in range(0, len(joined), 32)
        }
        must(held == self.told, "I6", "the events do not add up to the inventory")
        for usage in self.core.usage():
            total = usage.free_bytes + usage.live_bytes + usage.pending_bytes
            must(total + usage.quarantined_bytes == usage.capacity_bytes, "I6", f"space of {usage}")
        self._check_directory(held)

    def _check_directory(self, held: set[Place]) -> None:
        """It says what is held, and nothing else."""
        tiers = {key: tier for tier, _, key in sorted(held, reverse=True)}  # DRAM comes last
        found = self.directory.match(b"".join(tiers)).tolist()
        must(found == list(tiers.values()), "I2", f"the directory says {found}, not {tiers}")
        marks = self.directory_heads >> np.uint64(32)
        entries = int(((marks != 0) & (marks != TOMBSTONE)).sum())
        must(entries == len(tiers), "I2", f"the directory has {entries} keys, not {len(tiers)}")
        if self.checks % WHOLE_CHAINS_EVERY:
            return
        for space in self.cluster.spaces:
            for chain in space.chains:
                expected = [
                    tiers[key] for key in itertools.takewhile(tiers.__contains__, chain.keys)
                ]
                found = self.directory.match(chain.joined).tolist()
                must(found == expected, "I2", f"the directory says {found}, not {expected}")

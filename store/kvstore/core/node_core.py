"""NodeCore: everything that a storage node decides, without I/O, clock or threads."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import numpy as np

from kvstore.core.acquire import Acquires
from kvstore.core.admin import evict_blocks, purge_blocks
from kvstore.core.audit import Audit, audit
from kvstore.core.blocks import Blocks
from kvstore.core.checks import Indices, RequestChecks, checksums_of, places_of
from kvstore.core.directory import DirectoryWriter
from kvstore.core.effects import (
    Aborted,
    Body,
    DropSsd,
    Effects,
    Failed,
    Matched,
    Prefetched,
    ReadSsd,
    Reply,
    WriteSsd,
)
from kvstore.core.epoch import EpochGuard
from kvstore.core.fills import Fills
from kvstore.core.keys import DEFAULT_TENANT, DEFAULT_TENANTS, namespace_root, split_keys
from kvstore.core.leases import Reservation, Session
from kvstore.core.reserve import Reserves
from kvstore.core.restore import restore_blocks
from kvstore.core.scrub import ScrubSsd, next_copies, settle_copies
from kvstore.core.sessions import Sessions
from kvstore.core.spec import CacheSpec
from kvstore.core.ssd_columns import SsdColumns
from kvstore.core.ssd_record import SsdRecord
from kvstore.core.tiering import Tiering
from kvstore.core.transfers import Transfers
from kvstore.core.types import AckLevel, CoreConfig, IoOutcome, Namespace, Removal, Tier, TierUsage
from kvstore.errors import KVStoreError, NotFoundError


class NodeCore:
    """The state of one node. A call changes it and returns the effects to carry out.

    ``now`` is monotonic seconds and never goes back. A bad request (unknown namespace, too many
    keys) changes nothing and is answered with a Failed reply; only ``open_namespace`` and
    ``open_session`` raise. Calls come from one thread.
    """

    def __init__(
        self,
        config: CoreConfig,
        directory: DirectoryWriter,
        tenants: Mapping[str, bytes] = DEFAULT_TENANTS,
    ) -> None:
        """``tenants`` has the secret of each; with security off there is one, ``default``."""
        self.config = config
        self.directory = directory
        self.epoch = EpochGuard()
        self._tenants = tenants
        self._blocks = Blocks(config, directory)
        self._tiering = Tiering(self._blocks)
        self._transfers = Transfers(self._tiering)
        self._acquires = Acquires(self._tiering, self._transfers)
        self._fills = Fills(self._tiering)
        self._reserves = Reserves(self._tiering, self._transfers, self._fills)
        self._checks = RequestChecks(self._blocks)
        self._sessions = Sessions(config.sessions_max, self._acquires, self._reserves)

    @property
    def counters(self) -> dict[str, int]:
        """What happened since the start, by name."""
        counters = dict(self._blocks.counters)
        counters["dropped_namespaces"] = self._blocks.namespaces.dropped
        counters["directory_unpublished_blocks"] = self.directory.unpublished
        counters["stale_epoch_orders"] = self.epoch.refused
        return counters

    # Namespaces and sessions

    def open_namespace(
        self,
        spec: CacheSpec,
        tenant: str = DEFAULT_TENANT,
        session_id: int | None = None,
        in_hbm: Callable[[], Set[bytes]] = frozenset,
    ) -> Namespace:
        """The namespace of a spec; the same one for the same spec and tenant (empty: default).

        At the limit of namespaces the one used longest ago goes that no session opened or asked
        for and that has no block, ``in_hbm`` (roots) either; ResourceExhaustedError if none can.
        InvalidArgumentError if there is no such tenant or a tier cannot hold one of its blocks.
        """
        session = None if session_id is None else self._sessions.asking(session_id)
        tenant = tenant or DEFAULT_TENANT
        self._checks.tenant(tenant, self._tenants)
        self._checks.namespace_fits(spec)
        root = namespace_root(spec, self._tenants[tenant])
        namespaces = self._blocks.namespaces
        namespace = namespaces.open(root, spec.block_bytes, lambda: self._needed(in_hbm()))
        namespace.spec, namespace.tenant = spec, tenant
        if session is not None:
            session.namespaces.add(namespace)
        return namespace

    def _needed(self, in_hbm: Set[bytes]) -> set[Namespace]:
        held = self._sessions.namespaces() | self._blocks.namespaces_with_rows()
        return held | {n for n in self.namespaces() if n.root in in_hbm}

    def namespaces(self) -> list[Namespace]:
        """All that are open: some client opened them, or blocks of them were found on SSD."""
        return self._blocks.namespaces.all()

    def restore(self, records: SsdColumns | Iterable[SsdRecord], sequence: int = 0) -> Effects:
        """Takes over the blocks of the SSD index, at start only; new records follow ``sequence``.

        Records that cannot be used come back as drops with row -1.
        """
        columns = records if isinstance(records, SsdColumns) else SsdColumns.of(records)
        self._transfers.restored(max(sequence, restore_blocks(self._blocks, columns)))
        return self._take_effects()

    def open_session(self, session_id: int) -> None:
        """A client came. ResourceExhaustedError at the limit of sessions."""
        self._sessions.open(session_id)

    def session_settled(self, session_id: int, now: float) -> Effects:
        """Nothing of this session is in use any more: all that it held is back at once."""
        self._sessions.settle(session_id)
        return self._finish(now)

    def session_quarantined(self, session_id: int, now: float) -> Effects:
        """The stream is lost, the process may live: what it holds stays held until settled."""
        self._sessions.quarantine(session_id)
        return self._finish(now)

    def session_holds(self, session_id: int) -> bool:
        """Whether a session has slots or pins."""
        return self._sessions.holds(session_id)

    def sessions(self) -> int:
        """Open ones, without those in quarantine."""
        return self._sessions.count_open()

    # Requests of a session

    def acquire(
        self,
        session_id: int,
        request_id: int,
        ns_id: int,
        keys: bytes,
        parent: bytes,
        timeout_s: float,
        now: float,
    ) -> Effects:
        """Pins the leading blocks held; Granted as they are in DRAM, in chain order, then End.

        With a timeout of 0 only what DRAM has now.
        """

        def call(session: Session) -> None:
            namespace = self._checks.keys(session, ns_id, keys, parent)
            wait_s = self._checks.wait_s(session, timeout_s, len(self._acquires.waiting))
            deadline = now + wait_s if wait_s else None
            self._acquires.acquire(session, request_id, namespace, keys, deadline)

        return self._request(session_id, request_id, call, now)

    def release(
        self, session_id: int, acquire_id: int, first: int, count: int, now: float
    ) -> Effects:
        """Unpins blocks first .. first + count - 1 of an Acquire (count 0: all from first on).

        Blocks of the range that were not granted yet never will be, all others still come. End
        has RELEASED if the last one that would have come was released.
        """
        session = self._sessions.find(session_id)
        if session is not None and first >= 0 and count >= 0:
            self._acquires.release(session, acquire_id, first, count)
        return self._finish(now)

    def reserve(
        self,
        session_id: int,
        request_id: int,
        ns_id: int,
        keys: bytes,
        parent: bytes,
        timeout_s: float,
        now: float,
        *,
        shard_index: int = 0,
        num_shards: int = 1,
        level: AckLevel = AckLevel.MEMORY,
    ) -> Effects:
        """A slot for each key that nobody has; one Reserved, at the latest after the timeout."""

        def call(session: Session) -> None:
            namespace, names = self._checks.keys(session, ns_id, keys, parent), split_keys(keys)
            self._checks.reserve(names, shard_index, num_shards)
            wait_s = self._checks.wait_s(session, timeout_s, len(self._reserves.waiting))
            reservation = Reservation(
                session_id,
                request_id,
                namespace,
                names,
                parent,
                shard_index,
                num_shards or 1,
                now + wait_s,
                level,
            )
            self._reserves.reserve(session, reservation, now)

        return self._request(session_id, request_id, call, now)

    def commit(
        self,
        session_id: int,
        request_id: int,
        reserve_id: int,
        indices: Indices,
        checksums: bytes,
        level: AckLevel,
        now: float,
    ) -> Effects:
        """Makes filled slots readable; Committed follows when ``level`` is reached."""

        def call(session: Session) -> None:
            reservation = self._reserves.find(session, reserve_id)
            places = places_of(indices, len(reservation.statuses))
            sums = checksums_of(checksums, len(places))
            self._reserves.commit(session, request_id, reservation, places, sums, level, now)

        return self._request(session_id, request_id, call, now)

    def abort(
        self, session_id: int, request_id: int, reserve_id: int, indices: Indices, now: float
    ) -> Effects:
        """Gives reserved slots back unfilled (no indices: all not committed); Aborted follows."""

        def call(session: Session) -> None:
            try:
                reservation = self._reserves.find(session, reserve_id)
            except NotFoundError:
                count = 0  # all is settled already
            else:
                places = places_of(indices, len(reservation.statuses))
                count = self._reserves.abort(session, reservation, places)
            self._reply(session_id, request_id, Aborted(count))

        return self._request(session_id, request_id, call, now)

    def prefetch(
        self, session_id: int, request_id: int, ns_id: int, keys: bytes, parent: bytes, now: float
    ) -> Effects:
        """Starts loads of the leading blocks that are only on SSD; Prefetched follows."""

        def call(session: Session) -> None:
            namespace = self._checks.keys(session, ns_id, keys, parent)
            started = self._acquires.prefetch(namespace, keys)
            self._reply(session_id, request_id, Prefetched(started))

        return self._request(session_id, request_id, call, now)

    def match(self, session_id: int, request_id: int, ns_id: int, keys: bytes) -> Effects:
        """Tiers of the leading blocks held; Matched follows."""

        def call(session: Session) -> None:
            namespace = self._checks.keys(session, ns_id, keys, b"")
            self._reply(session_id, request_id, Matched(self._acquires.match(namespace, keys)))

        self._answer(session_id, request_id, call)
        return self._take_effects()

    # The disk

    def reads_done(self, ops: Sequence[tuple[ReadSsd, IoOutcome]], now: float) -> Effects:
        """Reads ended; unless OK, the copy on SSD is dropped."""
        self._transfers.reads_done(ops)
        self._acquires.wake(np.fromiter((op.row for op, _ in ops), np.int64, len(ops)))
        return self._finish(now)

    def writes_done(
        self, ops: Sequence[WriteSsd], ok: bool, now: float, level: AckLevel = AckLevel.SYNCED
    ) -> Effects:
        """A group of writes ended together; ``level`` is what the daemon's medium gives."""
        self._transfers.writes_done(ops, ok, level)
        return self._finish(now)

    def writes_corrupt(self, ops: Sequence[WriteSsd], now: float) -> Effects:
        """What was to be written is not what was committed: these blocks are dropped everywhere."""
        self._transfers.writes_corrupt(ops)
        return self._finish(now)

    def drops_done(self, ops: Sequence[DropSsd], now: float, *, ok: bool = True) -> Effects:
        """Removals are durable: their slots are free; or, not ``ok``, they never will be."""
        self._transfers.drops_done(ops, ok=ok)
        return self._finish(now)

    def scrub_next(self, first_row: int, bytes_max: int) -> tuple[list[ScrubSsd], int]:
        """SSD copies to be verified, from row 0 on; the row to go on with, -1 at the end."""
        return next_copies(self._blocks, first_row, bytes_max)

    def scrub_done(self, seen: Sequence[tuple[ScrubSsd, IoOutcome]], now: float) -> Effects:
        """Copies were verified; unless OK they are dropped, if they are still there."""
        self._acquires.wake(settle_copies(self._blocks, seen))
        return self._finish(now)

    # Administration and time

    def evict(
        self, tier: Tier, keys: bytes, max_bytes: int, drop: bool, now: float
    ) -> tuple[Effects, Removal]:
        """Removes these blocks (no keys: any, oldest first, up to max_bytes, 0: all) of a tier.

        Leaves first; without ``drop`` a last copy stays until it is on SSD.
        """
        removal = evict_blocks(self._tiering, tier, split_keys(keys), max_bytes, drop=drop)
        self._transfers.demotion.insist(np.fromiter(self._tiering.leaving, np.int64))
        return self._finish(now), removal

    def purge(self, root: bytes | None, now: float) -> tuple[Effects, Removal]:
        """Forgets the blocks of one namespace (None: of all); held slots follow when let go."""
        rows, removal = purge_blocks(self._tiering, root)
        self._acquires.wake(rows)
        return self._finish(now), removal

    def tick(self, now: float) -> Effects:
        """Ends what waited too long."""
        self._acquires.tick(now)
        self._reserves.tick(now)
        return self._finish(now)

    def next_deadline(self) -> float | None:
        """When ``tick`` has something to do, if nothing else happens before."""
        times = (self._acquires.next_deadline(), self._reserves.next_deadline())
        return min((time for time in times if time is not None), default=None)

    # Observation

    def usage(self) -> list[TierUsage]:
        """Space of DRAM and, if there is one, of the SSD tier."""
        return self._blocks.usage()

    def pinned_blocks(self) -> int:
        """Blocks under at least one lease."""
        return int(np.count_nonzero(self._blocks.table.pins))

    def inventory(self, chunk_keys: int = 8192) -> Iterator[tuple[bytes, Tier, bytes]]:
        """(root, tier, keys) of all readable blocks; a block in both tiers comes twice."""
        return self._blocks.inventory(chunk_keys)

    def idle(self) -> bool:
        """Nothing waits and no disk request is out."""
        return self._acquires.idle and self._reserves.idle and self._transfers.idle

    def audit(self) -> Audit:
        """Whether space and leases add up; a few milliseconds for a million blocks."""
        return audit(self._blocks)

    def check_integrity(self) -> None:
        """AssertionError if space, pins, links or lists do not add up; slow."""
        self._blocks.check()
        self._fills.check()
        self._acquires.check()
        self._transfers.demotion.check()
        self._sessions.check(self._blocks.table)

    def _finish(self, now: float) -> Effects:
        """Lets everything go on that the call made possible."""
        while True:
            version = self._blocks.room_version
            self._acquires.pump()
            self._reserves.pump(now)
            self._transfers.pump_writes()
            waiting = self._reserves.waiting or not self._acquires.idle
            if not waiting or version == self._blocks.room_version:
                return self._take_effects()

    def _take_effects(self) -> Effects:
        effects, self._blocks.out = self._blocks.out, Effects()
        return effects

    def _request(
        self, session_id: int, request_id: int, call: Callable[[Session], None], now: float
    ) -> Effects:
        self._answer(session_id, request_id, call)
        return self._finish(now)

    def _answer(self, session_id: int, request_id: int, call: Callable[[Session], None]) -> None:
        try:
            call(self._sessions.asking(session_id))
        except KVStoreError as error:
            self._reply(session_id, request_id, Failed(error))

    def _reply(self, session_id: int, request_id: int, body: Body) -> None:
        self._blocks.out.replies.append(Reply(session_id, request_id, body))

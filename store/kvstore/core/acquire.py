"""Acquires: pins on the leading blocks of a prompt, granted in chain order as they arrive."""

from collections import deque

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import Blocks
from kvstore.core.distinct import distinct
from kvstore.core.effects import Body, End, Granted, Reply
from kvstore.core.keys import KEY_BYTES
from kvstore.core.leases import Lease, Session
from kvstore.core.runs import slot_runs
from kvstore.core.table import DramState, Mask, Rows, SsdState
from kvstore.core.tiering import Tiering
from kvstore.core.transfers import Transfers
from kvstore.core.types import EndReason, Namespace, Tier
from kvstore.errors import InvalidArgumentError

_LOOK_AHEAD_MIN = 64  # blocks of a lease that are looked at together
_ONE = np.int32(1)  # of the type of the pins, else ``add.at`` takes twenty times as long


class Acquires:
    """All leases that have not ended, in the order of their requests, and what they wait for.

    A lease waits at one row: the first that is not in DRAM. Reads are started ahead of it along
    its chain. The oldest lease has three quarters of those that may be out, the next one as much
    of what is left, and so on; what one of them does not need goes to the oldest that does.
    """

    def __init__(self, tiering: Tiering, transfers: Transfers) -> None:
        self.blocks: Blocks = tiering.blocks
        self.tiering = tiering
        self.transfers = transfers
        self.waiting: dict[Lease, Session] = {}
        self._unread: dict[Lease, None] = {}  # those that wait and may have reads to start
        self._waiters: dict[int, list[Lease]] = {}
        self._prefetch: deque[int] = deque()
        self._starved_at = -1  # room_version at which no slot was found

    @property
    def idle(self) -> bool:
        """Nobody waits for a load."""
        return not (self.waiting or self._prefetch)

    def acquire(
        self,
        session: Session,
        request_id: int,
        namespace: Namespace,
        keys: bytes,
        deadline: float | None,
    ) -> None:
        """``deadline`` None: only what DRAM has now."""
        if request_id in session.leases:
            raise InvalidArgumentError(f"acquire {request_id} is still open in this session")
        rows, in_dram = self._leading(namespace, keys, dram_only=deadline is None)
        whole = bool(in_dram.all())
        self.blocks.open_keys.add(session, len(rows))
        behind = keys[KEY_BYTES * len(rows) : KEY_BYTES * (len(rows) + 1)]
        lease = Lease(
            session.id,
            request_id,
            namespace,
            rows,
            np.where(in_dram, np.uint8(Tier.DRAM), np.uint8(Tier.SSD)),
            reason=self._end_reason(namespace, behind),
            deadline=deadline or 0.0,
        )
        session.leases[request_id] = lease
        self.waiting[lease] = session
        session.waiting += 1
        self._unread[lease] = None
        np.add.at(self.blocks.table.pins, rows, _ONE)
        self._touch(rows, rows if whole else rows[in_dram])
        self.transfers.demotion.used(rows)
        self.blocks.count("acquires")
        self.blocks.count("acquired_keys", len(keys) // KEY_BYTES)
        if whole:  # as nearly always: nothing to look for
            self._grant(lease, len(rows))
            self._end(lease, lease.reason)
        else:
            self._advance(lease)

    def prefetch(self, namespace: Namespace, keys: bytes) -> int:
        """Queues loads of leading blocks that are on SSD only; how many.

        At most half of what DRAM holds: nothing pins them, and more would push out themselves.
        """
        rows, _ = self._leading(namespace, keys, dram_only=False)
        rows = rows[self.blocks.table.dram_state[rows] == DramState.NONE]
        rows = rows[: max(0, self.blocks.config.prefetch_max - len(self._prefetch))]
        rows = rows[: max(1, self.blocks.dram.slots_max(namespace.slot_bytes) // 2)]
        self.blocks.ssd_policy.touched(rows)
        self._prefetch.extend(rows.tolist())
        return len(rows)

    def match(self, namespace: Namespace, keys: bytes) -> bytes:
        """One Tier a byte for the leading blocks held."""
        rows, in_dram = self._leading(namespace, keys, dram_only=False)
        del rows
        return np.where(in_dram, np.uint8(Tier.DRAM), np.uint8(Tier.SSD)).tobytes()

    def release(self, session: Session, acquire_id: int, first: int, count: int) -> None:
        """Unpins a range; of what was not granted yet, this range alone never will be."""
        lease = session.leases.get(acquire_id)
        if lease is None:
            self.blocks.count("releases_of_nothing")
            return
        last = first + count if count else len(lease.rows)
        self._let_go(session, lease, slice(first, last))
        if lease.ended or lease.held[lease.granted]:
            return
        if lease.held[lease.granted :].any():
            self._leave_waiters(lease)
            self._advance(lease)
        else:
            self._end(lease, EndReason.RELEASED)

    def let_all_go(self, session: Session) -> None:
        """The session ended: every pin of it."""
        for lease in list(session.leases.values()):
            if not lease.ended:
                self._end(lease, EndReason.RELEASED)
            self._let_go(session, lease, slice(None))

    def stop_waiting(self, session: Session) -> None:
        """Nobody hears of further blocks; those granted stay pinned."""
        for lease in list(session.leases.values()):
            if not lease.ended:
                self._end(lease, EndReason.RELEASED)

    def wake(self, rows: Rows) -> None:
        """The state of rows changed: those that wait for them go on."""
        for row in rows.tolist():
            for lease in self._waiters.pop(row, ()):
                self._advance(lease)

    def pump(self) -> None:
        """Starts reads for the leases that wait, then for prefetches."""
        if self._starved_at == self.blocks.room_version or not self.transfers.reads_worthwhile:
            return
        for lease, share in self._shares() if len(self._unread) > 1 else ():
            if lease in self._unread and not self._read_ahead(lease, share - self._loading(lease)):
                self._starved_at = self.blocks.room_version
                return
        while self._unread and self.transfers.read_room > 0:
            if not self._read_ahead(next(iter(self._unread)), self.transfers.read_room):
                self._starved_at = self.blocks.room_version
                return
        while self._prefetch and self.transfers.read_room > 0:
            if not self._read_prefetched():
                self._starved_at = self.blocks.room_version
                return

    def tick(self, now: float) -> None:
        """Ends leases whose time is over."""
        for lease in [lease for lease in self.waiting if lease.deadline <= now]:
            self._end(lease, EndReason.NO_SPACE if lease.starved else EndReason.TIMED_OUT)

    def next_deadline(self) -> float | None:
        """Of the leases that wait."""
        return min((lease.deadline for lease in self.waiting), default=None)

    def check(self) -> None:
        """AssertionError if a read is due that nothing would start."""
        table = self.blocks.table
        for lease in self.waiting:
            looked = len(lease.rows) if lease not in self._unread else lease.looked
            rows = lease.rows[lease.granted : looked][lease.held[lease.granted : looked]]
            due = (table.dram_state[rows] == DramState.NONE) & (
                table.ssd_state[rows] == SsdState.LIVE
            )
            assert not due.any(), f"acquire {lease.request_id} passed over what it has to read"

    def _leading(self, namespace: Namespace, keys: bytes, *, dram_only: bool) -> tuple[Rows, Mask]:
        """Rows of the leading keys held, and which of them are in DRAM."""
        table = self.blocks.table
        rows = table.index.find_all(keys)
        known = (rows >= 0) & (table.namespace[rows] == namespace.number)
        state = table.dram_state[rows]
        in_dram = known & (state == DramState.LIVE)
        if in_dram.all():
            return rows, in_dram
        if dram_only:
            held = in_dram
        else:
            on_ssd = (table.ssd_state[rows] == SsdState.LIVE) & (state != DramState.DEAD)
            held = in_dram | (known & on_ssd)
        count = len(rows) if held.all() else int(np.argmin(held))
        return rows[:count].copy(), in_dram[:count]  # a view would keep all of them

    def _end_reason(self, namespace: Namespace, behind: bytes) -> EndReason:
        if not behind:
            return EndReason.COMPLETE
        if len(self._leading(namespace, behind, dram_only=False)[0]):
            return EndReason.TIMED_OUT  # on SSD, and the caller would not wait
        return self.blocks.ghosts.reason(behind)

    def _touch(self, rows: Rows, in_dram: Rows) -> None:
        blocks = self.blocks
        blocks.dram_policy.touched(in_dram)
        if blocks.ssd:
            blocks.ssd_policy.touched(rows[blocks.table.ssd_state[rows] == SsdState.LIVE])

    def _advance(self, lease: Lease) -> None:
        table = self.blocks.table
        ahead, wanted = lease.rows[lease.granted :], lease.held[lease.granted :]
        passed = (table.dram_state[ahead] == DramState.LIVE) | ~wanted
        count = len(ahead) if passed.all() else int(np.argmin(passed))
        if count:
            self._grant(lease, count)
        if lease.granted == len(lease.rows):
            self._end(lease, lease.reason if wanted.all() else EndReason.RELEASED)
            return
        row = int(ahead[count])
        if table.ssd_state[row] == SsdState.LIVE and table.dram_state[row] != DramState.DEAD:
            self._waiters.setdefault(row, []).append(lease)
        else:
            self._end(lease, self.blocks.ghosts.reason(table.key(row)))

    def _grant(self, lease: Lease, count: int) -> None:
        part = slice(lease.granted, lease.granted + count)
        indices: Rows = np.arange(part.start, part.stop)
        lease.granted += count
        lease.starved = False
        rows, sources, held = lease.rows[part], lease.sources[part], lease.held[part]
        if not held.all():
            indices, rows, sources = indices[held], rows[held], sources[held]
        if not len(indices):
            return
        lease.answered += len(indices)
        offsets = self.blocks.table.dram_offset[rows]
        runs = slot_runs(offsets, indices, sources, lease.namespace.slot_bytes)
        generations = self.blocks.directory.generations_at(offsets).tobytes()
        self._reply(lease, Granted(runs, generations))
        from_dram = sources.tobytes().count(Tier.DRAM)
        self.blocks.count("granted_dram_blocks", from_dram)
        self.blocks.count("granted_ssd_blocks", len(indices) - from_dram)

    def _end(self, lease: Lease, reason: EndReason) -> None:
        """The last answer; pins of what was not granted go."""
        session = self.waiting.pop(lease)
        session.waiting -= 1
        self._unread.pop(lease, None)
        lease.ended = True
        if lease.granted < len(lease.rows):
            self._leave_waiters(lease)
            self._let_go(session, lease, slice(lease.granted, None), keep=True)
            lease.rows = lease.rows[: lease.granted]
            lease.held = lease.held[: lease.granted]
        self._reply(lease, End(lease.answered, reason))
        self.blocks.count(f"acquire_end_{reason.name.lower()}")
        if not lease.held.any():
            self._forget(session, lease)

    def _forget(self, session: Session, lease: Lease) -> None:
        if session.leases.pop(lease.request_id, None) is not None:
            self.blocks.open_keys.remove(session, lease.size)

    def _leave_waiters(self, lease: Lease) -> None:
        """It does not wait for its next row any more, if it did."""
        row = int(lease.rows[lease.granted])
        waiters = self._waiters.get(row, [])
        if lease in waiters:
            waiters.remove(lease)
            if not waiters:
                del self._waiters[row]

    def _let_go(self, session: Session, lease: Lease, part: slice, *, keep: bool = False) -> None:
        blocks, table = self.blocks, self.blocks.table
        rows = lease.rows[part][lease.held[part]]
        lease.held[part] = False
        np.subtract.at(table.pins, rows, _ONE)
        if len(rows):
            blocks.room_version += 1
            unused = rows[table.pins[rows] == 0]
            state = table.dram_state[unused]
            gone = unused[(state == DramState.NONE) | (state == DramState.DEAD)]
            if len(gone):
                gone = distinct(gone)
                dead = table.dram_state[gone] == DramState.DEAD
                blocks.discard(gone[~dead])
                self.tiering.release_dead(gone[dead])
        if lease.ended and not keep and not lease.held.any():
            self._forget(session, lease)

    def _shares(self) -> list[tuple[Lease, int]]:
        """How many reads each of the oldest leases may have out while others want some too.

        Only leases that DRAM can hold all at once take part: two that each had a part of their
        blocks would wait for each other's slots.
        """
        shares: list[tuple[Lease, int]] = []
        left = self.blocks.config.reads_in_flight_max
        space = self.blocks.dram.capacity_bytes
        for lease in self.waiting:
            space -= len(lease.rows) * lease.namespace.slot_bytes
            if not left or space < 0:
                break
            shares.append((lease, max(1, 3 * left // 4)))
            left -= min(shares[-1][1], len(lease.rows) - lease.granted)
        return shares if len(shares) > 1 else []

    def _loading(self, lease: Lease) -> int:
        """Reads that are out for a lease."""
        part = slice(lease.granted, lease.looked)
        loading = self.blocks.table.dram_state[lease.rows[part]] == DramState.LOADING
        return int((loading & lease.held[part]).sum())

    def _read_ahead(self, lease: Lease, count: int) -> bool:
        """Starts up to ``count`` reads for a lease; False if DRAM has no slot for them."""
        places = self._unread_places(lease, min(count, self.transfers.read_room))
        if not len(places):
            return True
        rows = lease.rows[places]
        rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
        if self.transfers.start_reads(rows) == len(rows):
            lease.looked = int(places[-1]) + 1
            return True
        table, ahead = self.blocks.table, lease.rows[lease.granted :]
        ahead = ahead[lease.held[lease.granted :]]
        lease.starved = bool(table.dram_state[ahead[0]] == DramState.NONE)
        if not (lease.starved and self._fills_dram(lease)):
            return False
        behind = lease.held & (table.dram_state[lease.rows] == DramState.LIVE)
        behind[: lease.granted] = False
        if behind.any():
            self._cut(lease, int(np.flatnonzero(behind)[-1]))
            return True
        self._end(lease, EndReason.NO_SPACE)
        return False

    def _cut(self, lease: Lease, count: int) -> None:
        """Only the first blocks will be granted: those behind take the space for them."""
        self._let_go(self.waiting[lease], lease, slice(count, None), keep=True)
        lease.rows, lease.held = lease.rows[:count], lease.held[:count]
        lease.looked = min(lease.looked, count)
        lease.reason = EndReason.NO_SPACE

    def _unread_places(self, lease: Lease, count: int) -> npt.NDArray[np.int64]:
        """Where in a lease the next blocks are that are to be read.

        What is before ``lease.looked`` is not gone through again: a block under a lease never
        goes back to being on SSD only.
        """
        table = self.blocks.table
        lease.looked = max(lease.looked, lease.granted)
        found: list[npt.NDArray[np.int64]] = []
        missing, first = count, lease.looked
        while missing > 0 and first < len(lease.rows):
            part = slice(first, first + max(_LOOK_AHEAD_MIN, 2 * missing))
            rows = lease.rows[part]
            unread = lease.held[part] & (table.dram_state[rows] == DramState.NONE)
            unread &= table.ssd_state[rows] == SsdState.LIVE
            places = first + np.flatnonzero(unread)[:missing]
            first += len(rows)
            if len(places):
                found.append(places)
                missing -= len(places)
            elif not found:
                lease.looked = first
        if lease.looked == len(lease.rows):
            self._unread.pop(lease, None)
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def _fills_dram(self, lease: Lease) -> bool:
        """Whether nothing but this lease's own pins takes the space it waits for."""
        dram, table = self.blocks.dram, self.blocks.table
        if dram.pending_bytes or dram.quarantined_bytes:
            return False
        own = np.unique(lease.rows[lease.held & (table.dram_state[lease.rows] == DramState.LIVE)])
        return dram.live_bytes == len(own) * lease.namespace.slot_bytes

    def _read_prefetched(self) -> bool:
        table = self.blocks.table
        row = np.array([self._prefetch[0]])
        wanted = table.dram_state[row] == DramState.NONE
        wanted &= table.ssd_state[row] == SsdState.LIVE
        if wanted[0] and not self.transfers.start_reads(row):
            return False
        self._prefetch.popleft()
        return True

    def _reply(self, lease: Lease, body: Body) -> None:
        self.blocks.out.replies.append(Reply(lease.session_id, lease.request_id, body))

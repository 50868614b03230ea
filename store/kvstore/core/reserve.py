"""Reserves: slots for blocks to be stored, their commit, and the answers that wait for the disk."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import Blocks
from kvstore.core.distinct import distinct
from kvstore.core.effects import Body, Committed, Reply, Reserved
from kvstore.core.fills import Fills
from kvstore.core.leases import Reservation, Session
from kvstore.core.runs import slot_runs
from kvstore.core.table import NO_ROW, DramState, Rows, SsdState
from kvstore.core.tiering import Tiering
from kvstore.core.transfers import Transfers
from kvstore.core.types import AckLevel, Namespace, ReserveStatus, Tier
from kvstore.errors import (
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
)

_OPEN = 0  # status of a key that needs a slot
# Plain numbers for numpy: see DramState.
_SLOT, _HAVE = int(ReserveStatus.SLOT), int(ReserveStatus.HAVE)
_FULL, _BUSY = int(ReserveStatus.FULL), int(ReserveStatus.BUSY)


@dataclass(slots=True, eq=False)
class _Acknowledgement:
    """An answer to a Commit that waits until its blocks are on SSD."""

    session_id: int
    request_id: int
    levels: bytearray
    missing: int = 0


@dataclass(slots=True)
class Reserves:
    """All reservations that wait for space, first come first served, and open commits."""

    tiering: Tiering
    transfers: Transfers
    fills: Fills
    blocks: Blocks = field(init=False)
    waiting: dict[Reservation, Session] = field(default_factory=dict)
    _acks: dict[int, list[tuple[_Acknowledgement, int]]] = field(default_factory=dict)
    _starved_at: int = -1  # room_version at which no slot was found

    def __post_init__(self) -> None:
        self.blocks = self.tiering.blocks
        self.tiering.on_settled = self._settled

    @property
    def idle(self) -> bool:
        """Nobody waits for space or for the disk."""
        return not (self.waiting or self._acks)

    def reserve(self, session: Session, reservation: Reservation, now: float) -> None:
        """Answers at once if every key has its status, or the deadline is now."""
        if reservation.request_id in session.reservations:
            raise InvalidArgumentError(f"reserve {reservation.request_id} is still open")
        self.blocks.open_keys.add(session, len(reservation.keys))
        session.reservations[reservation.request_id] = reservation
        self.blocks.count("reserves")
        self.blocks.count("reserved_keys", len(reservation.keys))
        self.waiting[reservation] = session
        session.waiting += 1
        if len(self.waiting) == 1 or reservation.deadline <= now:
            self._advance(reservation, now)
        if reservation.next == len(reservation.keys) or reservation.deadline <= now:
            self._answer(reservation)

    def commit(
        self,
        session: Session,
        request_id: int,
        reservation: Reservation,
        indices: npt.NDArray[np.int64],
        checksums: npt.NDArray[np.uint64],
        level: AckLevel,
        now: float,
    ) -> None:
        """Blocks become visible; the answer waits for ``level`` where there is an SSD tier."""
        if not reservation.answered:
            raise PreconditionError("this reserve is not answered yet: there is nothing to commit")
        order = np.argsort(indices, kind="stable")
        mine = order[reservation.open[indices[order]]]
        rows = reservation.rows[indices[mine]]
        reservation.open[indices[mine]] = False
        good = self.fills.commit(reservation, rows, checksums[mine], now)
        levels = np.zeros(len(indices), dtype=np.uint8)
        levels[mine[good]] = AckLevel.MEMORY
        self._close_if_done(session, reservation)
        ack = _Acknowledgement(session.id, request_id, bytearray(levels.tobytes()))
        if level > AckLevel.MEMORY and self.blocks.ssd:
            for place, row in zip(mine[good].tolist(), rows[good].tolist(), strict=True):
                self._acks.setdefault(row, []).append((ack, place))
                ack.missing += 1
        stored = self.fills.completed
        waited_for = np.fromiter((row in self._acks for row in stored.tolist()), np.bool_)
        self.transfers.demotion.stored(stored, waited_for)
        if not ack.missing:
            self._reply(session.id, request_id, Committed(bytes(ack.levels)))

    def abort(
        self, session: Session, reservation: Reservation, indices: npt.NDArray[np.int64]
    ) -> int:
        """Gives slots back, all without ``indices``; a reserve that waits is answered first."""
        if not reservation.answered:
            self._cancel(reservation)
            return 0
        if not len(indices):
            indices = np.flatnonzero(reservation.open)
        indices = indices[reservation.open[indices]]
        self._give_back(reservation, indices)
        self._close_if_done(session, reservation)
        return len(indices)

    def find(self, session: Session, reserve_id: int) -> Reservation:
        """NotFoundError if there is no such reserve, or all its slots are settled."""
        reservation = session.reservations.get(reserve_id)
        if reservation is None:
            raise NotFoundError(f"reserve {reserve_id} has no slots (any more)")
        return reservation

    def quarantine(self, session: Session) -> None:
        """The client may be copying still: its slots stay in use, and can not be committed."""
        for reservation in list(session.reservations.values()):
            if not reservation.answered:
                self._cancel(reservation)
            else:
                self.fills.quarantine(reservation.rows[reservation.open], reservation)

    def let_all_go(self, session: Session) -> None:
        """The session ended: every slot of it that is not committed."""
        for reservation in list(session.reservations.values()):
            if not reservation.answered:
                self._cancel(reservation)
            else:
                self._give_back(reservation, np.flatnonzero(reservation.open))
                self._close_if_done(session, reservation)

    def pump(self, now: float) -> None:
        """Gives space that became free to those that wait, the first one first."""
        while self.waiting and self._starved_at != self.blocks.room_version:
            reservation = next(iter(self.waiting))
            self._advance(reservation, now)
            if reservation.next < len(reservation.keys) and not self._hopeless(reservation):
                self._starved_at = self.blocks.room_version
                return
            self._answer(reservation)

    def tick(self, now: float) -> None:
        """Answers those that waited long enough."""
        for reservation in [r for r in self.waiting if r.deadline <= now]:
            self._answer(reservation)
        self.fills.tick(now)

    def next_deadline(self) -> float | None:
        """Of all that wait."""
        times = [reservation.deadline for reservation in self.waiting]
        fill = self.fills.next_deadline()
        return min(times if fill is None else [*times, fill], default=None)

    def _advance(self, reservation: Reservation, now: float) -> None:
        """Gives keys their status from ``next`` on, until one finds no slot."""
        blocks, table = self.blocks, self.blocks.table
        keys = reservation.keys[reservation.next :]
        parent = self._parent_row(reservation)
        rows = table.lookup(keys)
        statuses = self._statuses(reservation, rows)
        used = np.append(rows, parent)
        used = used[used >= 0]
        # What is looked at must not vanish for the rest; what is on SSD may leave DRAM for it.
        used = used[table.ssd_state[used] != SsdState.LIVE]
        table.pins[used] += 1
        wanting = np.flatnonzero(statuses == _OPEN)
        new = int((rows[wanting] < 0).sum())
        self.tiering.make_rows(new)
        if new > table.room():
            wanting = wanting[: table.room()]
        slot_bytes = reservation.namespace.slot_bytes
        offsets = self.tiering.allocate_dram(slot_bytes, len(wanting)) if len(wanting) else wanting
        table.pins[used] -= 1
        full = np.flatnonzero(statuses == _OPEN)[len(offsets) :]
        done = int(full[0]) if len(full) else len(keys)
        wanting = wanting[: len(offsets)]
        if len(wanting):
            rows[wanting] = self._rows_for(reservation.namespace, keys, rows, wanting, parent)
            blocks.take_dram(rows[wanting], offsets, DramState.FILLING)
            self.fills.start(reservation, rows[wanting], now)
            statuses[wanting] = _SLOT
        if reservation.num_shards > 1:
            for i in np.flatnonzero(statuses[:done] == _BUSY).tolist():
                if self.fills.join(reservation, int(rows[i]), now):
                    statuses[i] = _SLOT
        part = slice(reservation.next, reservation.next + done)
        slots = statuses[:done] == _SLOT
        held = rows[:done][statuses[:done] == _HAVE]
        self.transfers.demotion.used(held)
        if reservation.level > AckLevel.MEMORY:
            self.transfers.demotion.insist(held)
        reservation.statuses[part] = statuses[:done]
        reservation.rows[part] = np.where(slots, rows[:done], NO_ROW)
        reservation.open[part] = slots
        reservation.next += done
        if len(used):
            blocks.discard(distinct(used))  # placeholders that nothing came to stand behind

    def _statuses(self, reservation: Reservation, rows: Rows) -> npt.NDArray[np.uint8]:
        blocks, table = self.blocks, self.blocks.table
        statuses = np.zeros(len(rows), dtype=np.uint8)
        known = rows >= 0
        if not known.any():
            return statuses
        dram, ssd = table.dram_state[rows], table.ssd_state[rows]
        have = (dram == DramState.LIVE) | (dram == DramState.LOADING) | (ssd == SsdState.LIVE)
        have &= known
        busy = known & ((dram == DramState.FILLING) | (dram == DramState.DEAD))
        foreign = known & (table.namespace[rows] != reservation.namespace.number)
        statuses[have] = _HAVE
        statuses[busy | foreign] = _BUSY
        blocks.dram_policy.touched(rows[have & (dram == DramState.LIVE)])
        blocks.ssd_policy.touched(rows[have & (ssd == SsdState.LIVE)])
        return statuses

    def _parent_row(self, reservation: Reservation) -> int:
        """The row before the next key; a placeholder if that block is not here; -1 at the root."""
        table, namespace = self.blocks.table, reservation.namespace
        first = reservation.next
        key = reservation.keys[first - 1] if first else reservation.parent
        if not key or key == namespace.root:
            return NO_ROW
        row = table.index.find(key)
        if row == NO_ROW and table.room():
            return int(table.add([key], namespace.number)[0])
        return row if row >= 0 and table.namespace[row] == namespace.number else NO_ROW

    def _rows_for(
        self, namespace: Namespace, keys: list[bytes], rows: Rows, wanting: Rows, parent: int
    ) -> Rows:
        """Rows of the wanting keys, made where there are none, behind their parents."""
        table = self.blocks.table
        fresh = wanting[rows[wanting] < 0]
        rows[fresh] = table.add([keys[i] for i in fresh.tolist()], namespace.number)
        parents = np.concatenate(([parent], rows[:-1]))
        foreign = table.namespace[parents] != namespace.number
        parents[(parents >= 0) & foreign] = NO_ROW
        table.link(rows[fresh], parents[fresh])
        for i in wanting[table.parent[rows[wanting]] < 0].tolist():
            row, before = int(rows[i]), int(parents[i])
            # A placeholder learns its place now; a client's lie must not close a ring.
            if before >= 0 and not table.is_behind(before, row):
                table.link(np.array([row]), np.array([before]))
        return rows[wanting]

    def _answer(self, reservation: Reservation) -> None:
        session = self.waiting.pop(reservation)
        session.waiting -= 1
        reservation.answered = True
        reservation.keys = []
        indices = np.flatnonzero(reservation.open)
        offsets = self.blocks.table.dram_offset[reservation.rows[indices]]
        sources = np.full(len(indices), int(Tier.DRAM), dtype=np.uint8)
        runs = slot_runs(offsets, indices, sources, reservation.namespace.slot_bytes)
        generations = self.blocks.directory.generations_at(offsets).tobytes()
        body = Reserved(reservation.statuses.tobytes(), runs, generations)
        self._reply(session.id, reservation.request_id, body)
        full = int((reservation.statuses == _FULL).sum())
        self.blocks.count("refused_full_blocks", full)
        self._close_if_done(session, reservation)

    def _cancel(self, reservation: Reservation) -> None:
        """A reserve that waits gets nothing; the client never heard of its slots."""
        self._give_back(reservation, np.flatnonzero(reservation.open))
        reservation.statuses[:] = _FULL
        self._answer(reservation)

    def _give_back(self, reservation: Reservation, indices: npt.NDArray[np.int64]) -> None:
        reservation.open[indices] = False
        if len(indices):
            self.fills.give_back(reservation.rows[indices], reservation)

    def _close_if_done(self, session: Session, reservation: Reservation) -> None:
        if reservation.request_id in session.reservations and not reservation.open.any():
            del session.reservations[reservation.request_id]
            self.blocks.open_keys.remove(session, len(reservation.statuses))

    def _hopeless(self, reservation: Reservation) -> bool:
        """Whether only its own slots take the space that it waits for."""
        dram = self.blocks.dram
        own = int(reservation.open.sum()) * reservation.namespace.slot_bytes
        return dram.pending_bytes == own and not (dram.live_bytes or dram.quarantined_bytes)

    def _settled(self, rows: Rows, level: AckLevel) -> None:
        if not self._acks:
            return
        for row in rows.tolist():
            for ack, place in self._acks.pop(row, ()):
                ack.levels[place] = level
                ack.missing -= 1
                if not ack.missing:
                    self._reply(ack.session_id, ack.request_id, Committed(bytes(ack.levels)))

    def _reply(self, session_id: int, request_id: int, body: Body) -> None:
        self.blocks.out.replies.append(Reply(session_id, request_id, body))

"""Sessions: the clients of a node, and what ends with them."""

import numpy as np

from kvstore.core.acquire import Acquires
from kvstore.core.leases import Session
from kvstore.core.reserve import Reserves
from kvstore.core.table import Table
from kvstore.core.types import Namespace
from kvstore.errors import PreconditionError, ResourceExhaustedError


class Sessions:
    """Those that are open, and those in quarantine whose process may live."""

    def __init__(self, sessions_max: int, acquires: Acquires, reserves: Reserves) -> None:
        self._sessions_max = sessions_max
        self._acquires = acquires
        self._reserves = reserves
        self._by_id: dict[int, Session] = {}

    def open(self, session_id: int) -> None:
        """PreconditionError if it is open already, ResourceExhaustedError at the limit."""
        if session_id in self._by_id:
            raise PreconditionError(f"session {session_id} is open already")
        if len(self._by_id) >= self._sessions_max:
            raise ResourceExhaustedError(f"{len(self._by_id)} sessions are open; try later")
        self._by_id[session_id] = Session(session_id)

    def find(self, session_id: int) -> Session | None:
        """Open, or in quarantine."""
        return self._by_id.get(session_id)

    def asking(self, session_id: int) -> Session:
        """The session of a request; PreconditionError unless it is open."""
        session = self._by_id.get(session_id)
        if session is None or session.quarantined:
            raise PreconditionError(f"session {session_id} is not open; connect again")
        return session

    def settle(self, session_id: int) -> None:
        """Nothing of it is in use any more: all that it held is back at once."""
        session = self._by_id.pop(session_id, None)
        if session is not None:
            self._reserves.let_all_go(session)
            self._acquires.let_all_go(session)

    def quarantine(self, session_id: int) -> None:
        """Its stream is lost: what it holds stays held until it is settled."""
        session = self._by_id.get(session_id)
        if session is not None and not session.quarantined:
            session.quarantined = True
            self._reserves.quarantine(session)
            self._acquires.stop_waiting(session)

    def holds(self, session_id: int) -> bool:
        """Whether it has slots or pins."""
        session = self._by_id.get(session_id)
        return session is not None and bool(session.leases or session.reservations)

    def namespaces(self) -> set[Namespace]:
        """Those that a session opened or asked for, and so may ask for again or hold blocks of."""
        return set().union(*(session.namespaces for session in self._by_id.values()))

    def count_open(self) -> int:
        """Without those in quarantine."""
        return sum(not session.quarantined for session in self._by_id.values())

    def check(self, table: Table) -> None:
        """AssertionError unless pins are those of the leases."""
        pins = np.zeros_like(table.pins)
        for session in self._by_id.values():
            reserved = sum(len(r.statuses) for r in session.reservations.values())
            leased = sum(lease.size for lease in session.leases.values())
            assert session.open_keys == reserved + leased, "open keys are miscounted"
            ended = [r.answered for r in session.reservations.values()]
            ended += [lease.ended for lease in session.leases.values()]
            assert session.waiting == ended.count(False), "what waits is miscounted"
            for lease in session.leases.values():
                np.add.at(pins, lease.rows[lease.held], 1)
                assert lease.held.any() or not lease.ended, "a lease that holds nothing"
        assert np.array_equal(pins, table.pins), "pins are not those of the leases"

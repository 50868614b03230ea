"""Sessions of client processes: when what they hold may be in use no more."""

from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

from kvstore.core.effects import Effects
from kvstore.errors import ResourceExhaustedError

LOST_PER_PROCESS = 16  # sessions that may be open, for each lost one that a process may leave


class Sight(Enum):
    """What the node can see of a client's process."""

    ALIVE = "alive"
    GONE = "gone"
    UNSEEN = "unseen"  # another PID namespace, or /proc is closed to us


@dataclass(eq=False)
class ClientSession:
    """One session of one client process."""

    id: int
    client_id: str
    process: str = ""  # whose it is, for the limit on lost sessions
    lost: bool = False  # the stream has ended without a Goodbye
    settles_at: float | None = None  # when the quarantine ends, where the process is unseen


SessionT = TypeVar("SessionT", bound=ClientSession)


class SessionCore(Protocol):
    """What sessions need of a NodeCore."""

    def open_session(self, session_id: int) -> None:
        """A client came."""

    def session_settled(self, session_id: int, now: float) -> Effects:
        """Nothing of the session is in use."""

    def session_quarantined(self, session_id: int, now: float) -> Effects:
        """The stream is lost, the process may live."""

    def session_holds(self, session_id: int) -> bool:
        """Whether it has slots or pins."""


class ClientSessions(Generic[SessionT]):
    """All sessions from their Hello until nothing that they held can be in use any more.

    After its stream, a session holds its space until the process is gone as well; where the
    process cannot be seen, for ``quarantine_s``. A client that says it is settled ends that wait.
    Lost sessions are limited for each process, so that one that never settles takes the node's
    sessions from nobody else. ``now`` is monotonic seconds. What to do with a session is returned
    as the core's effects.
    """

    def __init__(self, core: SessionCore, *, quarantine_s: float, sessions_max: int) -> None:
        self._core = core
        self._quarantine_s = quarantine_s
        self._sessions_max = sessions_max
        self._lost_max = max(1, sessions_max // LOST_PER_PROCESS)
        self._sessions: dict[int, SessionT] = {}

    @property
    def open_count(self) -> int:
        """Sessions whose stream is open."""
        return sum(not session.lost for session in self._sessions.values())

    def all(self) -> list[SessionT]:
        """Those that may hold something."""
        return list(self._sessions.values())

    def of_client(self, client_id: str) -> list[SessionT]:
        """Those of one client: what its word that it is settled speaks of."""
        return [s for s in self._sessions.values() if s.client_id == client_id]

    def open(self, session: SessionT, *, returns: bool = False) -> None:
        """Lets a client in; ``returns``: it has just settled a lost session of its own.

        ResourceExhaustedError at the limit of sessions, or of lost ones of its process.
        """
        if self.open_count >= self._sessions_max:
            raise ResourceExhaustedError(
                f"{self._sessions_max} sessions are open; close some, or raise sessions_max"
            )
        lost = sum(s.lost and s.process == session.process for s in self._sessions.values())
        if lost >= self._lost_max and not returns:
            raise ResourceExhaustedError(
                f"{lost} lost sessions of this process still hold blocks; settle them (reconnect "
                "as the client that lost them), or end the process"
            )
        self._core.open_session(session.id)
        self._sessions[session.id] = session

    def stream_ended(self, session: SessionT, sight: Sight, now: float) -> Effects:
        """The stream is over and no Goodbye was said: it waits for the process to end."""
        if session.id not in self._sessions:
            return Effects()
        session.lost = True
        if sight is Sight.GONE:
            return self.settle(session, now)
        if sight is Sight.UNSEEN:
            session.settles_at = now + self._quarantine_s
        effects = self._core.session_quarantined(session.id, now)
        if not self._core.session_holds(session.id):
            effects.extend(self.settle(session, now))
        return effects

    def process_ended(self, session: SessionT, now: float) -> Effects:
        """Its stream may live on in a child that shares the mapping, and then its end counts."""
        return self.settle(session, now) if session.lost else Effects()

    def settle(self, session: SessionT, now: float) -> Effects:
        """Nothing that the session held is in use: all of it is free at once."""
        if self._sessions.pop(session.id, None) is None:
            return Effects()
        return self._core.session_settled(session.id, now)

    def holds(self, session: SessionT) -> bool:
        """Whether the session may still hold something."""
        return session.id in self._sessions

"""What a session holds: leases on readable blocks, and slots reserved to be filled."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.core.table import NO_ROW, Mask, Rows
from kvstore.core.types import AckLevel, EndReason, Namespace, ReserveStatus
from kvstore.errors import ResourceExhaustedError


@dataclass(slots=True, eq=False)
class Lease:
    """The pins of one Acquire.

    ``rows`` are the leading blocks that were held when it was asked for, each pinned once until
    it is released; those before ``granted`` are in DRAM and known to the client, except what it
    released before they came: that is passed over.
    """

    session_id: int
    request_id: int
    namespace: Namespace
    rows: Rows
    sources: npt.NDArray[np.uint8]  # the Tier of each row at the time of the request
    reason: EndReason  # what ends the chain behind ``rows``
    deadline: float
    held: Mask = field(init=False)
    size: int = field(init=False)  # keys it counts for, to its end
    granted: int = 0
    looked: int = 0  # rows before it are not to be read from SSD (any more)
    answered: int = 0  # blocks in all Granted together
    ended: bool = False
    starved: bool = False  # its next block waits for a DRAM slot

    def __post_init__(self) -> None:
        self.size = len(self.rows)
        self.held = np.ones(self.size, dtype=np.bool_)


@dataclass(slots=True, eq=False)
class Reservation:
    """The slots of one Reserve: ``rows[i]`` for key i, filled by the client while ``open[i]``."""

    session_id: int
    request_id: int
    namespace: Namespace
    keys: list[bytes]  # dropped once answered
    parent: bytes
    shard_index: int
    num_shards: int
    deadline: float
    level: AckLevel  # what its commit will ask for
    statuses: npt.NDArray[np.uint8] = field(init=False)
    rows: Rows = field(init=False)
    open: Mask = field(init=False)
    next: int = 0  # keys before it have their status
    answered: bool = False

    def __post_init__(self) -> None:
        count = len(self.keys)
        self.statuses = np.full(count, ReserveStatus.FULL, dtype=np.uint8)
        self.rows = np.full(count, NO_ROW, dtype=np.int64)
        self.open = np.zeros(count, dtype=np.bool_)


@dataclass(slots=True)
class OpenKeys:
    """Keys in open leases and reservations: each takes memory until its lease or its reservation
    ends, however few of them are still in use.
    """

    per_session_max: int
    total_max: int
    total: int = 0

    def add(self, session: "Session", count: int) -> None:
        """ResourceExhaustedError if these are too many."""
        if session.open_keys + count > self.per_session_max:
            raise ResourceExhaustedError(
                f"this session's open acquires and reserves have {session.open_keys} keys, "
                f"{count} more are too many; release some"
            )
        if self.total + count > self.total_max:
            raise ResourceExhaustedError(
                f"the open acquires and reserves of all sessions have {self.total} keys, {count} "
                "more are too many; try later"
            )
        session.open_keys += count
        self.total += count

    def remove(self, session: "Session", count: int) -> None:
        """The lease or reservation of so many keys has ended."""
        session.open_keys -= count
        self.total -= count


@dataclass(slots=True, eq=False)
class ShardedFill:
    """A block that several clients fill, each one shard; it is complete when all committed."""

    num_shards: int
    deadline: float  # when it is given up if nobody fills it any more
    open: set[int] = field(default_factory=set)  # shards being filled
    checksums: dict[int, int] = field(default_factory=dict)  # of shards that are committed
    failed: bool = False

    @property
    def complete(self) -> bool:
        """All shards are there."""
        return len(self.checksums) == self.num_shards and not self.failed


@dataclass(slots=True, eq=False)
class Session:
    """Everything that one client holds. Quarantined: its stream is lost, it may still copy."""

    id: int
    namespaces: set[Namespace] = field(default_factory=set)  # that it opened or asked for
    leases: dict[int, Lease] = field(default_factory=dict)
    reservations: dict[int, Reservation] = field(default_factory=dict)
    open_keys: int = 0  # of leases and reservations; whatever is settled of one, to its end
    waiting: int = 0  # acquires and reserves that wait
    quarantined: bool = False

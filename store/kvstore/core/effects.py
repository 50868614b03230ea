"""What a call of the core asks the daemon to do: answers, disk requests, events."""

from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.core.ssd_record import SsdRecord
from kvstore.core.types import EndReason, SlotRun, Tier
from kvstore.errors import KVStoreError


class Granted(NamedTuple):
    """Pinned blocks of an Acquire; ``generations`` is one u32 little-endian a block."""

    runs: list[SlotRun]
    generations: bytes


class End(NamedTuple):
    """The last answer to an Acquire."""

    granted: int
    reason: EndReason


class Reserved(NamedTuple):
    """One ReserveStatus a byte; slots and generations (u32 little-endian) of those with SLOT."""

    statuses: bytes
    runs: list[SlotRun]
    generations: bytes


class Committed(NamedTuple):
    """One AckLevel a byte, in the order of the indices asked for; 0: failed."""

    levels: bytes


@dataclass(frozen=True, slots=True)
class Aborted:
    """Slots given back."""

    count: int


class Prefetched(NamedTuple):
    """Blocks whose load was started or queued."""

    started: int


class Matched(NamedTuple):
    """One Tier a byte for each leading key that is held."""

    tiers: bytes


class Failed(NamedTuple):
    """The request changed nothing."""

    error: KVStoreError


Body = Granted | End | Reserved | Committed | Aborted | Prefetched | Matched | Failed


class Reply(NamedTuple):
    """An answer to one request of one session."""

    session_id: int
    request_id: int
    body: Body


class ReadSsd(NamedTuple):
    """Read ``nbytes`` from SSD into the pool, verify, then call ``read_done`` with this object.

    Shard i of ``len(checksums)`` is bytes ``i*nbytes//n`` to ``(i+1)*nbytes//n`` of the block.
    """

    row: int
    key: bytes
    ssd_offset: int
    dram_offset: int
    nbytes: int
    checksums: tuple[int, ...]


class WriteSsd(NamedTuple):
    """Write a block to SSD and make its record durable, then call ``write_done``.

    Order: data, fdatasync, index commit. Reported as failed only if the index has no record of it.
    """

    row: int
    dram_offset: int
    nbytes: int
    record: SsdRecord

    @property
    def key(self) -> bytes:
        """The block's key."""
        return self.record.key

    @property
    def ssd_offset(self) -> int:
        """Where in the SSD tier it goes, in bytes."""
        return self.record.ssd_offset


class DropSsd(NamedTuple):
    """Remove a key from the SSD index, durably, then call ``drops_done``: only then is it free.

    ``row`` is -1 for a record that ``restore`` refused: it has no slot and needs no answer.
    """

    row: int
    key: bytes
    ssd_offset: int


class BlockEvent(NamedTuple):
    """Blocks of one namespace that came into or left one tier; ``keys`` is n x 32 bytes."""

    root: bytes
    tier: Tier
    keys: bytes
    stored: bool


@dataclass(slots=True)
class Effects:
    """Everything that one call wants done. Replies of one request are in their order."""

    replies: list[Reply] = field(default_factory=list)
    reads: list[ReadSsd] = field(default_factory=list)
    writes: list[WriteSsd] = field(default_factory=list)
    drops: list[DropSsd] = field(default_factory=list)
    events: list[BlockEvent] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replies or self.reads or self.writes or self.drops or self.events)

    def extend(self, other: "Effects") -> None:
        """Appends all of another's, for a daemon that applies several calls at once."""
        self.replies += other.replies
        self.reads += other.reads
        self.writes += other.writes
        self.drops += other.drops
        self.events += other.events

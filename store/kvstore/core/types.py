"""Words of the pure core: tiers, reasons, levels, runs of slots, and its configuration.

The numbers of the enums are those of the protocol.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kvstore.core.spec import SLOT_ALIGN_BYTES, CacheSpec


class Tier(IntEnum):
    """Where the bytes of a block are."""

    UNSPECIFIED = 0
    HBM = 1
    DRAM = 2
    SSD = 3
    REMOTE = 4


class EndReason(IntEnum):
    """Why the cached prefix of a prompt ended where it did."""

    UNSPECIFIED = 0
    COMPLETE = 1
    NEVER_STORED = 2
    EVICTED = 3
    NODE_LOST = 4
    CORRUPT = 5
    TIMED_OUT = 6
    NO_SPACE = 7
    RELEASED = 8
    PURGED = 9
    NOT_ADMITTED = 10


class AckLevel(IntEnum):
    """What an acknowledged write survives; 0 in an answer means that it failed."""

    UNSPECIFIED = 0
    MEMORY = 1
    PERSISTED = 2
    SYNCED = 3


class ReserveStatus(IntEnum):
    """What became of one key of a Reserve."""

    UNSPECIFIED = 0
    SLOT = 1
    HAVE = 2
    FULL = 3
    BUSY = 4


class IoOutcome(IntEnum):
    """How a read from SSD ended."""

    OK = 0
    CORRUPT = 1  # the bytes or the key are not what was committed
    FAILED = 2  # the device or the file system refused


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Slots of consecutive keys: slot i lies at ``offset + i * stride`` bytes of the pool."""

    first: int
    count: int
    offset: int
    stride: int
    source: Tier


class TierUsage(NamedTuple):
    """Space of a tier in bytes; free + live + pending + quarantined == capacity, always."""

    tier: Tier
    capacity_bytes: int
    free_bytes: int
    live_bytes: int
    pending_bytes: int
    quarantined_bytes: int
    blocks: int


class Removal(NamedTuple):
    """What an administrator's evict or purge did.

    ``pinned`` blocks are held by a client; ``waiting`` ones leave when their SSD write has ended.
    """

    blocks: int
    bytes: int
    pinned: int
    waiting: int = 0


@dataclass(slots=True, eq=False)
class Namespace:
    """One spec of one tenant. ``spec`` is None for blocks found on SSD whose spec nobody gave."""

    id: int  # what clients ask for; of this one only
    number: int  # in the columns of the table; that of another one when this one is gone
    root: bytes
    block_bytes: int
    spec: CacheSpec | None = None
    tenant: str = ""

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the block rounded up to the alignment."""
        return -(-self.block_bytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig:
    """Sizes and limits of one node; every list and queue in the core has its bound here."""

    dram_bytes: int
    ssd_bytes: int = 0  # 0: no SSD tier
    segment_bytes: int = 4 << 20  # space changes its size class in these units
    dram_policy: str = "lru"
    ssd_policy: str = "lru"
    ssd_admission: str = "always"  # which blocks are worth a write to SSD
    ghost_entries: int = 1 << 18  # removed keys whose reason is remembered
    reads_in_flight_max: int = 16  # SSD reads
    writes_in_flight_bytes_max: int = 512 << 20  # SSD writes; one is always let through
    writes_in_flight_max: int = 512
    write_attempts_max: int = 3  # then a block stays without a copy on SSD
    prefetch_max: int = 1 << 16  # blocks waiting to be read ahead
    blocks_max: int = 1 << 22  # rows of the table
    namespaces_max: int = 1024
    sessions_max: int = 4096
    keys_per_request_max: int = 1 << 16
    holds_per_session_max: int = 4096  # open acquires and reserves
    open_keys_per_session_max: int = 1 << 19  # of its open acquires and reserves
    open_keys_max: int = 1 << 22  # all sessions together
    waiting_max: int = 4096  # acquires, and reserves, that wait, all sessions together
    waiting_per_session_max: int = 1024
    wait_s_max: float = 600.0  # who would wait longer for blocks or space waits as long
    shards_max: int = 256
    shard_timeout_s: float = 30.0  # a block with shards that nobody fills any more is given up

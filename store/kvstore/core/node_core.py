"""NodeCore: everything that a storage node decides, without I/O, clock or threads."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvstore.core.directory import DirectoryWriter
from kvstore.core.effects import DropSsd, Effects, ReadSsd, WriteSsd
from kvstore.core.spec import CacheSpec
from kvstore.core.ssd_record import SsdRecord
from kvstore.core.types import (
    AckLevel,
    CoreConfig,
    IoOutcome,
    Namespace,
    Removal,
    Tier,
    TierUsage,
)


class NodeCore:
    """The state of one node. A call changes it and returns the effects to carry out.

    ``now`` is monotonic seconds and never goes back. A bad request (unknown namespace, too many
    keys) changes nothing and is answered with a Failed reply; only ``open_namespace`` and
    ``open_session`` raise. Calls come from one thread.
    """

    def __init__(self, config: CoreConfig, directory: DirectoryWriter, now: float) -> None:
        self.config = config
        self.directory = directory
        self.now = now
        self.counters: dict[str, int] = {}

    # Namespaces and sessions

    def open_namespace(self, spec: CacheSpec, tenant: str = "default") -> Namespace:
        """The namespace of a spec; the same one for the same spec and tenant.

        InvalidArgumentError if a tier cannot hold one of its blocks; ResourceExhaustedError at
        the limit of namespaces.
        """
        raise NotImplementedError

    def namespaces(self) -> list[Namespace]:
        """All that were opened or restored."""
        raise NotImplementedError

    def restore(self, records: Iterable[SsdRecord], now: float) -> Effects:
        """Takes over the blocks of the SSD index, at start only.

        Records that cannot be used come back as drops with row -1.
        """
        raise NotImplementedError

    def open_session(self, session_id: int) -> None:
        """A client came. ResourceExhaustedError at the limit of sessions."""
        raise NotImplementedError

    def session_settled(self, session_id: int, now: float) -> Effects:
        """Nothing of this session is in use any more: all that it held is back at once."""
        raise NotImplementedError

    def session_quarantined(self, session_id: int, now: float) -> Effects:
        """The stream is lost, the process may live: what it holds stays held until settled."""
        raise NotImplementedError

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
        """Pins the leading blocks held; Granted as they are in DRAM, in chain order, then End."""
        raise NotImplementedError

    def release(
        self, session_id: int, acquire_id: int, first: int, count: int, now: float
    ) -> Effects:
        """Unpins blocks first .. first + count - 1 of an Acquire (count 0: all from first on).

        Releasing what was not granted yet cancels the rest: End with RELEASED follows.
        """
        raise NotImplementedError

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
    ) -> Effects:
        """A slot for each key that nobody has; one Reserved, at the latest after the timeout."""
        raise NotImplementedError

    def commit(
        self,
        session_id: int,
        request_id: int,
        reserve_id: int,
        indices: Sequence[int] | npt.NDArray[np.integer],
        checksums: bytes,
        level: AckLevel,
        now: float,
    ) -> Effects:
        """Makes filled slots readable; Committed follows when ``level`` is reached."""
        raise NotImplementedError

    def abort(
        self,
        session_id: int,
        request_id: int,
        reserve_id: int,
        indices: Sequence[int] | npt.NDArray[np.integer],
        now: float,
    ) -> Effects:
        """Gives reserved slots back unfilled (no indices: all not committed); Aborted follows."""
        raise NotImplementedError

    def prefetch(
        self, session_id: int, request_id: int, ns_id: int, keys: bytes, parent: bytes, now: float
    ) -> Effects:
        """Starts loads of the leading blocks that are only on SSD; Prefetched follows."""
        raise NotImplementedError

    def match(self, session_id: int, request_id: int, ns_id: int, keys: bytes) -> Effects:
        """Tiers of the leading blocks held; Matched follows."""
        raise NotImplementedError

    # Ends of disk requests

    def read_done(self, op: ReadSsd, outcome: IoOutcome, now: float) -> Effects:
        """A read ended; unless OK, the copy on SSD is dropped."""
        raise NotImplementedError

    def write_done(
        self, op: WriteSsd, ok: bool, now: float, level: AckLevel = AckLevel.SYNCED
    ) -> Effects:
        """A write ended; ``level`` is what the daemon's medium gives."""
        raise NotImplementedError

    def writes_done(
        self, ops: Sequence[WriteSsd], ok: bool, now: float, level: AckLevel = AckLevel.SYNCED
    ) -> Effects:
        """A group of writes ended together."""
        raise NotImplementedError

    def drop_done(self, op: DropSsd, now: float) -> Effects:
        """The removal is durable: the SSD slot is free."""
        raise NotImplementedError

    # Administration and time

    def evict(
        self, tier: Tier, keys: bytes, max_bytes: int, drop: bool, now: float
    ) -> tuple[Effects, Removal]:
        """Removes these blocks (no keys: any, oldest first, up to max_bytes, 0: all) of a tier.

        Leaves first; without ``drop`` a last copy stays until it is on SSD.
        """
        raise NotImplementedError

    def purge(self, root: bytes | None, now: float) -> tuple[Effects, Removal]:
        """Forgets the blocks of one namespace (None: of all); held slots follow when let go."""
        raise NotImplementedError

    def tick(self, now: float) -> Effects:
        """Ends what waited too long."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When ``tick`` has something to do, if nothing else happens before."""
        raise NotImplementedError

    # Observation

    def usage(self) -> list[TierUsage]:
        """Space of DRAM and, if there is one, of the SSD tier."""
        raise NotImplementedError

    def pinned_blocks(self) -> int:
        """Blocks under at least one lease."""
        raise NotImplementedError

    def inventory(self, chunk_keys: int = 8192) -> Iterator[tuple[bytes, Tier, bytes]]:
        """(root, tier, keys) of all readable blocks; a block in both tiers comes twice."""
        raise NotImplementedError

    def idle(self) -> bool:
        """Nothing waits and no disk request is out."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """AssertionError if space, pins, links or lists do not add up; slow."""
        raise NotImplementedError

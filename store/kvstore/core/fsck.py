"""What is wrong with an SSD tier, judged from the records of its index and reads of its blocks.

No I/O: the caller brings the entries of the index and how the reads of the blocks ended. Of records
that name the same bytes the one stays whose checksum these have; its sequence counts only among
several of which that is true.
"""

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from kvstore.core.spec import SLOT_ALIGN_BYTES
from kvstore.core.ssd_columns import decode_many
from kvstore.core.ssd_record import NO_PARENT, SsdRecord
from kvstore.core.types import IoOutcome


class Fault(StrEnum):
    """Why a record of the index is not to be kept."""

    MALFORMED = "malformed"  # not a record of this format
    FOREIGN = "foreign"  # of a namespace, or a block format, that this build cannot read
    OUTSIDE = "outside"  # names bytes that the data file does not have
    OVERLAP = "overlap"  # names bytes that another record proves to be its own
    CORRUPT = "corrupt"  # the bytes are not those that were committed
    UNREADABLE = "unreadable"  # the device refused the bytes
    ORPHAN = "orphan"  # the chain from its namespace's root to it is broken


class Finding(NamedTuple):
    """One record that is not to be kept; offset and size are 0 where nothing names them."""

    fault: Fault
    key: bytes
    ssd_offset: int
    nbytes: int
    detail: str


class Examination:
    """A check in three steps: the records at once, ``read`` for each block, then ``finish``.

    A key may have several records, as the pages of a damaged index do; at most one of them stays.
    ``sound`` holds, in the order of the file, the records whose blocks are worth reading, and
    ``kept``, after ``finish``, those that stay, by key.
    """

    def __init__(
        self,
        keys: Sequence[bytes],
        values: Sequence[bytes],
        block_bytes: Mapping[bytes, int | None],
        file_bytes: int,
    ) -> None:
        """``block_bytes`` is the size of a block in each namespace, by root; None: unreadable.

        A namespace may not be listed: what it is was not noted, but who knows it can use it.
        """
        self._findings: list[Finding] = []
        self._bad: list[tuple[SsdRecord, Fault, str]] = []
        self._verified: list[SsdRecord] = []
        self.kept: dict[bytes, SsdRecord] = {}
        records, usable = decode_many(keys, values)
        for key, value, good in zip(keys, values, usable.tolist(), strict=True):
            if not good:
                detail = f"{len(value)} bytes that are no record"
                self._findings.append(Finding(Fault.MALFORMED, key, 0, 0, detail))
        self.sequences = np.array([record.sequence for record in records], dtype=np.int64)
        self.sound = [r for r in records if self._has_place(r, block_bytes, file_bytes)]
        self.sound.sort(key=lambda record: record.ssd_offset)

    def _has_place(
        self, record: SsdRecord, block_bytes: Mapping[bytes, int | None], file_bytes: int
    ) -> bool:
        size = block_bytes.get(record.root, record.nbytes)
        if size is None:
            self._found(Fault.FOREIGN, record, "its namespace is of another format version")
        elif size != record.nbytes:
            self._found(Fault.FOREIGN, record, f"blocks of its namespace have {size} bytes")
        elif record.ssd_offset % SLOT_ALIGN_BYTES or not 0 < record.nbytes <= _room(
            record, file_bytes
        ):
            self._found(Fault.OUTSIDE, record, f"no place in a file of {file_bytes} bytes")
        else:
            return True
        return False

    def read(self, record: SsdRecord, outcome: IoOutcome) -> None:
        """How the read of a sound record's block ended."""
        if outcome is IoOutcome.OK:
            self._verified.append(record)
        elif outcome is IoOutcome.CORRUPT:
            self._found(Fault.CORRUPT, record, "its bytes do not have its checksum")
        else:
            self._found(Fault.UNREADABLE, record, "the device refused to read it")

    def finish(self) -> list[Finding]:
        """One finding for each key of which no record stays.

        Blocks behind one that is missing or bad are orphans.
        """
        settled = _settled(self._verified)
        rooted = _rooted(settled)
        self.kept = {key: settled[key] for key in rooted}
        orphans = [record for key, record in settled.items() if key not in rooted]
        places = _Places(sorted(settled.values(), key=lambda record: record.ssd_offset))
        for record in self._verified:
            if record.key not in settled:
                self._found(Fault.OVERLAP, record, "a newer record has the same bytes")
        newest: dict[bytes, tuple[SsdRecord, Fault, str]] = {}
        for record, fault, detail in self._bad:
            if fault is Fault.CORRUPT and not places.free(record):
                fault, detail = Fault.OVERLAP, "its place has the bytes of another record"
            other = newest.get(record.key)
            if record.key not in settled and (not other or other[0].sequence < record.sequence):
                newest[record.key] = record, fault, detail
        detail = "a block before it in its chain is missing"
        for bad in (*newest.values(), *((record, Fault.ORPHAN, detail) for record in orphans)):
            record, fault, why = bad
            place = (record.ssd_offset, record.nbytes)
            self._findings.append(Finding(fault, record.key, *place, why))
        return self._findings

    def _found(self, fault: Fault, record: SsdRecord, detail: str) -> None:
        self._bad.append((record, fault, detail))


class _Places:
    """The slots of records that share no byte; made of some in the order of their offsets."""

    def __init__(self, records: Sequence[SsdRecord] = ()) -> None:
        self._starts = [record.ssd_offset for record in records]
        self._ends = [_end(record) for record in records]

    def free(self, record: SsdRecord) -> bool:
        """Whether none of them has a byte of this record's slot."""
        at = bisect.bisect_left(self._starts, _end(record))
        return not at or self._ends[at - 1] <= record.ssd_offset

    def take(self, record: SsdRecord) -> None:
        """Adds one whose place is free."""
        at = bisect.bisect_left(self._starts, record.ssd_offset)
        self._starts.insert(at, record.ssd_offset)
        self._ends.insert(at, _end(record))


def _room(record: SsdRecord, file_bytes: int) -> int:
    """Bytes that a block may have at the record's place."""
    return (file_bytes - record.ssd_offset) // SLOT_ALIGN_BYTES * SLOT_ALIGN_BYTES


def _end(record: SsdRecord) -> int:
    """First byte behind the record's slot."""
    return record.ssd_offset - (-record.nbytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES


def _settled(verified: Iterable[SsdRecord]) -> dict[bytes, SsdRecord]:
    """By key: the newest first, each stays if its key has none yet and its place is free."""
    claims = [
        (record, places)
        for cluster in _clusters(sorted(verified, key=lambda record: record.ssd_offset))
        for places in (_Places() if len(cluster) > 1 else None,)
        for record in cluster
    ]
    claims.sort(key=lambda claim: claim[0].sequence, reverse=True)
    settled: dict[bytes, SsdRecord] = {}
    for record, places in claims:
        if record.key in settled or (places and not places.free(record)):
            continue
        settled[record.key] = record
        if places:
            places.take(record)
    return settled


def _clusters(placed: Iterable[SsdRecord]) -> Iterator[list[SsdRecord]]:
    """Records in the order of their offsets, those together that have bytes in common."""
    cluster: list[SsdRecord] = []
    end = 0
    for record in placed:
        if cluster and record.ssd_offset >= end:
            yield cluster
            cluster = []
        cluster.append(record)
        end = max(end, _end(record))
    if cluster:
        yield cluster


def _rooted(records: Mapping[bytes, SsdRecord]) -> set[bytes]:
    """Keys that a chain of these records joins to the root of their namespace."""
    children: dict[bytes, list[bytes]] = {}
    found: list[bytes] = []
    for key, record in records.items():
        if record.parent in (NO_PARENT, record.root):
            found.append(key)
        elif (parent := records.get(record.parent)) and parent.root == record.root:
            children.setdefault(record.parent, []).append(key)
    for key in found:  # grows while it is walked
        found += children.get(key, ())
    return set(found)


def count_faults(findings: Iterable[Finding]) -> dict[Fault, int]:
    """How often each fault was found; only those that were."""
    counts: dict[Fault, int] = {}
    for finding in findings:
        counts[finding.fault] = counts.get(finding.fault, 0) + 1
    return counts

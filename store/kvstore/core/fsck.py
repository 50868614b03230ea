"""What is wrong with an SSD tier, judged from its index records alone and from reads of its blocks.

No I/O: the caller brings the entries of the index and how the reads of the blocks ended.
"""

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from kvstore.core.spec import SLOT_ALIGN_BYTES
from kvstore.core.ssd_columns import decode_many
from kvstore.core.ssd_record import NO_PARENT, SsdRecord
from kvstore.core.types import IoOutcome


class Fault(StrEnum):
    """Why a record of the index is not to be kept."""

    MALFORMED = "malformed"  # not a record of this format
    FOREIGN = "foreign"  # of a namespace, or a block format, that this build cannot read
    OUTSIDE = "outside"  # names bytes that the data file does not have
    OVERLAP = "overlap"  # names bytes that a newer record names as well
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

    ``sound`` holds, in the order of the file, the records whose blocks are worth reading.
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
        self.findings: list[Finding] = []
        records, usable = decode_many(keys, values)
        for key, value, good in zip(keys, values, usable.tolist(), strict=True):
            if not good:
                detail = f"{len(value)} bytes that are no record"
                self.findings.append(Finding(Fault.MALFORMED, key, 0, 0, detail))
        placed = [r for r in records if self._has_place(r, block_bytes, file_bytes)]
        placed.sort(key=lambda record: record.ssd_offset)
        overlapping = set(_overlapping(placed))
        self.sound = [record for record in placed if record.key not in overlapping]
        for record in placed:
            if record.key in overlapping:
                self._found(Fault.OVERLAP, record, "a newer record has the same bytes")
        self._verified: dict[bytes, SsdRecord] = {}

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
            self._verified[record.key] = record
        elif outcome is IoOutcome.CORRUPT:
            self._found(Fault.CORRUPT, record, "its bytes do not have its checksum")
        else:
            self._found(Fault.UNREADABLE, record, "the device refused to read it")

    def finish(self) -> list[Finding]:
        """All findings. Blocks behind one that is missing or bad are orphans."""
        rooted = _rooted(self._verified)
        for key, record in self._verified.items():
            if key not in rooted:
                self._found(Fault.ORPHAN, record, "a block before it in its chain is missing")
        return self.findings

    def _found(self, fault: Fault, record: SsdRecord, detail: str) -> None:
        place = (record.ssd_offset, record.nbytes)
        self.findings.append(Finding(fault, record.key, *place, detail))


def _room(record: SsdRecord, file_bytes: int) -> int:
    """Bytes that a block may have at the record's place."""
    return (file_bytes - record.ssd_offset) // SLOT_ALIGN_BYTES * SLOT_ALIGN_BYTES


def _end(record: SsdRecord) -> int:
    """First byte behind the record's slot."""
    return record.ssd_offset - (-record.nbytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES


def _overlapping(placed: Sequence[SsdRecord]) -> Iterator[bytes]:
    """Keys of records that share bytes with a newer one that stays; in the order of offsets."""
    cluster: list[SsdRecord] = []
    end = 0
    for record in placed:
        if record.ssd_offset >= end:
            yield from _losers(cluster)
            cluster = []
        cluster.append(record)
        end = max(end, _end(record))
    yield from _losers(cluster)


def _losers(cluster: list[SsdRecord]) -> Iterator[bytes]:
    """The newest first, each keeps its place if it is still free."""
    if len(cluster) < 2:
        return
    starts: list[int] = []
    ends: list[int] = []
    for record in sorted(cluster, key=lambda record: record.sequence, reverse=True):
        at = bisect.bisect_left(starts, record.ssd_offset)
        before = ends[at - 1] if at else 0
        after = starts[at] if at < len(starts) else _end(record)
        if before > record.ssd_offset or after < _end(record):
            yield record.key
        else:
            starts.insert(at, record.ssd_offset)
            ends.insert(at, _end(record))


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

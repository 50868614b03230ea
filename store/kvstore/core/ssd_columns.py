"""Records of many blocks on SSD as columns: what a restart decodes and takes over at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.core.keys import KEY_BYTES
from kvstore.core.ssd_record import (
    IDENTITY_BYTES,
    NUMBER_MAX,
    ONE_SHARD_BYTES,
    PROOF_BYTES,
    SsdRecord,
)
from kvstore.errors import CorruptError

Mask = npt.NDArray[np.bool_]

_ENTRY = np.dtype(
    [
        ("key", "V32"),
        ("root", "V32"),
        ("nbytes", "<u8"),
        ("parent", "V32"),
        ("ssd_offset", "<u8"),
        ("sequence", "<u8"),
        ("shards", "<u4"),
        ("pad", "<u4"),
        ("checksum", "<u8"),
        ("proof", "<u8"),
    ]
)
_NAMES = ("key", "root", "parent", "nbytes", "ssd_offset", "sequence")


@dataclass(frozen=True)
class SsdColumns:
    """``entries`` has one element a record; ``several`` has all checksums of those with more
    than one shard, by place.
    """

    entries: npt.NDArray[np.void]
    several: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[SsdRecord]) -> "SsdColumns":
        """The same as columns."""
        listed = list(records)
        entries = np.zeros(len(listed), dtype=_ENTRY)
        for i, record in enumerate(listed):
            _enter(entries, i, record)
        several = {i: r.checksums for i, r in enumerate(listed) if len(r.checksums) > 1}
        return cls(entries, several)

    @classmethod
    def decoded(
        cls, batches: Iterable[Sequence[tuple[bytes, bytes]]], count: int
    ) -> "tuple[SsdColumns, list[bytes]]":
        """The records of all batches of index entries, the newest first, and the keys of what is
        none. ``count`` is how many entries there are, at least.

        Never has all of them as objects, and is back to one set of columns when it returns: a start
        touches little memory, which on a virtual machine may have to come from its host.
        """
        entries, end = np.empty(count, dtype=_ENTRY), 0
        several: dict[int, tuple[int, ...]] = {}
        broken: list[bytes] = []
        for batch in batches:
            keys, values = zip(*batch, strict=True)
            some, usable = decode_columns(keys, values)
            entries[end : end + len(some)] = some.entries
            several.update((end + i, sums) for i, sums in some.several.items())
            end += len(some)
            broken += [keys[i] for i in np.flatnonzero(~usable).tolist()]
        records = cls(entries[:end], several)
        return records.take(records.newest_first()), broken

    def __len__(self) -> int:
        return len(self.entries)

    def joined(self, name: str) -> bytes:
        """Keys, roots or parents, 32 bytes each."""
        return self.entries[name].tobytes()

    def only_root(self) -> bytes | None:
        """The root that all records have, as mostly; None if there are several, or no records."""
        roots = self.entries["root"]
        return roots[0].tobytes() if len(roots) and (roots == roots[0]).all() else None

    def roots(self) -> list[bytes]:
        """Of all namespaces that have a record, the one that was written to last first."""
        if (only := self.only_root()) is not None:
            return [only]
        upwards = self.entries[np.argsort(self.entries["sequence"], kind="stable")]
        newest = dict(zip(upwards["root"].tolist(), upwards["sequence"].tolist(), strict=True))
        return sorted(newest, key=newest.__getitem__, reverse=True)

    def numbers(self, name: str) -> npt.NDArray[np.int64]:
        """nbytes, ssd_offset or sequence."""
        return self.entries[name].astype(np.int64)

    def newest_first(self) -> npt.NDArray[np.int64]:
        """The places of the records in that order."""
        return np.argsort(-self.numbers("sequence"), kind="stable")

    def take(self, places: npt.NDArray[np.int64]) -> "SsdColumns":
        """Those records, in that order."""
        if len(places) == len(self) and (places == np.arange(len(self))).all():
            return self
        several: dict[int, tuple[int, ...]] = {}
        if self.several:
            asked = enumerate(places.tolist())
            several = {i: self.several[at] for i, at in asked if at in self.several}
        return SsdColumns(self.entries[places], several)

    def records(self) -> list[SsdRecord]:
        """The same as objects."""
        roots: dict[bytes, bytes] = {}  # one object a root, however many blocks
        columns = (self.entries[name].tolist() for name in _NAMES)
        listed = []
        for i, row in enumerate(zip(*columns, self.entries["checksum"].tolist(), strict=True)):
            key, root, parent, nbytes, offset, sequence, checksum = row
            sums = self.several.get(i, (checksum,))
            root = roots.setdefault(root, root)
            listed.append(SsdRecord(key, root, parent, nbytes, offset, sums, sequence))
        return listed


def decode_columns(keys: Sequence[bytes], values: Sequence[bytes]) -> tuple[SsdColumns, Mask]:
    """Records of many index entries and, for each entry, whether it was one.

    Entries that cannot be records are left out of the columns and False in the mask.
    """
    sizes = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
    plain = sizes == ONE_SHARD_BYTES
    plain &= np.fromiter(map(len, keys), dtype=np.int64, count=len(keys)) == KEY_BYTES
    if plain.all():
        entries, usable = _decode_plain(
            b"".join(chain.from_iterable(zip(keys, values, strict=True)))
        )
        return SsdColumns(entries[usable]), usable
    entries = np.zeros(len(keys), dtype=_ENTRY)
    usable = plain.copy()
    pairs = ((keys[i], values[i]) for i in np.flatnonzero(plain).tolist())
    entries[plain], usable[plain] = _decode_plain(b"".join(chain.from_iterable(pairs)))
    several: dict[int, tuple[int, ...]] = {}
    for i in np.flatnonzero(~plain).tolist():
        try:
            record = SsdRecord.decode(keys[i], values[i])
        except CorruptError:
            continue
        usable[i] = True
        _enter(entries, i, record)
        several[i] = record.checksums
    return SsdColumns(entries, several).take(np.flatnonzero(usable)), usable


def _decode_plain(joined: bytes) -> tuple[npt.NDArray[np.void], Mask]:
    """Records of one shard, each behind its key; their checksums come without their mask."""
    entries = np.frombuffer(bytearray(joined), dtype=_ENTRY)
    size, proven = _ENTRY.itemsize, _ENTRY.itemsize - PROOF_BYTES
    digest, view = xxhash.xxh3_64_intdigest, memoryview(joined)
    starts = range(0, len(joined), size)
    proofs = [digest(view[at : at + proven]) for at in starts]
    identity = KEY_BYTES + IDENTITY_BYTES
    masks = [digest(view[at : at + identity]) for at in starts]
    usable: Mask = entries["proof"] == np.array(proofs, dtype=np.uint64)
    usable &= entries["shards"] == 1
    for name in ("nbytes", "ssd_offset", "sequence"):
        usable &= entries[name] <= NUMBER_MAX
    entries["checksum"] ^= np.array(masks, dtype=np.uint64)
    return entries, usable


def _enter(entries: npt.NDArray[np.void], i: int, record: SsdRecord) -> None:
    for name in _NAMES:
        entries[name][i] = getattr(record, name)
    entries["checksum"][i] = record.checksums[0]


def decode_many(keys: Sequence[bytes], values: Sequence[bytes]) -> tuple[list[SsdRecord], Mask]:
    """``decode_columns`` with the records as objects."""
    columns, usable = decode_columns(keys, values)
    return columns.records(), usable

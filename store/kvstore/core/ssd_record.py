"""The record of one block on SSD: its fixed-size bytes, and a vectorised decoder of many."""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.core.keys import KEY_BYTES
from kvstore.errors import CorruptError

_HEAD = struct.Struct("<32s32sQQQI4x")  # root, parent, nbytes, ssd_offset, sequence, shards
HEAD_BYTES = _HEAD.size
SHARDS_MAX = 256
ONE_SHARD_BYTES = HEAD_BYTES + 8
NO_PARENT = bytes(KEY_BYTES)
NUMBER_MAX = 1 << 62  # of bytes, offsets and sequences: room to count on from what was read

_ONE = np.dtype(
    [
        ("root", "V32"),
        ("parent", "V32"),
        ("nbytes", "<u8"),
        ("ssd_offset", "<u8"),
        ("sequence", "<u8"),
        ("shards", "<u4"),
        ("pad", "<u4"),
        ("checksum", "<u8"),
    ]
)


class SsdRecord(NamedTuple):
    """Where a block is on SSD and what proves its bytes. ``parent`` is 32 zero bytes at a root."""

    key: bytes
    root: bytes
    parent: bytes
    nbytes: int
    ssd_offset: int
    checksums: tuple[int, ...]  # xxh3-64 of each shard
    sequence: int  # grows with every write; the newest record of a slot wins

    def encode(self) -> bytes:
        """The value stored under ``key`` in the index; 104 bytes for one shard."""
        head = _HEAD.pack(
            self.root,
            self.parent,
            self.nbytes,
            self.ssd_offset,
            self.sequence,
            len(self.checksums),
        )
        return head + struct.pack(f"<{len(self.checksums)}Q", *self.checksums)

    @classmethod
    def decode(cls, key: bytes, value: bytes) -> "SsdRecord":
        """The record of one index entry; CorruptError if the value cannot be one."""
        if len(key) != KEY_BYTES or len(value) < ONE_SHARD_BYTES:
            raise CorruptError(f"an SSD record of {len(key)} + {len(value)} bytes is too short")
        root, parent, nbytes, offset, sequence, shards = _HEAD.unpack_from(value)
        if not 1 <= shards <= SHARDS_MAX or len(value) != HEAD_BYTES + 8 * shards:
            raise CorruptError(f"an SSD record of {len(value)} bytes claims {shards} shards")
        if max(nbytes, offset, sequence) > NUMBER_MAX:
            raise CorruptError(f"an SSD record has a number over {NUMBER_MAX}")
        checksums = struct.unpack_from(f"<{shards}Q", value, HEAD_BYTES)
        return cls(key, root, parent, nbytes, offset, checksums, sequence)


def decode_many(
    keys: Sequence[bytes], values: Sequence[bytes]
) -> tuple[list[SsdRecord], npt.NDArray[np.bool_]]:
    """Records of many index entries and, for each entry, whether it was one.

    Entries that cannot be records are left out of the list and False in the mask.
    """
    usable = np.ones(len(keys), dtype=np.bool_)
    sizes = np.fromiter((len(v) for v in values), dtype=np.int64, count=len(values))
    if len(keys) and (sizes == ONE_SHARD_BYTES).all() and all(len(k) == KEY_BYTES for k in keys):
        table = np.frombuffer(b"".join(values), dtype=_ONE)
        numbers = (table[name] for name in ("nbytes", "ssd_offset", "sequence"))
        if (table["shards"] == 1).all() and all((n <= NUMBER_MAX).all() for n in numbers):
            return _from_columns(keys, table), usable
    records = []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        try:
            records.append(SsdRecord.decode(key, value))
        except CorruptError:
            usable[i] = False
    return records, usable


def _from_columns(keys: Sequence[bytes], table: npt.NDArray[np.void]) -> list[SsdRecord]:
    roots: dict[bytes, bytes] = {}  # one object a root, however many blocks
    columns = zip(
        keys,
        (roots.setdefault(root, root) for root in table["root"].tolist()),
        table["parent"].tolist(),
        table["nbytes"].tolist(),
        table["ssd_offset"].tolist(),
        ((checksum,) for checksum in table["checksum"].tolist()),
        table["sequence"].tolist(),
        strict=True,
    )
    return [SsdRecord(*row) for row in columns]

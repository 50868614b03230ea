"""The record of one block on SSD: its fixed-size bytes, and a vectorised decoder of many.

Its last 8 bytes are xxh3-64 of the key and of all bytes before them. The shards' checksums are
kept XORed with xxh3-64 of key, root and size: a record that checks out under another key than its
own names bytes that do not check out, so that one block is never taken for another.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.core.keys import KEY_BYTES
from kvstore.errors import CorruptError

_HEAD = struct.Struct("<32sQ32sQQI4x")  # root, nbytes, parent, ssd_offset, sequence, shards
_IDENTITY_BYTES = 40  # root and nbytes
HEAD_BYTES = _HEAD.size
PROOF_BYTES = 8
SHARDS_MAX = 256
ONE_SHARD_BYTES = HEAD_BYTES + 8 + PROOF_BYTES
NO_PARENT = bytes(KEY_BYTES)
NUMBER_MAX = 1 << 62  # of bytes, offsets and sequences: room to count on from what was read

_ONE = np.dtype(
    [
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
        """The value stored under ``key`` in the index; 112 bytes for one shard."""
        head = _HEAD.pack(
            self.root,
            self.nbytes,
            self.parent,
            self.ssd_offset,
            self.sequence,
            len(self.checksums),
        )
        mask = _mask(self.key, head)
        body = head + struct.pack(f"<{len(self.checksums)}Q", *(c ^ mask for c in self.checksums))
        return body + xxhash.xxh3_64_intdigest(self.key + body).to_bytes(PROOF_BYTES, "little")

    @classmethod
    def decode(cls, key: bytes, value: bytes) -> "SsdRecord":
        """The record of one index entry; CorruptError if the value cannot be one."""
        if len(key) != KEY_BYTES or len(value) < ONE_SHARD_BYTES:
            raise CorruptError(f"an SSD record of {len(key)} + {len(value)} bytes is too short")
        root, nbytes, parent, offset, sequence, shards = _HEAD.unpack_from(value)
        if not 1 <= shards <= SHARDS_MAX or len(value) != HEAD_BYTES + 8 * shards + PROOF_BYTES:
            raise CorruptError(f"an SSD record of {len(value)} bytes claims {shards} shards")
        if int.from_bytes(value[-PROOF_BYTES:], "little") != _proof(key, value):
            raise CorruptError("an SSD record does not have its checksum, or is under another key")
        if max(nbytes, offset, sequence) > NUMBER_MAX:
            raise CorruptError(f"an SSD record has a number over {NUMBER_MAX}")
        mask = _mask(key, value)
        masked = struct.unpack_from(f"<{shards}Q", value, HEAD_BYTES)
        checksums = tuple(checksum ^ mask for checksum in masked)
        return cls(key, root, parent, nbytes, offset, checksums, sequence)


def _proof(key: bytes, value: bytes) -> int:
    """The checksum that a record under ``key`` ends with."""
    return xxhash.xxh3_64_intdigest(key + value[:-PROOF_BYTES])


def _mask(key: bytes, head: bytes) -> int:
    """What the shards' checksums are XORed with: it is another for another block."""
    return xxhash.xxh3_64_intdigest(key + head[:_IDENTITY_BYTES])


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
        proofs = np.fromiter(map(_proof, keys, values), dtype=np.uint64, count=len(keys))
        right = (table["proof"] == proofs).all() and (table["shards"] == 1).all()
        if right and all((n <= NUMBER_MAX).all() for n in numbers):
            masks = np.fromiter(map(_mask, keys, values), dtype=np.uint64, count=len(keys))
            return _from_columns(keys, table, table["checksum"] ^ masks), usable
    records = []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        try:
            records.append(SsdRecord.decode(key, value))
        except CorruptError:
            usable[i] = False
    return records, usable


def _from_columns(
    keys: Sequence[bytes], table: npt.NDArray[np.void], checksums: npt.NDArray[np.uint64]
) -> list[SsdRecord]:
    roots: dict[bytes, bytes] = {}  # one object a root, however many blocks
    columns = zip(
        keys,
        (roots.setdefault(root, root) for root in table["root"].tolist()),
        table["parent"].tolist(),
        table["nbytes"].tolist(),
        table["ssd_offset"].tolist(),
        ((checksum,) for checksum in checksums.tolist()),
        table["sequence"].tolist(),
        strict=True,
    )
    return [SsdRecord(*row) for row in columns]

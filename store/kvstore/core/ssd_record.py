"""The record of one block on SSD: its fixed-size bytes.

Its last 8 bytes are xxh3-64 of the key and of all bytes before them. The shards' checksums are
kept XORed with xxh3-64 of key, root and size: a record that checks out under another key than its
own names bytes that do not check out, so that one block is never taken for another.
"""

import struct
from typing import NamedTuple

import xxhash

from kvstore.core.keys import KEY_BYTES
from kvstore.errors import CorruptError

_HEAD = struct.Struct("<32sQ32sQQI4x")  # root, nbytes, parent, ssd_offset, sequence, shards
IDENTITY_BYTES = 40  # root and nbytes
HEAD_BYTES = _HEAD.size
PROOF_BYTES = 8
SHARDS_MAX = 256
ONE_SHARD_BYTES = HEAD_BYTES + 8 + PROOF_BYTES
NO_PARENT = bytes(KEY_BYTES)
NUMBER_MAX = 1 << 62  # of bytes, offsets and sequences: room to count on from what was read


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
    return xxhash.xxh3_64_intdigest(key + head[:IDENTITY_BYTES])

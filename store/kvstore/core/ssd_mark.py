"""The mark of an SSD index: how far its sequences have come, and below which no record is left.

It is committed with the records. The pages of an index keep old records until they are used again;
who reads those pages knows by the mark which of them are gone.
"""

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.core.ssd_record import NUMBER_MAX, PROOF_BYTES
from kvstore.errors import CorruptError

_NUMBERS = struct.Struct("<QQ")


class Mark(NamedTuple):
    """Of two marks of one index the greater is the newer."""

    sequence: int = 0  # none that was committed is higher
    floor: int = 0  # no record of a lower sequence is left

    def encode(self) -> bytes:
        """24 bytes; the last 8 are xxh3-64 of those before."""
        body = _NUMBERS.pack(self.sequence, self.floor)
        return body + xxhash.xxh3_64_intdigest(body).to_bytes(PROOF_BYTES, "little")

    @classmethod
    def decode(cls, value: bytes) -> "Mark":
        """CorruptError if the value is none."""
        if len(value) != _NUMBERS.size + PROOF_BYTES:
            raise CorruptError(f"a mark of {len(value)} bytes")
        body = value[: _NUMBERS.size]
        if xxhash.xxh3_64_intdigest(body).to_bytes(PROOF_BYTES, "little") != value[len(body) :]:
            raise CorruptError("the mark does not have its checksum")
        mark = cls(*_NUMBERS.unpack(body))
        if max(mark) > NUMBER_MAX:
            raise CorruptError(f"the mark has a number over {NUMBER_MAX}")
        return mark

    def after(self, sequence: int, *, empty: bool) -> "Mark":
        """The mark of a commit with records up to ``sequence`` (0: none), and whether any is left.

        Sequences become durable in their order: what is still being written is above the mark.
        """
        highest = max(self.sequence, sequence)
        return Mark(highest, highest + 1 if empty else self.floor)

    def of(self, sequences: npt.NDArray[np.int64]) -> "Mark":
        """The mark of a sound index that has the records of these sequences, and noted this one.

        The floor may be lower than this one's: a version that knows no marks may have written
        records since. On the pages there may also be the mark of a commit that was not finished.
        The sequence goes up by one, so that neither is taken for the newer.
        """
        if not len(sequences):
            return self.after(0, empty=True)
        return Mark(max(self.sequence, int(sequences.max())) + 1, int(sequences.min()))

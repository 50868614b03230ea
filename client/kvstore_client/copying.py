"""Copies between slots and private memory, in few calls; checksums while the bytes are cached."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from kvstore.core.spec import SLOT_ALIGN_BYTES
from kvstore.errors import InvalidArgumentError

from kvstore_client.streaming import STREAM_BYTES_MIN, Bytes, copier, copy

Offsets = npt.NDArray[np.int64]

# Copied, then hashed while the source is in the second-level cache, or the third.
CHUNK_BYTES = 1 << 20


def slot_bytes(nbytes: int) -> int:
    """Bytes from one slot to the next where slots follow each other."""
    return -(-nbytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES


def as_bytes(data: Any, *, write: bool = False) -> Bytes:
    """The memory of an array, tensor or buffer as flat bytes, without a copy.

    Raises InvalidArgumentError if it is not contiguous, or read-only where it is to be written.
    """
    if not isinstance(data, np.ndarray) and hasattr(data, "data_ptr"):
        import torch

        if data.device.type != "cpu" or not data.is_contiguous():
            raise InvalidArgumentError("a tensor must be contiguous and on the CPU")
        data = data.detach().view(torch.uint8).numpy() if data.numel() else np.empty(0, np.uint8)
    try:
        view = memoryview(data)
        flat: Bytes = np.frombuffer(view.cast("B") if view.nbytes else b"", dtype=np.uint8)
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"a {type(data).__name__} that is not one piece of contiguous bytes; copy it first"
        ) from None
    if write and view.readonly:
        raise InvalidArgumentError("the destination is read-only")
    return flat


class Blocks:
    """Consecutive blocks of private memory: one buffer, or a list of one buffer a block.

    Raises InvalidArgumentError if it cannot hold ``count`` blocks of ``nbytes``.
    """

    def __init__(self, data: Any, count: int, nbytes: int, *, write: bool = False) -> None:
        self.each: list[Bytes] | None = None
        self.whole: Bytes = np.empty(0, dtype=np.uint8)
        if isinstance(data, list | tuple):
            self.each = [as_bytes(item, write=write) for item in data[:count]]
            good = len(self.each) == count and all(len(item) == nbytes for item in self.each)
            have = f"{len(data)} buffers of {sorted({len(item) for item in self.each})} bytes"
        else:
            whole = as_bytes(data, write=write)
            self.whole = whole[: count * nbytes]
            good = len(self.whole) == count * nbytes
            have = f"a buffer with room for {len(whole) // nbytes} blocks"
        if not good:
            raise InvalidArgumentError(f"{have}; {count} of {nbytes} are needed")
        self._nbytes = nbytes

    def part(self, first: int, count: int) -> Bytes | list[Bytes]:
        """``count`` blocks from ``first`` on."""
        if self.each is not None:
            return self.each[first : first + count]
        return self.whole[first * self._nbytes : (first + count) * self._nbytes]


def spans(offsets: Offsets, step: int) -> list[tuple[int, int]]:
    """Ranges of indices, first and end, whose slots follow each other at ``step`` bytes."""
    if not len(offsets):
        return []
    breaks = np.flatnonzero(np.diff(offsets) != step) + 1
    return list(pairwise([0, *breaks.tolist(), len(offsets)]))


def gather(pool: Bytes, offsets: Offsets, nbytes: int, out: Bytes) -> None:
    """Copies ``nbytes`` from each offset of the pool into ``out``, one block after the other."""
    stride = slot_bytes(nbytes)
    for first, end in spans(offsets, stride):
        start = int(offsets[first])
        source = pool[start : start + (end - first) * stride]
        target = out[first * nbytes : end * nbytes]
        if stride == nbytes:
            copy(target, source)
        elif nbytes < STREAM_BYTES_MIN:
            np.copyto(
                target.reshape(end - first, nbytes), source.reshape(end - first, stride)[:, :nbytes]
            )
        else:
            for i in range(end - first):
                slot = source[i * stride : i * stride + nbytes]
                copy(target[i * nbytes : (i + 1) * nbytes], slot)


def scatter_one(slot: Bytes, data: Bytes) -> int:
    """Copies ``data`` into ``slot``; its xxh3-64."""
    if len(data) <= CHUNK_BYTES:
        copy(slot, data)
        digest: int = xxhash.xxh3_64_intdigest(data.data)
        return digest
    hasher, view = xxhash.xxh3_64(), data.data
    copy_part = copier(slot, data)
    # Between memoryviews a copy starts sooner, 2 % of the whole, but keeps the interpreter: threads
    # that compute would wait for one that only copies, and that may have lost its core.
    for at in range(0, len(data), CHUNK_BYTES):
        copy_part(at, at + CHUNK_BYTES)
        hasher.update(view[at : at + CHUNK_BYTES])
    whole: int = hasher.intdigest()
    return whole


def scatter(pool: Bytes, offsets: Offsets, nbytes: int, data: Bytes) -> list[int]:
    """Copies consecutive blocks of ``data`` to the offsets of the pool; their xxh3-64.

    The checksum is of ``data``: bytes that change under the copy are a mismatch later, not a block
    that looks right.
    """
    per_chunk = CHUNK_BYTES // nbytes
    if per_chunk < 2 or slot_bytes(nbytes) != nbytes:
        return [
            scatter_one(pool[offset : offset + nbytes], data[i * nbytes : (i + 1) * nbytes])
            for i, offset in enumerate(offsets.tolist())
        ]
    digests: list[int] = []
    view = data.data
    digest = xxhash.xxh3_64_intdigest
    for first, end in spans(offsets, nbytes):
        start, base = int(offsets[first]), first * nbytes
        size = (end - first) * nbytes
        copy_part = copier(pool[start : start + size], data[base : base + size])
        for low in range(0, size, per_chunk * nbytes):
            high = min(size, low + per_chunk * nbytes)
            copy_part(low, high)
            digests += [
                digest(view[at : at + nbytes]) for at in range(base + low, base + high, nbytes)
            ]
    return digests


def checksum(slot: Bytes) -> int:
    """xxh3-64 of what lies in a slot."""
    digest: int = xxhash.xxh3_64_intdigest(slot.data)
    return digest

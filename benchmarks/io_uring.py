"""io_uring by its two system calls, as much of it as reads and writes of a file need."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from types import TracebackType
from typing import Self

_SETUP, _ENTER = 425, 426  # numbers of the system calls, the same on x86-64 and arm64
_OFF_SQ_RING, _OFF_CQ_RING, _OFF_SQES = 0, 0x8000000, 0x10000000
_ENTER_GETEVENTS = 1
_OP_READ, _OP_WRITE = 22, 23
_SQE = struct.Struct("<BBHiQQIIQ")  # opcode, flags, priority, fd, offset, address, length, -, data
_SQE_BYTES = 64
_CQE = struct.Struct("<QiI")
_PARAMS_BYTES = 120
_U32 = struct.Struct("<I")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Ring:
    """One ring, used from one thread. OSError where the kernel or its administrator has none."""

    def __init__(self, entries: int) -> None:
        params = ctypes.create_string_buffer(_PARAMS_BYTES)
        self._descriptor = _call(_SETUP, ctypes.c_uint(entries), params)
        sq_entries, cq_entries = struct.unpack_from("<II", params.raw)
        # head, tail, ring_mask, ring_entries, flags, dropped, array of the submission ring
        sq_offsets = struct.unpack_from("<7I", params.raw, 40)
        # head, tail, ring_mask, ring_entries, overflow, cqes of the completion ring
        cq_offsets = struct.unpack_from("<6I", params.raw, 80)
        self._sq = mmap.mmap(self._descriptor, sq_offsets[6] + 4 * sq_entries, offset=_OFF_SQ_RING)
        self._cq = mmap.mmap(
            self._descriptor, cq_offsets[5] + _CQE.size * cq_entries, offset=_OFF_CQ_RING
        )
        self._sqes = mmap.mmap(self._descriptor, _SQE_BYTES * sq_entries, offset=_OFF_SQES)
        self._sq_tail_at, self._sq_array_at = sq_offsets[1], sq_offsets[6]
        self._sq_mask = sq_entries - 1
        self._cq_head_at, self._cq_tail_at, self._cqes_at = (
            cq_offsets[0],
            cq_offsets[1],
            cq_offsets[5],
        )
        self._cq_mask = cq_entries - 1
        self._prepared = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the ring back; no request may be out."""
        for mapped in (self._sq, self._cq, self._sqes):
            mapped.close()
        os.close(self._descriptor)

    def prepare(
        self, descriptor: int, memory: memoryview, offset: int, data: int, *, write: bool
    ) -> None:
        """Queues one request; ``memory`` must stay where it is until it has ended."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        tail = _U32.unpack_from(self._sq, self._sq_tail_at)[0]
        at = tail & self._sq_mask
        opcode = _OP_WRITE if write else _OP_READ
        self._sqes[at * _SQE_BYTES : (at + 1) * _SQE_BYTES] = bytes(_SQE_BYTES)
        _SQE.pack_into(
            self._sqes,
            at * _SQE_BYTES,
            opcode,
            0,
            0,
            descriptor,
            offset,
            address,
            len(memory),
            0,
            data,
        )
        _U32.pack_into(self._sq, self._sq_array_at + 4 * at, at)
        _U32.pack_into(self._sq, self._sq_tail_at, (tail + 1) & 0xFFFFFFFF)
        self._prepared += 1

    def submit_and_wait(self, count: int) -> list[tuple[int, int]]:
        """(data, result) of what has ended, once ``count`` requests have."""
        submitted = _call(
            _ENTER,
            ctypes.c_int(self._descriptor),
            ctypes.c_uint(self._prepared),
            ctypes.c_uint(count),
            ctypes.c_uint(_ENTER_GETEVENTS),
            None,
            ctypes.c_size_t(0),
        )
        self._prepared -= submitted
        head = _U32.unpack_from(self._cq, self._cq_head_at)[0]
        tail = _U32.unpack_from(self._cq, self._cq_tail_at)[0]
        ended = []
        while head != tail:
            data, result, _ = _CQE.unpack_from(
                self._cq, self._cqes_at + _CQE.size * (head & self._cq_mask)
            )
            ended.append((data, result))
            head = (head + 1) & 0xFFFFFFFF
        _U32.pack_into(self._cq, self._cq_head_at, head)
        return ended

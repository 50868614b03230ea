"""Blocks as they lie in the pool: memoryviews, arrays and tensors without a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
from kvstore.errors import PreconditionError

from kvstore_client.copying import Offsets
from kvstore_client.streaming import Bytes

if TYPE_CHECKING:
    import torch


class SlotViews(Sequence[memoryview]):
    """Views of slots, made when asked for. Closing takes those back that nothing else uses."""

    def __init__(self, pool: Bytes, offsets: Offsets, nbytes: int, *, write: bool) -> None:
        self._pool = pool
        self._offsets = offsets
        self._nbytes = nbytes
        self._write = write
        self._count = 0
        self._closed = False
        self._given: list[memoryview] = []

    def grow(self, count: int) -> None:
        """The first ``count`` slots may be seen."""
        self._count = count

    def __len__(self) -> int:
        return self._count

    def bytes_at(self, index: int) -> Bytes:
        """Slot ``index`` as a writable array of bytes, for this package's copies."""
        # First of all: what has no blocks can be gone through, released or not.
        if not 0 <= index < self._count:
            raise IndexError(f"block {index} of {self._count}")
        if self._closed:
            raise PreconditionError("these blocks were released: use them before that")
        start = int(self._offsets[index])
        if start < 0:
            raise PreconditionError(f"block {index} has no slot: look at its status")
        return self._pool[start : start + self._nbytes]

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        view = self.bytes_at(index).data
        view = view if self._write else view.toreadonly()
        self._given.append(view)
        return view

    def array(
        self, index: int, dtype: npt.DTypeLike = np.uint8, shape: tuple[int, ...] = (-1,)
    ) -> npt.NDArray[Any]:
        """Slot ``index`` as an array over the same memory."""
        array = self.bytes_at(index).view(dtype).reshape(shape)
        array.flags.writeable = self._write
        return array

    def tensor(
        self, index: int, dtype: torch.dtype | None = None, shape: tuple[int, ...] = (-1,)
    ) -> torch.Tensor:
        """Slot ``index`` as a tensor over the same memory; a tensor cannot be made read-only."""
        import torch

        flat = torch.from_numpy(self.bytes_at(index))
        return (flat if dtype is None else flat.view(dtype)).reshape(shape)

    def close(self) -> None:
        """Later use of a view that was given out raises ValueError where that can be done."""
        self._closed = True
        for view in self._given:
            with contextlib.suppress(BufferError):  # an array was made of it
                view.release()
        self._given.clear()

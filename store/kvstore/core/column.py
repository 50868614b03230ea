"""Memory for columns of the table: as long as it can ever get, taken as it is touched."""

import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


def column(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros. A page of them costs memory from its first use on.

    A table that grows within its columns copies nothing, so that no request waits for it.
    """
    kind = np.dtype(dtype)
    # Not np.zeros: it asks for huge pages, of which many small tables touch one a column.
    count = math.prod(shape) if isinstance(shape, tuple) else shape
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(1, count * kind.itemsize), flags=private)
    return np.frombuffer(memory, dtype=kind, count=count).reshape(shape)

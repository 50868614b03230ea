"""Copies past the caches, by a small library in C where the installation could compile it.

A copy that goes through the caches first reads each line that it is about to overwrite, a third of
its traffic, and drives out what others keep there. libc avoids that from about the size of the last
cache on, for which a virtual machine may report the cache of the whole socket. Figures:
docs/decisions/0006-copies-pass-the-caches-by.md.
"""

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

LIBRARY = Path(__file__).with_name("_stream.so")
# Below, a target may be wanted in the caches, and the call through ctypes costs what it saves.
STREAM_BYTES_MIN = 128 << 10


def load(path: Path, order: str = "") -> Callable[[int, int, int], None] | None:
    """``copy(target address, source address, bytes)`` of the library.

    ``order``: "lines" or "pages"; otherwise what suits this processor. None where there is no
    library, or it does not run on this processor.
    """
    try:
        library = ctypes.CDLL(str(path))
        supported = library.kvstore_stream_supported()
        order = order or ("pages" if library.kvstore_stream_prefers_pages() else "lines")
        function = library[f"kvstore_stream_copy_{order}"]
    except (OSError, AttributeError) as error:
        log.debug("copies are libc's: %s", error)
        return None
    if not supported:
        log.debug("copies are libc's: this processor has no AVX2")
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = None
    copy: Callable[[int, int, int], None] = function
    return copy


_stream = load(LIBRARY)


def streams() -> bool:
    """Whether large copies pass the caches by in this process."""
    return _stream is not None


def copy(target: Bytes, source: Bytes) -> None:
    """Copies ``source`` to ``target``, bytes in one dimension, without the interpreter.

    They may be the same memory, but must not overlap otherwise. Raises ValueError if the lengths
    differ or ``target`` is read-only, TypeError where numpy does not cast to the target's type.
    """
    if target.shape == source.shape and len(source) < STREAM_BYTES_MIN:
        np.copyto(target, source)
    else:
        copier(target, source)(0, len(source))


def copier(target: Bytes, source: Bytes) -> Callable[[int, int], None]:
    """``copy(first, end)`` of that part of ``source`` to the same part of ``target``, as slices go.

    What ``copy`` looks at in each call is looked at once: that takes a fifth as long as 256 KiB.
    Raises as ``copy`` does; what numpy refuses it refuses in a call of the result.
    """
    if target.shape != source.shape:
        raise ValueError(f"{source.shape} bytes into {target.shape}")
    if _stream is None or not _plain(target, source):
        return lambda first, end: np.copyto(target[first:end], source[first:end])
    size = len(source)
    stream, target_address, source_address = _stream, target.ctypes.data, source.ctypes.data

    def part(first: int, end: int) -> None:
        end = min(end, size)
        if end - first < STREAM_BYTES_MIN:
            np.copyto(target[first:end], source[first:end])
        else:
            stream(target_address + first, source_address + first, end - first)

    return part


def _plain(target: Bytes, source: Bytes) -> bool:
    """Whether addresses and a length say it all; else numpy copies, or tells what is wrong."""
    return (
        target.dtype == source.dtype == np.uint8
        and target.ndim == 1
        and target.flags.carray  # contiguous and writeable
        and source.flags.c_contiguous
    )

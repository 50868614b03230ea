"""Test bytes that judge themselves: a function of (seed, tenant, key, version).

Every 64-byte cell names its block and its own place in it, so that a torn, shifted or foreign
slice shows wherever it is cut.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

CELL_BYTES = 64


def content(seed: int, tenant: str, key: bytes, version: int, nbytes: int) -> bytes:
    """The right bytes of a block; ``nbytes`` is a multiple of 64."""
    assert nbytes % CELL_BYTES == 0, nbytes
    name = b"%d\0%s\0%d\0" % (seed, tenant.encode(), version)
    tag = np.frombuffer(hashlib.blake2b(name + key, digest_size=48).digest(), "<u8")
    cells = np.empty((nbytes // CELL_BYTES, 8), "<u8")
    cells[:, :6] = tag
    cells[:, 6] = np.arange(len(cells))
    cells[:, 7] = cells[:, 6] * tag[0] ^ tag[5]
    return cells.tobytes()


def version_of(
    data: bytes | memoryview, seed: int, tenant: str, key: bytes, versions: Iterable[int]
) -> int | None:
    """Which of the versions the bytes are, all of them; None: wrong bytes."""
    for version in versions:
        if data == content(seed, tenant, key, version, len(data)):
            return version
    return None

"""A digest over the bytes of a model's files, so that no KV crosses from one weight to another."""

from collections.abc import Iterable
from pathlib import Path

import xxhash

_CHUNK_BYTES = 4 << 20


def fingerprint_files(paths: Iterable[Path]) -> str:
    """xxh3-128 in hex over the lengths and bytes of ``paths``, in the order of their names.

    Names do not count: the same weights under another name share their KV.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(paths):
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()

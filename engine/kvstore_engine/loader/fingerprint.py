"""A digest over the bytes of a model's files, so that no KV crosses from one weight to another."""

from collections.abc import Iterable
from pathlib import Path

import xxhash

_CHUNK_BYTES = 4 << 20


def fingerprint_files(paths: Iterable[Path]) -> str:
    """xxh3-128 in hex over the names, lengths and bytes of ``paths`` in the order of names."""
    digest = xxhash.xxh3_128()
    for path in sorted(paths):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()

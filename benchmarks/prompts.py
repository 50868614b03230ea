"""Prompts whose blocks hold their own key, so that any slice of them judges itself."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from kvstore_client import CacheSpec, Namespace

KEY_BYTES = 32

Bytes = npt.NDArray[np.uint8]


def spec_of(name: str, block_bytes: int) -> CacheSpec:
    """The namespace of a benchmark."""
    return CacheSpec.raw(f"benchmark {name}", block_bytes=block_bytes)


class Prompts:
    """``blocks`` blocks in chains of ``prompt_blocks``, the same ones in every process."""

    def __init__(self, namespace: Namespace, blocks: int, prompt_blocks: int) -> None:
        self.namespace = namespace
        self.blocks = blocks
        self._prompt_blocks = prompt_blocks

    def __iter__(self) -> Iterator[list[bytes]]:
        for first in range(0, self.blocks, self._prompt_blocks):
            count = min(self._prompt_blocks, self.blocks - first)
            tokens = np.arange(count * self.namespace.spec.block_tokens, dtype=np.uint32)
            tokens[0] = first
            yield self.namespace.keys(tokens)

    def content(self, keys: list[bytes]) -> Bytes:
        """The bytes of these blocks, one behind the other."""
        words = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
        return np.tile(words, self.namespace.spec.block_bytes // KEY_BYTES).reshape(-1)

    def right(self, keys: list[bytes], data: Bytes) -> int:
        """How many of these blocks ``data`` has as they were written."""
        wanted = self.content(keys).reshape(len(keys), -1)
        same = wanted == data[: wanted.size].reshape(wanted.shape)
        return int(same.all(axis=1).sum())

"""A sketch of how often keys were used lately: small, bounded, and forgetting."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.uint8]

COUNT_MAX = 15
_DEPTH = 4


class FrequencySketch:
    """A count-min sketch of ``width`` counters (a power of two) in each of four rows.

    All counters are halved after every ``sample`` uses, so that old uses fade. After Einziger,
    Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM ToS 2017.
    Keys are SHA-256 digests: their four 64-bit words are the four hashes.
    """

    def __init__(self, width: int) -> None:
        self._mask = np.uint64(width - 1)
        self._counts: Counts = np.zeros((_DEPTH, width), dtype=np.uint8)
        self._row = np.arange(_DEPTH)
        self._uses = 0

    def add(self, words: Words, sample: int) -> None:
        """One use of each key; ``words`` has a row of four for each of the distinct keys."""
        at = (words & self._mask).astype(np.int64)
        counts = self._counts[self._row, at]
        lowest = counts.min(axis=1, keepdims=True)
        # Only the lowest counters of a key grow: less is added to keys that share the others.
        grown = np.where(counts == lowest, np.minimum(counts + 1, COUNT_MAX), counts)
        np.maximum.at(self._counts, (np.broadcast_to(self._row, at.shape), at), grown)
        self._uses += len(words)
        if self._uses >= sample:
            self._counts >>= 1
            self._uses //= 2

    def estimate(self, words: Words) -> Counts:
        """Uses of each key, 0 to 15; collisions make it more, never less."""
        at = (words & self._mask).astype(np.int64)
        lowest: Counts = self._counts[self._row, at].min(axis=1)
        return lowest

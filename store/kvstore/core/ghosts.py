"""A bounded memory of blocks that are gone, and why."""

import numpy as np
import numpy.typing as npt

from kvstore.core.types import EndReason


class Ghosts:
    """Remembers the reason for the newest ``entries`` removed keys, by a prefix of 8 bytes.

    A prefix is enough to explain a miss, and too little to serve anything. Nine bytes an entry
    and no object: a table that the prefix itself leads into.
    """

    def __init__(self, entries: int) -> None:
        self._size = 1 << max(1, entries - 1).bit_length() if entries else 0
        self._prefixes: npt.NDArray[np.uint64] = np.zeros(self._size, dtype=np.uint64)
        self._reasons: npt.NDArray[np.uint8] = np.zeros(self._size, dtype=np.uint8)

    def add(self, keys: bytes, reason: EndReason) -> None:
        """Remembers n x 32 bytes of keys; what shares their places is forgotten."""
        if self._size:
            prefixes = _prefixes(keys)
            places = self._places(prefixes)
            self._prefixes[places] = prefixes
            self._reasons[places] = int(reason)

    def reason(self, key: bytes) -> EndReason:
        """Why a key is not here: NEVER_STORED where there is no memory of it."""
        if not self._size:
            return EndReason.NEVER_STORED
        prefixes = _prefixes(key)
        place = self._places(prefixes)[0]
        if self._prefixes[place] != prefixes[0] or not self._reasons[place]:
            return EndReason.NEVER_STORED
        return EndReason(int(self._reasons[place]))

    def was_evicted(self, keys: bytes) -> npt.NDArray[np.bool_]:
        """For each key, whether it gave way to others not long ago."""
        prefixes = _prefixes(keys)
        if not self._size:
            return np.zeros(len(prefixes), dtype=np.bool_)
        places = self._places(prefixes)
        reasons = self._reasons[places]
        evicted: npt.NDArray[np.bool_] = reasons == int(EndReason.EVICTED)
        evicted |= reasons == int(EndReason.NOT_ADMITTED)
        evicted &= self._prefixes[places] == prefixes
        return evicted

    def _places(self, prefixes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return ((prefixes >> np.uint64(20)) & np.uint64(self._size - 1)).astype(np.int64)


def _prefixes(keys: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(keys, dtype="<u8")[::4]

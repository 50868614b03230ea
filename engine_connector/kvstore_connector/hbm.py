"""Which blocks are in the engine's own pages: known here, told to the master."""

from collections.abc import Sequence
from threading import Lock


class HbmBlocks:
    """Keys in the engine's prefix cache, and what the node has not been told yet.

    Changed by the engine loop, reported by the link's thread. A change since the last report is
    held once per key, so it is bounded by what is in pages and what left them in between; while
    nobody is there to be told, only what is in pages is kept.
    """

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self._changed: dict[bytes, bool] = {}
        self._resync = True
        self._lock = Lock()

    def change(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """Takes in what came and what left."""
        with self._lock:
            self.keys.difference_update(removed)
            self.keys.update(stored)
            if not self._resync:
                self._changed.update(dict.fromkeys(removed, False))
                self._changed.update(dict.fromkeys(stored, True))

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many leading ``keys`` are in pages."""
        for i, key in enumerate(keys):
            if key not in self.keys:
                return i
        return len(keys)

    def lost(self) -> None:
        """The node that was told is gone: tell everything again."""
        with self._lock:
            self._resync = True
            self._changed.clear()

    def take(self) -> tuple[list[bytes], list[bytes], bool]:
        """What to report: keys stored, keys removed, and whether to forget all others first."""
        with self._lock:
            changed, self._changed = self._changed, {}
            if self._resync:
                self._resync = False
                return list(self.keys), [], True
        stored = [key for key, there in changed.items() if there]
        return stored, [key for key, there in changed.items() if not there], False

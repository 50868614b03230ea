"""Blocks in the engines' own pages, as the engines report them: kept for the master only."""

from kvstore.core.keys import split_keys

KEYS_MAX = 1 << 21  # all engines of this node; what comes beyond it is in no inventory


class HbmInventory:
    """Keys by namespace root and engine id."""

    def __init__(self, keys_max: int = KEYS_MAX) -> None:
        self._keys: dict[tuple[bytes, str], set[bytes]] = {}
        self._overfull: set[tuple[bytes, str]] = set()  # of which the master may have more keys
        self._room = keys_max
        self.refused = 0

    def change(
        self, root: bytes, engine_id: str, stored: bytes, removed: bytes, *, cleared: bool = False
    ) -> None:
        """All keys go if ``cleared``, then removed ones, then stored ones come.

        InvalidArgumentError for a list that is none, and then nothing has changed.
        """
        come, gone = split_keys(stored), split_keys(removed)
        if cleared:
            self.clear(root, engine_id)
        held = self._keys.pop((root, engine_id), set())
        before = len(held)
        held.difference_update(gone)
        fresh = set(come) - held
        refused = len(fresh) > self._room + before - len(held)
        if refused:
            self.refused += len(fresh)
            self._overfull.add((root, engine_id))
        else:
            held |= fresh
        self._room += before - len(held)
        if held or (root, engine_id) in self._overfull:
            self._keys[root, engine_id] = held

    def clear(self, root: bytes, engine_id: str) -> None:
        """The engine holds nothing of this namespace."""
        self._room += len(self._keys.pop((root, engine_id), ()))
        self._overfull.discard((root, engine_id))

    def roots(self) -> set[bytes]:
        """Namespaces of which any engine holds blocks."""
        return {root for root, _ in self._keys}

    def roots_of(self, engine_id: str) -> list[bytes]:
        """Namespaces of which the engine holds blocks."""
        return [root for root, engine in self._keys if engine == engine_id]

    def inventory(self, chunk_keys: int) -> list[tuple[bytes, str, bytes]]:
        """(root, engine id, keys) of everything, at most ``chunk_keys`` keys each."""
        return [
            (root, engine_id, b"".join(keys[first : first + chunk_keys]))
            for (root, engine_id), held in self._keys.items()
            for keys in (list(held),)
            for first in range(0, len(keys), chunk_keys)
        ]

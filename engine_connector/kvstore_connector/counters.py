"""Counters of one connector, raised by several threads."""

from collections import defaultdict
from threading import Lock


class Counters:
    """Named monotonic numbers."""

    def __init__(self) -> None:
        self._values: dict[str, float] = defaultdict(float)
        self._lock = Lock()

    def add(self, name: str, amount: float = 1) -> None:
        """Raises ``name`` by ``amount``."""
        with self._lock:
            self._values[name] += amount

    def snapshot(self) -> dict[str, float]:
        """A copy of all of them."""
        with self._lock:
            return dict(self._values)

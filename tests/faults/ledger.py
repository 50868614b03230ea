"""What was asked of the store and what it said: the checker of the fault suites.

What was acknowledged must hold; what failed or timed out may or may not have happened; what was
never issued must not appear.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.core.types import AckLevel

from tests.faults.content import version_of


@dataclass
class Ledger:
    """Puts by key; safe to be used by several threads."""

    seed: int
    tenant: str = "default"
    issued: dict[bytes, set[int]] = field(default_factory=lambda: defaultdict(set))
    acked: dict[bytes, AckLevel] = field(default_factory=dict)
    reads: int = 0
    wrong: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def issue(self, key: bytes, version: int = 0) -> None:
        """A put begins: from now on its bytes may be found."""
        with self._lock:
            self.issued[key].add(version)

    def acknowledge(self, key: bytes, level: AckLevel) -> None:
        """The store named the level reached; UNSPECIFIED is a put that failed."""
        if level is not AckLevel.UNSPECIFIED:
            with self._lock:
                self.acked[key] = max(level, self.acked.get(key, level))

    def read(self, key: bytes, data: bytes | memoryview) -> bool:
        """A hit: counts it as wrong unless all bytes are of one version that was issued."""
        with self._lock:
            versions: Iterable[int] = tuple(self.issued.get(key, ()))
        right = version_of(data, self.seed, self.tenant, key, versions) is not None
        with self._lock:
            self.reads += 1
            self.wrong += not right
        return right

    def acked_at(self, level: AckLevel) -> list[bytes]:
        """Keys acknowledged at this level or a better one."""
        with self._lock:
            return [key for key, reached in self.acked.items() if reached >= level]

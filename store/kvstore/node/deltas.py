"""What the master has not been told yet."""

from kvstore_proto import master_pb2

from kvstore.node import translate

BYTES_MAX = 16 << 20  # of keys that wait; more, and the master gets the whole inventory again
EVENT_BYTES = 128  # of a message, whatever keys are in it
EVENT_KEYS_BYTES_MAX = 256 << 10  # keys in one message


class Deltas:
    """Changes that the master has not been told yet, in their order, few messages for many."""

    def __init__(self) -> None:
        self._last: dict[tuple[bytes, int, str], master_pb2.BlockEvents] = {}
        self._waiting: list[master_pb2.BlockEvents] = []
        self._bytes = 0
        self.overflowed = False

    def add(
        self, root: bytes, tier: int, engine_id: str, stored: bytes, removed: bytes, cleared: bool
    ) -> None:
        """Queues one change; within a message, cleared comes before removed before stored."""
        if len(stored) + len(removed) > EVENT_KEYS_BYTES_MAX:
            for part in _parts(removed):
                self.add(root, tier, engine_id, b"", part, cleared)
                cleared = False
            for part in _parts(stored):
                self.add(root, tier, engine_id, part, b"", cleared)
                cleared = False
            return
        event = self._last.get((root, tier, engine_id))
        follows = (
            event is not None
            and not cleared
            and not (removed and event.stored)
            and _keys_bytes(event) + len(stored) + len(removed) <= EVENT_KEYS_BYTES_MAX
        )
        self._bytes += len(stored) + len(removed) + (0 if follows else EVENT_BYTES)
        if self.overflowed or self._bytes > BYTES_MAX:
            self.clear()
            self.overflowed = True
            return
        if event is None or not follows:
            event = master_pb2.BlockEvents(
                root=root, tier=translate.number(tier), engine_id=engine_id, cleared=cleared
            )
            self._last[root, tier, engine_id] = event
            self._waiting.append(event)
        event.removed += removed
        event.stored += stored

    def take(self) -> list[master_pb2.BlockEvents]:
        """All that waits; nothing waits afterwards."""
        waiting = self._waiting
        self.clear()
        return waiting

    def clear(self) -> None:
        """Forgets all that waits."""
        self._waiting, self._last, self._bytes, self.overflowed = [], {}, 0, False


def _parts(keys: bytes) -> list[bytes]:
    step = EVENT_KEYS_BYTES_MAX
    return [keys[first : first + step] for first in range(0, len(keys), step)]


def _keys_bytes(event: master_pb2.BlockEvents) -> int:
    return len(event.stored) + len(event.removed)

"""Block events for routers; a watcher that falls behind a bounded queue is cut off."""

import asyncio
import contextlib
from collections.abc import Iterator

from kvstore_proto import master_pb2

from kvstore.core.place_sets import Place
from kvstore.errors import ResourceExhaustedError
from kvstore.master.messages import tier_value

WATCHERS_MAX = 64
EVENTS_QUEUED_MAX = 4096
BYTES_QUEUED_MAX = 64 << 20  # of one watcher


class Watcher:
    """One reader of events."""

    def __init__(self, root: bytes) -> None:
        self.root = root
        self._queue: asyncio.Queue[master_pb2.BlockEvents] = asyncio.Queue(EVENTS_QUEUED_MAX)
        self._bytes = 0
        self._behind = False

    def put(self, events: master_pb2.BlockEvents) -> None:
        """Queues events; a watcher whose queue is full gets no more. One message always fits."""
        waiting = self._bytes + events.ByteSize()
        too_much = waiting > BYTES_QUEUED_MAX and not self._queue.empty()
        if self._behind or self._queue.full() or too_much:
            self._behind = True
        else:
            self._bytes = waiting
            self._queue.put_nowait(events)

    async def next(self) -> master_pb2.BlockEvents:
        """The next events; ResourceExhaustedError where some had to be dropped."""
        if self._behind and self._queue.empty():
            raise ResourceExhaustedError(
                f"more than {EVENTS_QUEUED_MAX} events, or {BYTES_QUEUED_MAX >> 20} MiB, were "
                "waiting and some were dropped; list the blocks and watch again"
            )
        events = await self._queue.get()
        self._bytes -= events.ByteSize()
        return events


class Watchers:
    """Everybody who watches block events."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()

    def __len__(self) -> int:
        return len(self._watchers)

    def publish(self, events: master_pb2.BlockEvents) -> None:
        """Gives events to every watcher of their namespace. Never waits."""
        for watcher in self._watchers:
            if watcher.root in (b"", events.root):
                watcher.put(events)

    def publish_cleared(self, places: list[Place]) -> None:
        """Tells that these places have no blocks any more."""
        for place in places:
            self.publish(
                master_pb2.BlockEvents(
                    node_id=place.node_id,
                    root=place.root,
                    tier=tier_value(place.tier),
                    engine_id=place.engine_id,
                    cleared=True,
                )
            )

    @contextlib.contextmanager
    def subscribe(self, root: bytes) -> Iterator[Watcher]:
        """Events from now on, of one namespace, or of all if ``root`` is empty.

        Raises ResourceExhaustedError where there are too many watchers already.
        """
        if len(self._watchers) >= WATCHERS_MAX:
            raise ResourceExhaustedError(f"there are {WATCHERS_MAX} watchers already")
        watcher = Watcher(root)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

"""Drives the pure core: gives it the time, and carries out the effects of its calls."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from kvstore.core.effects import BlockEvent, DropSsd, Effects, ReadSsd, Reply, WriteSsd
from kvstore.core.node_core import NodeCore
from kvstore.core.types import IoOutcome
from kvstore.node.ssd import SsdTier

log = logging.getLogger(__name__)

ReplySink = Callable[[Reply], None]
EventSink = Callable[[Sequence[BlockEvent]], None]


class Driver:
    """Owns the core on the event loop; every call's effects go through ``apply`` at once."""

    def __init__(self, core: NodeCore, events: EventSink) -> None:
        self.core = core
        self.ssd: SsdTier | None = None
        self.reads_idle = asyncio.Event()  # no read from SSD is out
        self.reads_idle.set()
        self._reads_out = 0
        self.sinks: dict[int, ReplySink] = {}  # by session id; without one, answers are dropped
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.now = self._loop.time  # the monotonic clock, as asyncio's timers use it

    def apply(self, effects: Effects) -> None:
        """Sends the answers, starts the disk requests, passes the events on."""
        for reply in effects.replies:
            if (sink := self.sinks.get(reply.session_id)) is not None:
                sink(reply)
        if self.ssd is not None:
            if effects.reads:
                self._reads_out += len(effects.reads)
                self.reads_idle.clear()
                self.ssd.submit_reads(effects.reads)
            # Removals first: a key that is stored anew in the same call must end up stored.
            if effects.drops:
                self.ssd.submit_drops(effects.drops)
            if effects.writes:
                self.ssd.submit_writes(effects.writes)
        if effects.events:
            self._events(effects.events)
        self._set_timer()

    def heed_corruption(self) -> None:
        """Has all writes verified once the core has counted a corrupt block on SSD."""
        counters = self.core.counters
        found = counters.get("corrupt_blocks", 0) + counters.get("scrub_corrupt_blocks", 0)
        if found and self.ssd is not None and not self.ssd.verifies_all:
            self.ssd.suspect()

    def close(self) -> None:
        """No more ticks."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        due = self.core.next_deadline()
        if due is None or (self._timer is not None and self._timer.when() <= due):
            return  # an early tick is harmless, and sets the timer anew
        self.close()
        self._timer = self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.apply(self.core.tick(self.now()))

    # SsdReports

    def reads_done(self, done: Sequence[tuple[ReadSsd, IoOutcome]]) -> None:
        """Reads ended: what waits for them is answered."""
        self._reads_out -= len(done)
        if not self._reads_out:
            self.reads_idle.set()
        effects = self.core.reads_done(done, self.now())
        self.heed_corruption()
        self.apply(effects)

    def writes_done(self, done: Sequence[WriteSsd], ok: bool) -> None:
        """Writes of one group ended."""
        self.apply(self.core.writes_done(done, ok, self.now()))

    def writes_corrupt(self, done: Sequence[WriteSsd]) -> None:
        """What was to be written is not what was committed."""
        self.apply(self.core.writes_corrupt(done, self.now()))

    def drops_done(self, done: Sequence[DropSsd], *, ok: bool) -> None:
        """Removals are durable: their space is free."""
        self.apply(self.core.drops_done(done, self.now(), ok=ok))

"""The engine's side of the connector: which pages are lent, since when, and what is owed.

Lent pages are pinned until the connector returns them, since it may be writing or reading them;
the engine never waits for that. How many may be lent is limited, so that a connector that never
returns any leaves enough pages for the longest request.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvstore_engine.block_manager import BlockManager
from kvstore_engine.kv_transfer import BlockSource, KVConnector, LoadResult, SaveBlock
from kvstore_engine.request import Request, RequestState

NOTHING = BlockSource(blocks=0, end_reason="never_stored")
NO_SPACE = BlockSource(blocks=0, end_reason="no_space")
TIMED_OUT = BlockSource(blocks=0, end_reason="timed_out")


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks ``first …`` of ``request`` on their way into ``pages``."""

    request: Request
    first: int
    pages: list[int]
    later: int  # blocks to load behind these, once pages may be lent again
    deadline: float  # of all loads in a row
    end_reason: str  # why the store's prefix ends behind all of them


class Unsaved(NamedTuple):
    """A computed block that the connector has not seen."""

    request_id: str
    parent: bytes | None
    block: SaveBlock


class Transfers:
    """Lends pages for loads and saves; without a connector everything is a miss."""

    def __init__(
        self,
        connector: KVConnector | None,
        blocks: BlockManager,
        *,
        lend_max: int,
        match_timeout_s: float,
        load_timeout_s: float,
    ) -> None:
        self.connector = connector
        self.lend_max = lend_max
        self.match_timeout_s = match_timeout_s
        self.load_timeout_s = load_timeout_s
        self.saves_skipped = 0
        self.results_unexpected = 0
        self._blocks = blocks
        self._loads: dict[str, Load] = {}
        self._overdue: dict[str, Load] = {}
        self._unsaved: deque[Unsaved] = deque()

    @property
    def num_overdue(self) -> int:
        """Loads that nobody waits for any more and whose pages are still lent."""
        return len(self._overdue)

    def owes(self, request_id: str) -> bool:
        """Whether a load under this id is still to be answered."""
        return request_id in self._loads or request_id in self._overdue

    def look_up(self, request: Request) -> None:
        """Starts finding out what the store has of ``request``."""
        request.asked_store_at = None
        if self.connector is not None:
            self.connector.on_request(request.request_id, request.cacheable_keys)

    def match(self, request: Request, first: int, now: float) -> BlockSource | None:
        """What could be loaded from block ``first`` on; None: ask in the next step."""
        if self.connector is None:
            return NOTHING
        # A connector that is late with one load is not trusted with another.
        if request.store_overdue or self._overdue:
            return TIMED_OUT
        source = self.connector.match(request.request_id, first)
        if source is not None and (not source.blocks or self.loadable(1)):
            return source
        if request.asked_store_at is None:
            request.asked_store_at = now
        if now - request.asked_store_at < self.match_timeout_s:
            return None
        return TIMED_OUT if source is None else NO_SPACE

    def explain(self, request: Request) -> None:
        """A store may tell only after its match why it has no more; the first token is in time."""
        if self.connector is not None and request.cache.end_reason == NOTHING.end_reason:
            reason = self.connector.end_reason(request.request_id)
            request.cache.end_reason = reason or NOTHING.end_reason

    def loadable(self, blocks: int) -> int:
        """How many of ``blocks`` may be loaded now."""
        return max(0, min(blocks, self.lend_max - self._blocks.num_pinned))

    def start_load(
        self, request: Request, first: int, blocks: int, reason: str, deadline: float
    ) -> bool:
        """Fills ``blocks`` pages of ``request`` from block ``first`` on, some perhaps later.

        False, with nothing done, when no page may be lent now.
        """
        part = self.loadable(blocks)
        if not part or self.connector is None:
            return False
        pages = request.pages[first : first + part]
        self._blocks.pin(pages)
        load = Load(request, first, pages, blocks - part, deadline, reason)
        self._loads[request.request_id] = load
        self.connector.start_load(request.request_id, first, pages)
        return True

    def poll(self) -> list[tuple[Load, LoadResult]]:
        """Takes back what the connector returned; gives the loads that requests wait for."""
        if self.connector is None:
            return []
        events = self.connector.poll()
        self._blocks.unpin(events.saved_pages)
        ended = []
        for result in events.loads:
            load = self._loads.pop(result.request_id, None)
            if load is not None and load.request.state is RequestState.LOADING:
                ended.append((load, result))
            load = load or self._overdue.pop(result.request_id, None)
            if load is None:
                self.results_unexpected += 1  # answered twice: the pages are long back
                continue
            self._blocks.unpin(load.pages)
        self._save_waiting()
        if self._unsaved:
            self.pages_missed()
        return ended

    def pages_missed(self) -> None:
        """Lent pages are wanted back soon: a request, or blocks to be saved, found none."""
        if self.connector is not None:
            self.connector.hurry_saves()

    def expire(self, now: float) -> list[Load]:
        """Loads whose deadline has passed now; their pages stay lent."""
        late = [load for load in self._loads.values() if load.deadline <= now]
        for load in late:
            self._overdue[load.request.request_id] = self._loads.pop(load.request.request_id)
            load.request.store_overdue = True
        return [load for load in late if load.request.state is RequestState.LOADING]

    def next_deadline(self) -> float | None:
        """When ``expire`` has to be called."""
        return min((load.deadline for load in self._loads.values()), default=None)

    def save(self, request: Request, fresh: Sequence[int]) -> None:
        """Stores the blocks with the indices ``fresh`` of ``request``: now or when pages may be
        lent again, as long as they are still cached.
        """
        if self.connector is None:
            return
        for i in fresh:
            if len(self._unsaved) == self._blocks.num_pages:
                self.saves_skipped += 1
                continue
            parent = request.keys[i - 1] if i else None
            block = SaveBlock(request.keys[i], request.pages[i])
            self._unsaved.append(Unsaved(request.request_id, parent, block))
        self._save_waiting()

    def _save_waiting(self) -> None:
        room = max(1, self.lend_max // 2) - self._blocks.num_pinned
        run: list[Unsaved] = []
        while self._unsaved and room > 0:
            unsaved = self._unsaved.popleft()
            if not self._blocks.holds(unsaved.block.page, unsaved.block.key):
                self.saves_skipped += 1
                continue
            if run and unsaved.parent != run[-1].block.key:
                self._save_run(run)
                run = []
            run.append(unsaved)
            room -= 1
        self._save_run(run)

    def _save_run(self, run: list[Unsaved]) -> None:
        if run and self.connector is not None:
            blocks = [unsaved.block for unsaved in run]
            self._blocks.pin(block.page for block in blocks)
            self.connector.save(run[0].request_id, run[0].parent, blocks)

    def forget(self, request: Request) -> None:
        """``request`` has ended; what it lent comes back through ``poll``."""
        if self.connector is not None:
            self.connector.request_finished(request.request_id)

    def report_pages(self) -> None:
        """Tells which blocks came into and left HBM since the last call."""
        stored, removed = self._blocks.drain_events()
        if self.connector is not None and (stored or removed):
            self.connector.pages_changed(stored, removed)

    def register_pages(self, pages: torch.Tensor) -> None:
        """Gives the page storage to the connector."""
        if self.connector is not None:
            self.connector.register_pages(pages)

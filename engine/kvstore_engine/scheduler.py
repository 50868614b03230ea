"""Decides what each step computes: one token budget for prefill chunks and decodes alike."""

from bisect import insort
from enum import Enum
from typing import NamedTuple

from kvstore_engine.block_manager import BlockManager
from kvstore_engine.kv_transfer import BlockSource, LoadResult
from kvstore_engine.messages import CacheUsage
from kvstore_engine.request import Request, RequestState
from kvstore_engine.transfers import Load, Transfers


class Chunk(NamedTuple):
    """``num_tokens`` tokens of ``request`` from ``first`` on, to be computed in this step."""

    request: Request
    first: int
    num_tokens: int

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be sampled behind this chunk."""
        return self.first + self.num_tokens == len(self.request.tokens)


class Plan:
    """The chunks of one step and what is left of its token budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: dict[str, Chunk] = {}

    def add(self, request: Request) -> None:
        """Plans as many of the uncomputed tokens as the budget allows."""
        count = min(request.num_uncomputed, self.budget)
        self.chunks[request.request_id] = Chunk(request, request.num_computed, count)
        self.budget -= count

    def drop(self, request: Request) -> None:
        """Takes a request that lost its pages out again."""
        chunk = self.chunks.pop(request.request_id, None)
        if chunk is not None:
            self.budget += chunk.num_tokens


class Admission(Enum):
    """What became of an attempt to admit a waiting request."""

    RUNNING = "running"
    LOADING = "loading"
    LOOKING = "looking"  # the store's answer is not there yet
    NO_PAGES = "no pages"


def _arrival(request: Request) -> int:
    return request.arrival


class Scheduler:
    """Requests in three places: waiting, loading, running.

    A request is admitted with pages for all of its known tokens, in order of arrival; only those
    whose look-up is still under way let others pass. Decoding takes more pages as it goes. When
    there are none, the youngest running request loses its pages and waits again; on its way back
    it finds its blocks in the prefix cache or in the store, or computes them anew.
    """

    def __init__(
        self,
        blocks: BlockManager,
        transfers: Transfers,
        *,
        max_batch_tokens: int,
        max_running: int,
    ) -> None:
        self.waiting: list[Request] = []
        self.loading: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self.num_looking = 0  # waiting requests whose look-up was not ready in the last step
        self._blocks = blocks
        self._transfers = transfers
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running

    def add(self, request: Request) -> None:
        """Queues a new or preempted request and starts its look-up."""
        request.state = RequestState.WAITING
        insort(self.waiting, request, key=_arrival)
        self._transfers.look_up(request)

    def remove(self, request: Request) -> None:
        """Takes an ended request out and gives back what it holds."""
        self._place_of(request).remove(request)
        request.state = RequestState.FINISHED
        self._release(request)

    def schedule(self, now: float) -> list[Chunk]:
        """The chunks of this step, no more than the token budget in all."""
        preempted_before = self.preemptions
        plan = Plan(self._max_batch_tokens)
        # Decodes first: a long prefill then cannot hold up those who wait for every token.
        for request in sorted(self.running, key=lambda request: request.num_uncomputed > 1):
            if not plan.budget:
                break
            if request.state is RequestState.RUNNING and self._grow(request, plan):
                plan.add(request)
        # Who had to take pages away must not give some to a newcomer in the same step.
        if self.preemptions == preempted_before:
            self._admit_waiting(plan, now)
        return list(plan.chunks.values())

    def load_ended(self, load: Load, result: LoadResult) -> None:
        """Puts the loaded blocks to use; what is missing is computed like any other token."""
        request = load.request
        loaded = min(result.blocks, len(load.pages))
        request.num_computed = (load.first + loaded) * request.page_tokens
        self.register_blocks(request)
        reason = load.end_reason if loaded == len(load.pages) else result.end_reason
        if load.later and loaded == len(load.pages):
            first = load.first + loaded
            if self._transfers.start_load(request, first, load.later, reason, load.deadline):
                self._count_load(request, result, reason)
                return
            reason = "no_space"
        self._count_load(request, result, reason)
        self.loading.remove(request)
        self._run(request)

    def load_overdue(self, load: Load) -> None:
        """Leaves the pages to the connector and starts over without the store."""
        self.loading.remove(load.request)
        self._requeue(load.request)

    def register_blocks(self, request: Request) -> list[int]:
        """Puts newly full pages into the prefix cache; returns the indices of new blocks."""
        first, last = request.num_cached, request.num_computed // request.page_tokens
        request.extend_keys(last)
        fresh = []
        for i in range(first, last):
            page = self._blocks.register(request.pages[i], request.keys[i], depth=i)
            if page == request.pages[i]:
                fresh.append(i)
            else:
                request.replace_page(i, page)
        request.num_cached = last
        return fresh

    def _grow(self, request: Request, plan: Plan) -> bool:
        """Makes room for all known tokens; False when ``request`` itself had to give way."""
        need = request.pages_for(len(request.tokens)) - len(request.pages)
        if need <= 0:
            return True
        while not self._blocks.can_allocate(need):
            self._transfers.pages_missed()
            victim = max(self.running, key=_arrival)
            victim.started |= victim.num_computed > victim.cache.total
            plan.drop(victim)
            self.running.remove(victim)
            self.preemptions += 1
            self._requeue(victim)
            if victim is request:
                return False
        request.add_pages(self._blocks.allocate(need))
        return True

    def _admit_waiting(self, plan: Plan, now: float) -> None:
        self.num_looking = 0
        index = 0
        while index < len(self.waiting) and self.num_looking < self._max_running:
            if not plan.budget or len(self.running) + len(self.loading) >= self._max_running:
                return
            request = self.waiting[index]
            outcome = self._admit(request, now)
            if outcome is Admission.NO_PAGES:
                return
            if outcome is Admission.LOOKING:
                self.num_looking += 1
                index += 1
                continue
            del self.waiting[index]
            if outcome is Admission.RUNNING:
                plan.add(request)

    def _admit(self, request: Request, now: float) -> Admission:
        keys = request.cacheable_keys
        hits = self._blocks.match(keys)
        need = request.pages_for(len(request.tokens)) - len(hits)
        if not self._blocks.can_allocate(need, beside=hits):
            self._transfers.pages_missed()
            return Admission.NO_PAGES
        source = self._look(request, len(keys) - len(hits), len(hits), now)
        if source is None:
            return Admission.LOOKING
        self._blocks.reference(hits)
        request.set_pages(hits + self._blocks.allocate(need))
        request.num_computed = len(hits) * request.page_tokens
        request.num_cached = len(hits)
        if not request.started:
            request.cache = CacheUsage(hbm=request.num_computed, end_reason=source.end_reason)
        if not source.blocks:
            self._run(request)
            return Admission.RUNNING
        deadline = now + self._transfers.load_timeout_s
        self._transfers.start_load(request, len(hits), source.blocks, source.end_reason, deadline)
        request.state = RequestState.LOADING
        self.loading.append(request)
        return Admission.LOADING

    def _look(self, request: Request, missing: int, first: int, now: float) -> BlockSource | None:
        """What to load behind the ``first`` blocks of HBM, cut to the ``missing`` ones."""
        if not missing:
            return BlockSource(0, "complete")
        source = self._transfers.match(request, first, now)
        if source is None or source.blocks < missing:
            return source
        return BlockSource(missing, "complete")

    def _count_load(self, request: Request, result: LoadResult, reason: str) -> None:
        if request.started:
            return  # it was preempted: its prompt has been accounted for
        request.cache.end_reason = reason
        request.cache.dram += result.tokens_by_tier.get("dram", 0)
        request.cache.ssd += result.tokens_by_tier.get("ssd", 0)
        request.cache.remote += result.tokens_by_tier.get("remote", 0)

    def _run(self, request: Request) -> None:
        request.state = RequestState.RUNNING
        self.running.append(request)

    def _requeue(self, request: Request) -> None:
        self._release(request)
        self.add(request)

    def _release(self, request: Request) -> None:
        self._blocks.free(request.pages)
        request.set_pages([])
        request.num_computed = request.num_cached = 0

    def _place_of(self, request: Request) -> list[Request]:
        places = {RequestState.RUNNING: self.running, RequestState.LOADING: self.loading}
        return places.get(request.state, self.waiting)

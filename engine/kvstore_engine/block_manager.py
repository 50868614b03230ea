"""Which page of HBM holds what: references, the prefix cache, and exact LRU eviction."""

import heapq
from collections.abc import Iterable, Sequence
from itertools import takewhile


class BlockManager:
    """Pages 0 … ``num_pages`` - 1, each blank, cached, or in use.

    A page in use has references (requests that compute with it) or pins (it is lent to the
    connector, which reads or fills it). Without both, a page with a key stays cached until its
    space is needed and one without is blank. Eviction takes the least recently used chain, its
    deepest block first, so that no hole is punched into a chain.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_pinned = 0
        self._refs = [0] * num_pages
        self._pins = [0] * num_pages
        self._key_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._blank = list(range(num_pages - 1, -1, -1))
        self._cached: set[int] = set()
        # Pages by (last use, -depth). Entries of pages that are not cached any more, or were used
        # since, are skipped when they come up.
        self._evictable: list[tuple[int, int, int]] = []
        self._last_use = [0] * num_pages
        self._depth = [0] * num_pages
        self._uses = 0
        # Key -> whether it came or went since the last report; both in a row cancel out.
        self._changed: dict[bytes, bool] = {}

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` can give now, those with cached blocks included."""
        return len(self._blank) + len(self._cached)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the leading keys that are cached."""
        found = takewhile(lambda page: page is not None, map(self._page_of.get, keys))
        return [page for page in found if page is not None]

    def holds(self, page: int, key: bytes) -> bool:
        """Whether ``page`` has the block ``key``, in use or cached."""
        return self._page_of.get(key) == page

    def can_allocate(self, count: int, beside: Sequence[int] = ()) -> bool:
        """Whether ``count`` pages are there once ``beside`` (matched pages) is referenced."""
        return self.num_free - sum(page in self._cached for page in beside) >= count

    def allocate(self, count: int) -> list[int]:
        """``count`` pages with one reference each; evicts cached blocks. Check first."""
        pages = []
        for _ in range(count):
            page = self._blank.pop() if self._blank else self._evict()
            self._refs[page] = 1
            pages.append(page)
        return pages

    def reference(self, pages: Iterable[int]) -> None:
        """One more reference on each of these matched pages."""
        for page in pages:
            self._refs[page] += 1
            self._cached.discard(page)

    def free(self, pages: Sequence[int]) -> None:
        """Drops one reference from each of a request's pages; this is their last use."""
        self._uses += 1
        for page in pages:
            if self._refs[page] < 1:
                raise AssertionError(f"page {page} is freed without a reference")
            self._refs[page] -= 1
            self._last_use[page] = self._uses
            self._settle(page)

    def pin(self, pages: Iterable[int]) -> None:
        """Lends pages to the connector: they keep their bytes until ``unpin``."""
        for page in pages:
            self.num_pinned += self._pins[page] == 0
            self._pins[page] += 1
            self._cached.discard(page)

    def unpin(self, pages: Iterable[int]) -> None:
        """Takes lent pages back, one pin each."""
        for page in pages:
            if self._pins[page] < 1:
                raise AssertionError(f"page {page} comes back, but it was not lent")
            self._pins[page] -= 1
            self.num_pinned -= self._pins[page] == 0
            self._settle(page)

    def register(self, page: int, key: bytes, depth: int) -> int:
        """Makes a full, computed page findable as block ``depth`` of its chain.

        Returns the page to go on with.

        Another request may have computed the same block meanwhile. Then its page is referenced,
        this one is given back, and chains never hang below a page that can go before them.
        """
        known = self._page_of.setdefault(key, page)
        if known == page:
            self._key_of[page] = key
            self._depth[page] = depth
            self._note(key, stored=True)
            return page
        self.reference([known])
        self.free([page])
        return known

    def reset(self) -> int:
        """Forgets every block that no request uses; returns how many."""
        forgotten = [page for page in self._page_of.values() if not self._refs[page]]
        for page in forgotten:
            self._forget(page)
            if page in self._cached:
                self._cached.remove(page)
                self._blank.append(page)
        return len(forgotten)

    def drain_events(self) -> tuple[list[bytes], list[bytes]]:
        """Keys that came and keys that went since the last call."""
        changed, self._changed = self._changed, {}
        return [k for k, came in changed.items() if came], [
            k for k, came in changed.items() if not came
        ]

    def check_integrity(self) -> None:
        """AssertionError unless free + cached + in use == total, and every index agrees."""
        used = sum(1 for refs, pins in zip(self._refs, self._pins, strict=True) if refs or pins)
        parts = {"blank": len(self._blank), "cached": len(self._cached), "used": used}
        if sum(parts.values()) != self.num_pages:
            raise AssertionError(f"{parts} do not add up to {self.num_pages} pages")
        if len({*self._blank, *self._cached}) != self.num_free:
            raise AssertionError("a page is blank twice, or blank and cached")
        keyed = {page: key for page, key in enumerate(self._key_of) if key is not None}
        if keyed != {page: key for key, page in self._page_of.items()}:
            raise AssertionError("keys of pages and pages of keys differ")
        if any(page not in keyed for page in self._cached) or keyed.keys() & set(self._blank):
            raise AssertionError("a cached page has no key, or a blank one has")
        if self.num_pinned != sum(1 for pins in self._pins if pins):
            raise AssertionError(f"{self.num_pinned} pages are counted as pinned")

    def check_idle(self) -> None:
        """AssertionError unless nothing is referenced or lent."""
        self.check_integrity()
        if self.num_free != self.num_pages:
            busy = [p for p in range(self.num_pages) if self._refs[p] or self._pins[p]]
            raise AssertionError(f"idle, but pages {busy} are in use")

    def _settle(self, page: int) -> None:
        """Puts a page that nobody uses any more where ``allocate`` finds it."""
        if self._refs[page] or self._pins[page]:
            return
        if self._key_of[page] is None:
            self._blank.append(page)
        else:
            self._cached.add(page)
            heapq.heappush(self._evictable, self._rank(page))
            if len(self._evictable) > 4 * self.num_pages:
                self._evictable = [self._rank(page) for page in self._cached]
                heapq.heapify(self._evictable)

    def _rank(self, page: int) -> tuple[int, int, int]:
        return self._last_use[page], -self._depth[page], page

    def _evict(self) -> int:
        while True:
            rank = heapq.heappop(self._evictable)
            page = rank[2]
            if page in self._cached and rank == self._rank(page):
                self._cached.remove(page)
                self._forget(page)
                return page

    def _forget(self, page: int) -> None:
        key = self._key_of[page]
        if key is not None:
            del self._page_of[key]
            self._key_of[page] = None
            self._note(key, stored=False)

    def _note(self, key: bytes, *, stored: bool) -> None:
        if self._changed.pop(key, None) is None:
            self._changed[key] = stored

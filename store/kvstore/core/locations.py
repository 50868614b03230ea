"""Which places hold which block: the master's index, pure and in memory.

A *place* is one tier of one node (for HBM: of one engine) within one namespace. Keys do not own
their list of places; all keys that are in exactly the same places share one ``PlaceSet``. So a
key costs its 32 bytes and one dict entry, and a node is forgotten by changing the few sets that
name it, however many blocks they stand for.
"""

import heapq
import sys
from collections.abc import Callable
from dataclasses import dataclass

from kvstore.core.keys import split_keys
from kvstore.core.place_sets import Place, PlaceSet
from kvstore.core.types import EndReason, Tier

GHOST_KEYS_MAX = 1 << 17
TRIM_KEYS = 16_384  # a few milliseconds
PASS_KEYS_PER_GHOST = 4096  # that are gone through for each ghost found, at most
EMPTY_SETS_MAX = 64  # that are kept in case their places come again
KEY_OBJECT_BYTES = 80  # a bytes object of 32, as the allocator rounds it up


@dataclass(frozen=True, slots=True)
class Run:
    """Keys ``first`` to ``first + count - 1`` of a request are in ``place``."""

    first: int
    count: int
    place: Place


@dataclass(frozen=True, slots=True)
class Located:
    """The leading keys that are somewhere, and why the next one is nowhere."""

    runs: list[Run]
    found: int
    reason: EndReason


class Locations:
    """Index from key to places, with the reason why a key that was here is gone.

    At most ``keys_max`` keys are indexed; ``stored`` says how many it had to refuse. Keys that
    lost their last place stay as ghosts with their reason; ``trim`` keeps them to ``ghosts_max``.
    """

    def __init__(self, *, keys_max: int = 1 << 62, ghosts_max: int = GHOST_KEYS_MAX) -> None:
        self._keys_max = keys_max
        self._ghosts_max = ghosts_max
        self._table: dict[bytes, PlaceSet] = {}
        self._places: dict[tuple[str, Tier, str, bytes], Place] = {}
        self._never = PlaceSet((), EndReason.NEVER_STORED)
        self._sets: dict[tuple[Place, ...], PlaceSet] = {}
        self._dead: dict[EndReason, PlaceSet] = {}
        self._twins: set[PlaceSet] = set()  # that a removal made equal to another one
        self._emptied: list[PlaceSet] = []  # those that lost their last key, and may have some now
        self._held = 0  # keys that have a place
        self._purged: set[bytes] = set()
        self._surplus: list[bytes] = []  # ghosts to be forgotten

    def place(self, node_id: str, tier: Tier, root: bytes, engine_id: str = "") -> Place:
        """The one Place of these names."""
        name = (node_id, tier, engine_id, root)
        if (found := self._places.get(name)) is None:
            found = self._places[name] = Place(node_id, tier, engine_id, root)
        return found

    # Changes

    def stored(self, place: Place, joined: bytes) -> int:
        """Notes that ``place`` has these keys (n x 32 bytes). Returns how many were refused,
        because the index is full; keys that it has already are never refused.
        """
        table, never, refused = self._table, self._never, 0
        last, new = never, never
        self._purged.discard(place.root)
        for key in split_keys(joined):
            old = table.get(key, never)
            if old is not last or new is never:
                last, new = old, old.with_place.get(place) or self._add(old, place)
            if new is old:
                continue
            full = old is never and len(table) >= self._keys_max
            # Once there is no room there is none for the rest of these keys either.
            if full and (refused or not self._make_room()):
                refused += 1
                continue
            table[key] = new
            new.keys += 1
            old.keys -= 1
            if not old.places:
                self._held += 1
            if not old.keys:
                self._emptied.append(old)
        self._sweep()
        return refused

    def removed(self, place: Place, joined: bytes) -> None:
        """Notes that ``place`` has these keys no more; keys that it never had are ignored."""
        table = self._table
        reason = EndReason.PURGED if place.root in self._purged else EndReason.EVICTED
        edge = (place, reason)
        last, new = None, self._never
        for key in split_keys(joined):
            if (old := table.get(key)) is None:
                continue
            if old is not last:
                last, new = old, old.without.get(edge) or self._subtract(old, place, reason)
            if new is old:
                continue
            table[key] = new
            new.keys += 1
            old.keys -= 1
            if not new.places:
                self._held -= 1
            if not old.keys:
                self._emptied.append(old)
        self.trim()

    def clear(self, place: Place) -> int:
        """Forgets every block of one place; returns how many there were."""
        reason = EndReason.PURGED if place.root in self._purged else EndReason.EVICTED
        return self._strip(lambda p: p is place, reason)

    def remove_node(self, node_id: str, reason: EndReason = EndReason.NODE_LOST) -> list[Place]:
        """Forgets every block of a node, HBM of its engines included; returns the places that
        it had. Takes a time that grows with the number of places, not of blocks.
        """
        held = [p for p in self.counts() if p.node_id == node_id]
        self._strip(lambda p: p.node_id == node_id, reason)
        return held

    def remove_namespace(self, node_id: str, root: bytes) -> None:
        """Forgets the places of a namespace that a node has dropped, which would add up else."""
        self._strip(lambda p: p.root == root and p.node_id == node_id, EndReason.EVICTED)

    def expect_purge(self, root: bytes) -> None:
        """Removals in this namespace are a purge, until something is stored in it again."""
        self._purged.add(root)

    def forget_purge(self, root: bytes) -> None:
        """Nobody has this namespace any more."""
        self._purged.discard(root)

    # Questions

    def locate(self, joined: bytes) -> Located:
        """The fastest place of each leading key, in runs as long as they can be."""
        runs: list[Run] = []
        keys = split_keys(joined)
        first, candidates, last = 0, list[Place](), self._never
        for i, key in enumerate(keys):
            held = self._table.get(key, self._never)
            if held is last and candidates:
                continue
            if not held.places:
                break
            best = held.best
            if not (common := [p for p in candidates if p in best]):
                if candidates:
                    runs.append(Run(first, i - first, candidates[0]))
                first, common = i, list(best)
            candidates, last = common, held
        else:
            i, held = len(keys), PlaceSet((), EndReason.COMPLETE)
        if candidates:
            runs.append(Run(first, i - first, candidates[0]))
        return Located(runs, i, held.reason)

    def copies(self, joined: bytes) -> Located:
        """Every place of each leading key, not only the fastest: runs overlap."""
        found = self.locate(joined)
        runs: list[Run] = []
        start: dict[Place, int] = {}
        for i, key in enumerate(split_keys(joined)[: found.found]):
            places = self._table[key].places
            for place in [p for p in start if p not in places]:
                runs.append(Run(start[place], i - start[place], place))
                del start[place]
            for place in places:
                start.setdefault(place, i)
        runs += [Run(at, found.found - at, place) for place, at in start.items()]
        runs.sort(key=lambda r: (r.first, r.place.tier, r.place.node_id, r.place.engine_id))
        return Located(runs, found.found, found.reason)

    def places_of(self, key: bytes) -> tuple[Place, ...]:
        """Where a key is, fastest tier first."""
        return self._table.get(key, self._never).places

    def counts(self) -> dict[Place, int]:
        """Blocks of each place that has any."""
        counts: dict[Place, int] = {}
        for group in self._all():
            for place in group.places if group.keys else ():
                counts[place] = counts.get(place, 0) + group.keys
        return counts

    def roots(self) -> set[bytes]:
        """Namespaces that have a block somewhere."""
        return {place.root for place in self.counts()}

    def namespace_keys(self) -> dict[bytes, int]:
        """Distinct keys of each namespace that has any."""
        counts: dict[bytes, int] = {}
        for group in self._all():
            if group.places and group.keys:
                root = group.places[0].root
                counts[root] = counts.get(root, 0) + group.keys
        return counts

    @property
    def entries(self) -> int:
        """Blocks, each counted once for every place that it is in."""
        return sum(group.keys * len(group.places) for group in self._all())

    @property
    def ghosts(self) -> int:
        """Keys without a place that are kept for their reason."""
        return len(self._table) - self._held

    def memory_bytes(self) -> int:
        """Estimate of the memory that the index takes."""
        groups = len(self._sets) + len(self._dead) + len(self._twins)
        return sys.getsizeof(self._table) + KEY_OBJECT_BYTES * len(self._table) + 1024 * groups

    def pager(self) -> Callable[[Callable[[Place], bool], bytes, int], "Page"]:
        """A function that lists blocks as they are now; it may run on another thread.

        ``pager()(wanted, after, limit)`` gives the keys above ``after`` in their order, each with
        its wanted places. A page ends after ``limit`` rows, but never between rows of one key.
        """
        table = self._table.copy()
        groups = {id(group): group.places for group in self._all() if group.places}

        def page(wanted: Callable[[Place], bool], after: bytes, limit: int) -> Page:
            rows_of = {g: tuple(filter(wanted, places)) for g, places in groups.items()}
            matching = (
                (key, rows_of[id(group)])
                for key, group in table.items()
                if key > after and rows_of.get(id(group))
            )
            return _cut(heapq.nsmallest(limit + 1, matching, key=lambda row: row[0]), limit)

        return page

    # Sets of places

    def _all(self) -> list[PlaceSet]:
        return [*self._sets.values(), *self._dead.values(), *self._twins]

    def _group(self, places: set[Place], reason: EndReason) -> PlaceSet:
        """The set of these places; without any keys at first, where there was none."""
        group = PlaceSet.of(places, reason)
        known = self._adopt(group)
        if known is group:
            self._emptied.append(group)
        return known

    def _add(self, old: PlaceSet, place: Place) -> PlaceSet:
        new = old
        if place not in old.places:
            new = self._group({*old.places, place}, EndReason.COMPLETE)
            new.sources[old] = place
        old.with_place[place] = new
        return new

    def _subtract(self, old: PlaceSet, place: Place, reason: EndReason) -> PlaceSet:
        new = old
        if place in old.places:
            new = self._group(set(old.places) - {place}, reason)
            new.sources[old] = place
        old.without[(place, reason)] = new
        return new

    def _sweep(self) -> None:
        """Forgets the sets that no key names, when there may be too many."""
        if len(self._emptied) <= EMPTY_SETS_MAX:
            return
        for group in {*self._emptied}:
            if group.keys:
                continue
            group.unlink()
            self._twins.discard(group)
            if group.places and self._sets.get(group.places) is group:
                del self._sets[group.places]
            elif not group.places and self._dead.get(group.reason) is group:
                del self._dead[group.reason]
        self._emptied.clear()

    def _strip(self, gone: Callable[[Place], bool], reason: EndReason) -> int:
        """Takes places out of every set that names them, without touching a key."""
        stripped = 0
        groups = [group for group in self._all() if group.keys]
        self._emptied.clear()
        self._sets, self._dead, self._twins = {}, {}, set()
        for group in groups:
            group.with_place.clear()
            group.without.clear()
            group.sources.clear()
            kept = tuple(p for p in group.places if not gone(p))
            stripped += group.keys * (len(group.places) - len(kept))
            if group.places and not kept:
                group.reason = reason
                self._held -= group.keys
            group.places = kept
            if self._adopt(group) is not group:
                self._twins.add(group)
        self._never.with_place.clear()
        used = {place for group in groups for place in group.places}
        self._places = {name: p for name, p in self._places.items() if p in used}
        return stripped

    def _adopt(self, group: PlaceSet) -> PlaceSet:
        """The one that is the set of these places already, or else ``group``."""
        if group.places:
            return self._sets.setdefault(group.places, group)
        return self._dead.setdefault(group.reason, group)

    # Ghosts

    def trim(self, keys: int = TRIM_KEYS) -> None:
        """Forgets up to ``keys`` ghosts of those that are too many.

        When there are, they are picked in one pass over the index, down to half of the limit, so
        that passes are rare. After a node was lost, calls are needed until all have been forgotten.
        """
        if not self._surplus and self.ghosts > self._ghosts_max:
            self._surplus = self._oldest_ghosts(self.ghosts - self._ghosts_max // 2)
        self._forget(self._surplus[-keys:])
        del self._surplus[-keys:]
        self._sweep()

    def _make_room(self) -> bool:
        """Forgets ghosts until a full index has room for a key; False where there are too few.

        They are found by a pass over the index, which is made only where it finds many: a full
        index without ghosts would go through all of itself for every key that it refuses.
        """
        while len(self._table) >= self._keys_max:
            if not self._surplus:
                if self.ghosts <= len(self._table) // PASS_KEYS_PER_GHOST:
                    return False
                self._surplus = self._oldest_ghosts(self.ghosts)[::-1]
            self._forget(self._surplus[-1:])
            del self._surplus[-1:]
        return True

    def _oldest_ghosts(self, count: int) -> list[bytes]:
        return [key for key, group in self._table.items() if not group.places][:count]

    def _forget(self, ghosts: list[bytes]) -> None:
        table = self._table
        for key in ghosts:
            group = table.get(key)
            if group is not None and not group.places:
                del table[key]
                group.keys -= 1
                if not group.keys:
                    self._emptied.append(group)


@dataclass(frozen=True, slots=True)
class Page:
    """Keys with their places, and the key to go on after; empty at the end."""

    rows: list[tuple[bytes, tuple[Place, ...]]]
    next: bytes


def _cut(rows: list[tuple[bytes, tuple[Place, ...]]], limit: int) -> Page:
    """As many leading keys as have ``limit`` rows together, at least one."""
    taken = total = 0
    for _, places in rows:
        if taken and total + len(places) > limit:
            break
        taken += 1
        total += len(places)
    more = taken < len(rows)
    return Page(rows[:taken], rows[taken - 1][0] if more else b"")

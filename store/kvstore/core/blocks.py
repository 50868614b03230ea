"""Blocks: the table, the space of both tiers, and what must change together when a block moves."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvstore.core.directory import DirectoryWriter
from kvstore.core.effects import BlockEvent, DropSsd, Effects
from kvstore.core.eviction import make_policy
from kvstore.core.ghosts import Ghosts
from kvstore.core.leases import OpenKeys
from kvstore.core.namespaces import Namespaces
from kvstore.core.slots import Offsets, SlotSpace
from kvstore.core.table import LIVE, DramState, Rows, SsdState, Table
from kvstore.core.types import CoreConfig, EndReason, Namespace, Tier, TierUsage

DRAM_COUNT = {
    DramState.FILLING: "pending",
    DramState.LOADING: "pending",
    DramState.LIVE: "live",
    DramState.DEAD: "quarantined",
}
SSD_COUNT = {
    SsdState.WRITING: "pending",
    SsdState.LIVE: "live",
    SsdState.DROPPING: "quarantined",
}


class Blocks:
    """Primitives on rows. Rows of one call are distinct and in the same state.

    ``out`` collects the effects of the running call of NodeCore. ``room_version`` grows whenever
    something happens that may let a slot be found where none was.
    """

    def __init__(self, config: CoreConfig, directory: DirectoryWriter) -> None:
        self.config = config
        self.directory = directory
        self.out = Effects()
        self.counters: dict[str, int] = {}
        self.table = Table(config.blocks_max)
        self.dram = SlotSpace(config.dram_bytes, config.segment_bytes)
        self.ssd = SlotSpace(config.ssd_bytes, config.segment_bytes) if config.ssd_bytes else None
        self.dram_policy = make_policy(config.dram_policy, self.table, Tier.DRAM)
        self.ssd_policy = make_policy(config.ssd_policy, self.table, Tier.SSD)
        self.ghosts = Ghosts(config.ghost_entries)
        self.namespaces = Namespaces(config.namespaces_max)
        self.slot_bytes = self.namespaces.slot_bytes
        self.shard_checksums: dict[int, tuple[int, ...]] = {}  # of blocks with several shards
        self.held_dead: set[int] = set()  # DEAD rows that a client may still write into
        self.drops_out = 0  # removals from the SSD index that are not durable yet
        self.room_version = 0
        self.open_keys = OpenKeys(config.open_keys_per_session_max, config.open_keys_max)

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to a counter."""
        if amount:
            self.counters[name] = self.counters.get(name, 0) + amount

    def namespaces_with_rows(self) -> set[Namespace]:
        """Those that have a block, a slot in use, or a place in a chain."""
        numbers = np.bincount(self.table.namespace[self.table.all_rows()])
        return {self.namespaces.numbered(number) for number in numbers.nonzero()[0].tolist()}

    def by_namespace(self, rows: Rows) -> Iterator[tuple[Namespace, Rows]]:
        """Rows by their namespace; mostly there is one."""
        numbers = self.table.namespace[rows]
        if len(rows) and (numbers == numbers[0]).all():
            yield self.namespaces.numbered(int(numbers[0])), rows
            return
        for number in np.unique(numbers).tolist():
            yield self.namespaces.numbered(number), rows[numbers == number]

    def event(self, rows: Rows, tier: Tier, *, stored: bool) -> None:
        """Tells the master."""
        for namespace, some in self.by_namespace(rows):
            keys = self.table.joined(some)
            self.out.events.append(BlockEvent(namespace.root, tier, keys, stored))

    def checksums(self, row: int) -> tuple[int, ...]:
        """Of all shards of a block."""
        several = self.shard_checksums.get(row)
        return several if several else (int(self.table.checksum[row]),)

    # DRAM

    def take_dram(self, rows: Rows, offsets: Offsets, state: int) -> None:
        """Gives allocated slots to rows, as FILLING or LOADING."""
        table = self.table
        table.dram_offset[rows] = offsets
        table.dram_state[rows] = state
        table.count_children(table.dram_children, rows, 1)

    def allocate_dram(self, slot_bytes: int, count: int) -> Offsets:
        """Up to ``count`` slots without evicting, under new generations."""
        offsets, changed = self.dram.allocate(slot_bytes, count)
        for offset, nbytes in changed:
            self.directory.bump_range(offset, nbytes)
        if len(offsets):
            self.directory.bump_generations(offsets)
        return offsets

    def move_dram(self, rows: Rows, source: int, target: int) -> None:
        """Changes the state of slots in use."""
        self.table.dram_state[rows] = target
        nbytes = int(self.slot_bytes[self.table.namespace[rows]].sum())
        self.dram.move(nbytes, DRAM_COUNT[source], DRAM_COUNT[target])

    def free_dram(self, rows: Rows, state: int) -> None:
        """Gives slots in that state back; the rows stay."""
        table = self.table
        for namespace, some in self.by_namespace(rows):
            self.dram.free(namespace.slot_bytes, table.dram_offset[some], DRAM_COUNT[state])
        table.count_children(table.dram_children, rows, -1)
        table.dram_offset[rows] = -1
        table.dram_state[rows] = DramState.NONE
        self.room_version += 1

    def show_dram(self, rows: Rows, source: int) -> None:
        """Makes complete blocks readable, in chain order: from here on they are visible."""
        keys = self.table.joined(rows)
        self.move_dram(rows, source, DramState.LIVE)
        self.dram_policy.inserted(rows, self.ghosts.was_evicted(keys))
        self.directory.publish(keys, Tier.DRAM)
        self.event(rows, Tier.DRAM, stored=True)
        self.room_version += 1

    def hide_dram(self, rows: Rows, reason: EndReason) -> None:
        """Takes readable blocks out of sight; their slots are still in use."""
        if not len(rows):
            return
        self.event(rows, Tier.DRAM, stored=False)
        on_ssd = self.table.ssd_state[rows] == SsdState.LIVE
        self._show_next(rows[on_ssd], rows[~on_ssd], reason)

    # SSD

    def take_ssd(self, rows: Rows, offsets: Offsets, state: int) -> None:
        """Gives allocated slots to rows, as WRITING or (at a restart) LIVE."""
        table = self.table
        table.ssd_offset[rows] = offsets
        table.ssd_state[rows] = state
        table.count_children(table.ssd_children, rows, 1)

    def show_ssd(self, rows: Rows, state: int = SsdState.WRITING) -> None:
        """The blocks are durable; in chain order. ``state`` is LIVE at a restart."""
        if not len(rows):
            return
        assert self.ssd is not None
        table = self.table
        nbytes = int(self.slot_bytes[table.namespace[rows]].sum())
        self.ssd.move(nbytes, SSD_COUNT[state], "live")
        table.ssd_state[rows] = SsdState.LIVE
        keys = table.joined(rows)
        self.ssd_policy.inserted(rows, self.ghosts.was_evicted(keys))
        absent = rows[table.dram_state[rows] != DramState.LIVE]
        if len(absent):
            self.directory.publish(table.joined(absent), Tier.SSD)
        self.event(rows, Tier.SSD, stored=True)
        self.room_version += 1

    def free_ssd(self, rows: Rows, state: int) -> None:
        """Gives slots in that state back; the rows stay."""
        assert self.ssd is not None
        table = self.table
        for namespace, some in self.by_namespace(rows):
            self.ssd.free(namespace.slot_bytes, table.ssd_offset[some], SSD_COUNT[state])
        if state == SsdState.WRITING:
            table.count_children(table.ssd_children, rows, -1)
        elif state == SsdState.DROPPING:
            self.drops_out -= len(rows)
        table.ssd_offset[rows] = -1
        table.ssd_state[rows] = SsdState.NONE
        self.room_version += 1

    def drop_ssd(self, rows: Rows, reason: EndReason, state: int = SsdState.LIVE) -> None:
        """Asks for the removal of copies from the index; readable ones are out of sight at once.

        ``state`` is WRITING for copies that became durable after their block was purged.
        """
        if not len(rows):
            return
        assert self.ssd is not None
        table = self.table
        nbytes = int(self.slot_bytes[table.namespace[rows]].sum())
        self.ssd.move(nbytes, SSD_COUNT[state], "quarantined")
        table.ssd_state[rows] = SsdState.DROPPING
        table.count_children(table.ssd_children, rows, -1)
        if state == SsdState.LIVE:
            self.event(rows, Tier.SSD, stored=False)
            in_dram = table.dram_state[rows] == DramState.LIVE
            self._show_next(rows[:0], rows[~in_dram], reason)
        triples = zip(
            rows.tolist(), table.key_list(rows), table.ssd_offset[rows].tolist(), strict=True
        )
        self.out.drops.extend(DropSsd(*triple) for triple in triples)
        self.drops_out += len(rows)
        self.room_version += 1

    def forget_checksums(self, rows: Rows) -> None:
        """Blocks that are about to be filled anew, or have no copy, prove nothing any more."""
        if self.shard_checksums:
            for row in rows.tolist():
                self.shard_checksums.pop(row, None)

    def discard(self, rows: Rows) -> None:
        """Forgets those of the rows that have no copy and no child."""
        if self.shard_checksums:
            table = self.table
            gone = (table.dram_state[rows] == 0) & (table.ssd_state[rows] == 0)
            self.forget_checksums(rows[gone])
        self.table.discard_empty(rows)

    # Observation

    def usage(self) -> list[TierUsage]:
        """Space of the tiers of this node."""
        tiers = [(Tier.DRAM, self.dram)]
        if self.ssd:
            tiers.append((Tier.SSD, self.ssd))
        return [
            TierUsage(
                tier,
                space.capacity_bytes,
                space.free_bytes,
                space.live_bytes,
                space.pending_bytes,
                space.quarantined_bytes,
                int((self.table.state_in(tier) == DramState.LIVE).sum()),
            )
            for tier, space in tiers
        ]

    def inventory(self, chunk_keys: int) -> Iterator[tuple[bytes, Tier, bytes]]:
        """(root, tier, keys) of all readable blocks; a block in both tiers comes twice."""
        for tier in (Tier.DRAM, Tier.SSD):
            live = self.table.state_in(tier) == LIVE
            for namespace in self.namespaces.all():
                rows = np.flatnonzero(live & (self.table.namespace == namespace.number))
                for first in range(0, len(rows), chunk_keys):
                    keys = self.table.joined(rows[first : first + chunk_keys])
                    yield namespace.root, tier, keys

    def check(self) -> None:
        """AssertionError unless rows, slots and counts of bytes agree."""
        table = self.table
        table.check()
        self.namespaces_with_rows()
        self._check_tier(self.dram, table.dram_state, table.dram_offset, DRAM_COUNT)
        if self.ssd:
            self._check_tier(self.ssd, table.ssd_state, table.ssd_offset, SSD_COUNT)

    def _check_tier(
        self,
        space: SlotSpace,
        state: npt.NDArray[np.uint8],
        offset: npt.NDArray[np.int64],
        counts: dict[int, str],
    ) -> None:
        rows = np.flatnonzero(state)
        slots = self.slot_bytes[self.table.namespace[rows]]
        sums = {"pending": 0, "live": 0, "quarantined": 0}
        for value, name in counts.items():
            sums[name] += int(slots[state[rows] == value].sum())
        counted = {name: getattr(space, f"{name}_bytes") for name in sums}
        assert sums == counted, f"rows say {sums}, the accounts say {counted}"
        space.check({size: offset[rows[slots == size]] for size in np.unique(slots).tolist()})
        assert (offset[state == 0] == -1).all(), "a row without a slot has an offset"

    def _show_next(self, on_ssd: Rows, gone: Rows, reason: EndReason) -> None:
        if len(on_ssd):
            self.directory.publish(self.table.joined(on_ssd), Tier.SSD)
        if len(gone):
            keys = self.table.joined(gone)
            self.directory.unpublish(keys)
            self.ghosts.add(keys, reason)

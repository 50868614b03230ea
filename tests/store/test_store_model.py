"""F17: index, slots and leases of NodeCore against a model of plain dicts, by hypothesis."""

import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kvstore.core.effects import Effects, Granted, Reserved
from kvstore.core.types import AckLevel, EndReason, ReserveStatus, Tier

from tests.faults.columns import SEED, size
from tests.faults.daemons import PLANTED
from tests.faults.report import Record, finish
from tests.store.rig import BLOCK, FakeDisk, Rig, chain, content, offsets_of

EXAMPLES = size(200, 5_000, 5_000)
STEPS = size(50, 100, 100)
DRAM_BLOCKS, SSD_BLOCKS = 12, 16
CHAINS = [chain(f"model {i}", 10) for i in range(3)]
CHAINS.append([a[:8] + b[8:] for a, b in zip(CHAINS[0], chain("twin", 10), strict=True)])
chains = st.sampled_from(CHAINS)
counts = st.integers(1, 10)
sessions = st.sampled_from([1, 2])
places = st.integers(0, 10**6)
TOTALS = Counter[str]()
Lease = tuple[int, dict[int, int]]  # session, and the slot by index of what it holds


class Model:
    """What is where, and who holds it."""

    def __init__(self) -> None:
        self.dram: dict[bytes, int] = {}  # readable blocks and their slots
        self.ssd: set[bytes] = set()
        self.filling: dict[bytes, tuple[int, int]] = {}  # slot and session, not committed
        self.loading: dict[bytes, int] = {}
        self.leases: dict[int, Lease] = {}
        self.put_once: set[bytes] = set()
        self.purging = False

    def pinned(self) -> set[int]:
        """Slots under a lease."""
        return {slot for _, held in self.leases.values() for slot in held.values()}

    def stored(self, tier: int, key: bytes) -> None:
        """A block became readable: it was filled and committed, or loaded."""
        if tier == Tier.SSD:
            self.ssd.add(key)
        elif key in self.filling:
            assert key in self.put_once, "visible before its commit"
            self.dram[key] = self.filling.pop(key)[0]
        else:
            self.dram[key] = self.loading.pop(key)
        slots = [*self.dram.values(), *(slot for slot, _ in self.filling.values())]
        assert len(set(slots)) == len(slots), "two blocks in one slot"

    def removed(self, tier: int, key: bytes) -> None:
        """A block left a tier: never from under a lease, unless an administrator purges."""
        if tier == Tier.SSD:
            self.ssd.discard(key)
        else:
            slot = self.dram.pop(key)
            assert self.purging or slot not in self.pinned(), "evicted under a lease"

    def statuses(self, keys: list[bytes], busy: set[int]) -> list[set[int]]:
        """What a reserve may answer for each key; a slot that is DEAD keeps its key busy."""
        free = {int(ReserveStatus.SLOT), int(ReserveStatus.FULL)}
        have = self.dram.keys() | self.ssd | self.loading.keys()
        return [
            {int(ReserveStatus.HAVE)}
            if key in have
            else {int(ReserveStatus.BUSY)}
            if key in self.filling
            else free | ({int(ReserveStatus.BUSY)} if busy else set())
            for key in keys
        ]

    def leading(self, keys: list[bytes]) -> list[int]:
        """Slots of the leading blocks in DRAM."""
        slots = []
        for key in keys:
            if key not in self.dram:
                break
            slots.append(self.dram[key])
        return slots


class ModelRig(Rig):
    """A rig whose events the model hears."""

    def __init__(self, disk: FakeDisk | None = None) -> None:
        self.model = Model()
        self.asked: tuple[int, list[bytes]] = (0, [])  # session and keys of the last reserve
        super().__init__(DRAM_BLOCKS, SSD_BLOCKS, disk=disk)
        self.model.put_once.update(self.model.ssd)

    def apply(self, effects: Effects) -> None:
        self.model.loading.update({op.key: op.dram_offset for op in effects.reads})
        for event in effects.events:
            change = self.model.stored if event.stored else self.model.removed
            for at in range(0, len(event.keys), 32):
                change(event.tier, event.keys[at : at + 32])
        number, keys = self.asked
        for reply in effects.replies:
            runs = reply.body.runs if isinstance(reply.body, Reserved) else []
            for index, slot in offsets_of(runs).items():
                self.model.filling[keys[index]] = (slot, number)
        super().apply(effects)


class StoreMachine(RuleBasedStateMachine):
    """Two sessions, a disk that ends requests in any order, evictions, purges, crashes."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = ModelRig()
        self.open_sessions: set[int] = set()
        self.lost: set[int] = set()
        self.reserves: dict[int, tuple[int, list[bytes]]] = {}
        self.names: dict[int, list[bytes]] = {}  # keys of each lease
        self.commits: dict[int, tuple[int, list[bytes]]] = {}  # not answered yet
        TOTALS["examples"] += 1

    @property
    def model(self) -> Model:
        return self.rig.model

    def session(self, number: int) -> bool:
        """Opens it if need be; False if it is lost, and what it holds not settled yet."""
        if number not in self.open_sessions and number not in self.lost:
            self.rig.open(number)
            self.open_sessions.add(number)
        return number in self.open_sessions

    def dead(self) -> set[int]:
        """Slots of blocks that were purged, or failed, while somebody may touch them."""
        usage = self.rig.core.usage()[0]
        return {0} if usage.quarantined_bytes else set()

    @rule(number=sessions, keys=chains, first=st.integers(0, 4), count=counts)
    def reserve(self, number: int, keys: list[bytes], first: int, count: int) -> None:
        if not self.session(number):
            return
        part = keys[first : first + count]
        allowed = self.model.statuses(part, self.dead())
        self.rig.asked = (number, part)
        parent = keys[first - 1] if first else b""
        request = self.rig.reserve(part, session=number, parent=parent)
        reply = self.rig.reserved(request, number)
        full = reply.statuses.find(ReserveStatus.FULL)
        for place, status in enumerate(reply.statuses[: full if full >= 0 else None]):
            assert status in allowed[place], (place, status, allowed[place])
        self.rig.fill(request, part, number)
        if reply.runs:
            self.reserves[request] = (number, part)

    @precondition(lambda self: self.reserves)
    @rule(at=places, share=st.sampled_from([0.5, 1.0, 1.0]), durable=st.booleans())
    def commit(self, at: int, share: float, durable: bool) -> None:
        request = list(self.reserves)[at % len(self.reserves)]
        number, keys = self.reserves.pop(request)
        slots = sorted(offsets_of(self.rig.reserved(request, number).runs))
        chosen = slots[: int(len(slots) * share)]
        self.model.put_once.update(keys[i] for i in chosen)
        if chosen:
            level = AckLevel.SYNCED if durable else AckLevel.MEMORY
            commit = self.rig.commit(request, keys, chosen, session=number, level=level)
            self.commits[commit] = (number, [keys[i] for i in chosen])
        for index in slots[len(chosen) :]:
            del self.model.filling[keys[index]]
        self.rig.apply(self.rig.core.abort(number, self.rig.next_id(), request, [], self.rig.now))

    @rule(number=sessions, keys=chains, count=counts)
    def acquire(self, number: int, keys: list[bytes], count: int) -> None:
        if not self.session(number):
            return
        expected = self.model.leading(keys[:count])
        request = self.rig.acquire(keys[:count], session=number)
        granted = self.rig.granted(request, number)
        assert [granted[i] for i in range(len(granted))] == expected
        end = self.rig.end(request, number)
        assert end is not None
        assert (end.reason == EndReason.COMPLETE) == (len(expected) == count)
        if len(expected) < count:
            stopped = keys[len(expected)]
            assert (end.reason == EndReason.TIMED_OUT) == (stopped in self.model.ssd)
            # What explains a miss knows keys by their first 64 bits.
            never = all(key[:8] != stopped[:8] for key in self.model.put_once)
            assert not never or end.reason == EndReason.NEVER_STORED
        if granted:
            self.model.leases[request] = (number, granted)
            self.names[request] = keys

    @precondition(lambda self: self.model.leases)
    @rule(at=places, first=st.integers(0, 9), count=st.integers(0, 3))
    def release(self, at: int, first: int, count: int) -> None:
        request = list(self.model.leases)[at % len(self.model.leases)]
        number, held = self.model.leases[request]
        if number not in self.open_sessions:
            return
        last = first + count if count else 10
        kept = {i: slot for i, slot in held.items() if not first <= i < last}
        if kept:
            self.model.leases[request] = (number, kept)
        else:
            del self.model.leases[request]
        self.rig.release(request, first, count, session=number)

    @rule(keys=chains, count=counts)
    def get(self, keys: list[bytes], count: int) -> None:
        """A reader that waits for the disk: everything that the directory shows, or no space."""
        self.rig.open(9)
        held = len(self.rig.directory.match(b"".join(keys[:count])))
        granted, reason = self.rig.get(keys[:count], session=9)
        assert granted == held or reason == EndReason.NO_SPACE
        self.rig.apply(self.rig.core.session_settled(9, self.rig.now))

    @precondition(lambda self: self.rig.disk.pending)
    @rule(at=places, fails=st.sampled_from([False, False, False, True]))
    def disk(self, at: int, fails: bool) -> None:
        disk = self.rig.disk
        if not fails or at % disk.pending >= len(disk.reads) + len(disk.writes):
            self.rig.disk_step(lambda n: at % n)
        elif at % disk.pending < len(disk.reads):
            self.rig.end_read(disk.reads[at % disk.pending], fail=True)
        else:
            self.rig.end_writes([disk.writes[at % disk.pending - len(disk.reads)]], fail=True)
        self.forget_loads()

    @rule(tier=st.sampled_from([Tier.DRAM, Tier.SSD]), drop=st.booleans(), keys=chains)
    def evict(self, tier: Tier, drop: bool, keys: list[bytes]) -> None:
        self.rig.apply(self.rig.core.evict(tier, b"".join(keys[3:]), 3 * BLOCK, drop, 0.0)[0])

    @rule(sure=st.integers(0, 3))
    def purge(self, sure: int) -> None:
        if not sure:
            self.model.purging = True
            self.rig.apply(self.rig.core.purge(None, self.rig.now)[0])
            self.model.purging = False

    @rule(number=sessions)
    def lose_stream(self, number: int) -> None:
        """The process may live: what it holds stays held."""
        if number in self.open_sessions:
            self.open_sessions.remove(number)
            self.lost.add(number)
            self.rig.apply(self.rig.core.session_quarantined(number, self.rig.now))
            self.reserves = {r: v for r, v in self.reserves.items() if v[0] != number}

    @rule(number=sessions)
    def settle(self, number: int) -> None:
        """The process has ended: all of it is free."""
        for request in [r for r, (who, _) in self.model.leases.items() if who == number]:
            del self.model.leases[request]
        for key in [k for k, (_, who) in self.model.filling.items() if who == number]:
            del self.model.filling[key]
        self.reserves = {r: v for r, v in self.reserves.items() if v[0] != number}
        self.rig.apply(self.rig.core.session_settled(number, self.rig.now))
        self.open_sessions.discard(number)
        self.lost.discard(number)

    @rule(sure=st.integers(0, 3))
    def crash(self, sure: int) -> None:
        """The node starts again over what its disk has."""
        if sure:
            return
        disk = self.rig.disk
        disk.reads.clear()
        disk.writes.clear()
        disk.drops.clear()
        put_once = self.model.put_once
        self.rig = ModelRig(disk)
        assert self.model.ssd == set(disk.index), "the restart found other blocks"
        self.model.put_once = put_once & self.model.ssd
        self.open_sessions.clear()
        self.lost.clear()
        self.reserves.clear()
        self.commits.clear()

    def forget_loads(self) -> None:
        """Of reads that have ended badly."""
        out = {op.key for op in self.rig.disk.reads}
        self.model.loading = {k: v for k, v in self.model.loading.items() if k in out}

    @invariant()
    def adds_up(self) -> None:
        TOTALS["steps"] += 1
        self.forget_loads()
        self.rig.check()
        disk, model = self.rig.disk, self.model
        used = {*model.dram.values(), *(slot for slot, _ in model.filling.values())}
        used |= model.pinned() | set(model.loading.values())
        used |= {op.dram_offset for op in disk.reads} | {op.dram_offset for op in disk.writes}
        usage = self.rig.core.usage()[0]
        assert usage.capacity_bytes - usage.free_bytes == BLOCK * len(used), "slots leak"
        assert usage.live_bytes == BLOCK * len(model.dram)
        for request, (number, held) in model.leases.items():
            for index, slot in held.items():
                data = bytes(self.rig.pool[slot : slot + BLOCK])
                assert data == content(self.names[request][index]), "wrong under a lease"
            self.check_generations(number, request, held)

        self.check_acknowledged()

    def check_acknowledged(self) -> None:
        """I3: what is called synced was in the index."""
        for commit, (number, keys) in list(self.commits.items()):
            if (levels := self.rig.levels(commit, number)) is not None:
                del self.commits[commit]
                synced = [k for k, level in zip(keys, levels, strict=True) if level > 1]
                assert self.rig.disk.durable.issuperset(synced), "acknowledged and not durable"

    def check_generations(self, number: int, request: int, held: dict[int, int]) -> None:
        """I4: no slot under a lease was given out again."""
        for body in self.rig.answers[number, request]:
            if isinstance(body, Granted):
                slots = list(offsets_of(body.runs).values())
                now = self.rig.directory.generations_at(np.array(slots, dtype=np.int64))
                same = now == np.frombuffer(body.generations, dtype="<u4")
                changed = {slot for slot, is_same in zip(slots, same, strict=True) if not is_same}
                assert not changed & set(held.values()), "a slot under a lease was given out"

    def teardown(self) -> None:
        for number in (1, 2):
            self.settle(number)
        for _ in range(2):
            self.rig.settle()
            self.rig.tick(100.0)
        self.adds_up()
        assert self.rig.core.idle()
        for usage in self.rig.core.usage():
            assert usage.pending_bytes == usage.quarantined_bytes == 0


@pytest.mark.timeout(size(300, 3600, 3600))
def test_F17_the_core_agrees_with_the_model(record_property: Record) -> None:
    TOTALS.clear()
    run_state_machine_as_test(
        hypothesis_seed(SEED)(StoreMachine),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=(Phase.generate,) if os.environ.get(PLANTED) else tuple(Phase),
            suppress_health_check=list(HealthCheck),
        ),
    )
    finish(record_property, "F17 model", **TOTALS, lost=0, wrong=0)

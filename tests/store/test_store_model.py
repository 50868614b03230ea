"""F17: NodeCore against a plain dict, by hypothesis."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from kvstore.core.types import AckLevel, EndReason, ReserveStatus, Tier

from tests.store.rig import Rig, chain

CHAINS = [chain(f"model {i}", 10) for i in range(3)]
chains = st.sampled_from(CHAINS)
counts = st.integers(1, 10)


class StoreMachine(RuleBasedStateMachine):
    """What was put and not evicted reads back; what never was put does not."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(12, 16)
        self.rig.open()
        self.put_once: set[bytes] = set()
        self.leases: list[tuple[int, list[bytes]]] = []

    @rule(keys=chains, count=counts, durable=st.booleans())
    def put(self, keys: list[bytes], count: int, durable: bool) -> None:
        level = AckLevel.SYNCED if durable else AckLevel.MEMORY
        statuses = self.rig.put(keys[:count], level=level)
        stored = [k for k, s in zip(keys, statuses, strict=False) if s == ReserveStatus.SLOT]
        self.put_once.update(stored)

    @rule(keys=chains, count=counts)
    def put_half(self, keys: list[bytes], count: int) -> None:
        reserve = self.rig.reserve(keys[:count])
        slots = self.rig.fill(reserve, keys)
        some = slots[: len(slots) // 2]
        if some:
            self.rig.commit(reserve, keys, some)
            self.put_once.update(keys[i] for i in some)
        self.rig.apply(self.rig.core.abort(1, self.rig.next_id(), reserve, [], 0.0))

    @rule(keys=chains, count=counts)
    def get(self, keys: list[bytes], count: int) -> None:
        held = len(self.rig.directory.match(b"".join(keys[:count])))
        granted, reason = self.rig.get(keys[:count])
        assert self.put_once.issuperset(keys[:granted])
        assert granted == held or reason == EndReason.NO_SPACE
        assert (reason == EndReason.COMPLETE) == (granted == count)
        if granted < count and reason != EndReason.NO_SPACE:
            never = keys[granted] not in self.put_once
            assert (reason == EndReason.NEVER_STORED) == never

    @rule(keys=chains, count=counts)
    def hold(self, keys: list[bytes], count: int) -> None:
        self.leases.append((self.rig.acquire(keys[:count]), keys))

    @rule()
    def let_go(self) -> None:
        if self.leases:
            self.rig.release(self.leases.pop(0)[0])

    @rule(at=st.integers(0, 10**6))
    def disk(self, at: int) -> None:
        if self.rig.disk.pending:
            self.rig.disk_step(lambda n: at % n)

    @rule(tier=st.sampled_from([Tier.DRAM, Tier.SSD]), drop=st.booleans())
    def evict(self, tier: Tier, drop: bool) -> None:
        self.rig.apply(self.rig.core.evict(tier, b"", 3 * 4096, drop, 0.0)[0])

    @rule()
    def client_dies(self) -> None:
        self.rig.apply(self.rig.core.session_settled(1, 0.0))
        self.leases.clear()
        self.rig.open()

    @invariant()
    def adds_up(self) -> None:
        self.rig.check()
        for request, keys in self.leases:
            self.rig.check_bytes(request, keys)

    def teardown(self) -> None:
        self.client_dies()
        self.rig.settle()
        assert self.rig.core.idle()
        for usage in self.rig.core.usage():
            assert usage.pending_bytes == usage.quarantined_bytes == 0


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

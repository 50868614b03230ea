"""NodeCore after a restart, and blocks that several clients fill in shards."""

import numpy as np
import pytest
import xxhash
from kvstore.core.effects import Committed
from kvstore.core.ssd_record import SsdRecord
from kvstore.core.tiering import FREE_AHEAD_SHARE
from kvstore.core.types import AckLevel, EndReason, ReserveStatus, Tier
from kvstore.errors import PreconditionError

from tests.store.rig import BLOCK, Rig, chain, content, offsets_of

A, B, C = chain("a", 16), chain("b", 16), chain("c", 16)
SLOT, BUSY = ReserveStatus.SLOT, ReserveStatus.BUSY


def restart(rig: Rig) -> Rig:
    again = Rig(
        rig.core.config.dram_bytes // BLOCK, rig.core.config.ssd_bytes // BLOCK, disk=rig.disk
    )
    again.disk.reads.clear()
    again.disk.writes.clear()
    again.open()
    return again


def test_I3_restart_is_warm_and_keeps_the_order_of_chains(tiers: Rig) -> None:
    tiers.put(A[4:8], parent=A[3])
    tiers.settle()
    tiers.put(A[:4])
    tiers.settle()
    tiers.disk.drops.clear()
    again = restart(tiers)
    again.check()
    assert again.directory.match(b"".join(A[:8])).tolist() == [Tier.SSD] * 8
    assert again.get(A[:8]) == (8, EndReason.COMPLETE)
    again.put(B[:8])
    again.settle()
    for name in range(3):
        again.put(chain(str(name), 8))
        again.settle()
    assert len(again.disk.index) == 32 - 32 // FREE_AHEAD_SHARE
    again.check()
    again.settle()


def test_I3_restart_of_a_full_table_keeps_every_block() -> None:
    rig = Rig(8, 8, blocks_max=8)
    rig.open()
    rig.put(A[:8], level=AckLevel.SYNCED)
    rig.settle()
    assert len(rig.disk.index) == 8
    again = Rig(8, 8, blocks_max=8, disk=rig.disk)
    again.open()
    assert not again.disk.drops
    assert again.get(A[:8]) == (8, EndReason.COMPLETE)


def test_I8_damaged_records_are_refused(tiers: Rig) -> None:
    tiers.put(A[:4])
    tiers.settle()
    good = SsdRecord.decode(A[0], tiers.disk.index[A[0]])
    index = tiers.disk.index
    index[B[0]] = good._replace(key=B[0], ssd_offset=5 * BLOCK + 1).encode()
    index[B[1]] = good._replace(key=B[1], ssd_offset=1 << 40).encode()
    index[B[2]] = good._replace(key=B[2], nbytes=0, root=bytes(32)).encode()
    index[B[3]] = good._replace(key=B[3], nbytes=3 * BLOCK, ssd_offset=9 * BLOCK).encode()
    index[B[4]] = good._replace(key=B[4], sequence=0).encode()  # an older block in the same slot
    index[C[0]] = good._replace(key=C[0], ssd_offset=20 * BLOCK, parent=C[1]).encode()
    index[C[1]] = good._replace(key=C[1], ssd_offset=21 * BLOCK, parent=C[0]).encode()
    again = restart(tiers)
    assert {op.key for op in again.disk.drops} == set(B[:5])
    again.settle()
    again.check()
    assert again.get(A[:4]) == (4, EndReason.COMPLETE)
    assert again.core.counters["restore_refused_records"] == 5
    effects, removal = again.core.evict(Tier.SSD, b"".join(C[:2]), 0, True, 0.0)
    assert removal.blocks == 2, "a ring of parents must not hold its blocks for ever"
    again.apply(effects)
    with pytest.raises(PreconditionError):
        again.core.restore([])


def test_restore_without_an_ssd_tier_uses_nothing() -> None:
    record = SsdRecord(A[0], bytes([1] * 32), bytes(32), BLOCK, 0, (1,), 1)
    rig = Rig(4)
    rig.apply(rig.core.restore([record]))
    assert rig.disk.drops[0].row == -1
    rig.settle()


def reserve_shards(rig: Rig, keys: list[bytes], count: int = 2) -> list[int]:
    return [rig.reserve(keys, session=1 + i, shard=(i, count)) for i in range(count)]


def test_I2_block_in_shards_is_visible_when_all_are_committed(tiers: Rig) -> None:
    tiers.open(2)
    first, second = reserve_shards(tiers, A[:2])
    one, two = tiers.reserved(first, 1), tiers.reserved(second, 2)
    assert one.statuses == two.statuses == bytes([SLOT, SLOT])
    assert offsets_of(one.runs) == offsets_of(two.runs)
    sums = []
    for index, offset in offsets_of(one.runs).items():
        tiers.pool[offset : offset + BLOCK] = content(A[index])
        half = content(A[index])[: BLOCK // 2]
        sums.append(xxhash.xxh3_64_intdigest(half))
    data = np.array(sums, dtype="<u8").tobytes()
    tiers.apply(tiers.core.commit(1, 50, first, [0, 1], data, AckLevel.SYNCED, 0.0))
    assert tiers.levels(50, 1) is None
    assert tiers.get(A[:2])[0] == 0
    tiers.apply(tiers.core.commit(2, 51, second, [1, 0], data[8:] + data[:8], AckLevel.MEMORY, 0.0))
    assert tiers.answers[2, 51] == [Committed(bytes([AckLevel.MEMORY] * 2))]
    assert tiers.get(A[:2])[0] == 2
    assert [len(op.record.checksums) for op in tiers.disk.writes] == [2, 2]
    tiers.settle()
    assert tiers.levels(50, 1) == bytes([AckLevel.SYNCED] * 2)
    effects, _ = tiers.core.evict(Tier.DRAM, b"", 0, False, 0.0)
    tiers.apply(effects)
    assert tiers.get(A[:2]) == (2, EndReason.COMPLETE)
    tiers.disk.drops.clear()
    assert restart(tiers).get(A[:2]) == (2, EndReason.COMPLETE)


def test_lost_shard_fails_the_block_and_frees_it(tiers: Rig) -> None:
    tiers.open(2)
    first, second = reserve_shards(tiers, A[:2])
    tiers.fill(first, A)
    waiting = tiers.commit(first, A, [0], session=1, level=AckLevel.SYNCED)
    tiers.apply(tiers.core.session_settled(1, 0.0))
    tiers.check()
    late = tiers.commit(second, A, [1, 0], session=2)
    assert tiers.levels(late, 2) == bytes([0, AckLevel.MEMORY]), "block 0 had its first shard"
    assert tiers.get(A[:2], session=2) == (1, EndReason.NEVER_STORED)
    assert tiers.core.usage()[0].free_bytes == 7 * BLOCK
    tiers.settle()
    assert tiers.levels(waiting) == bytes([AckLevel.SYNCED])


def test_shard_that_nobody_brings_is_given_up(tiers: Rig) -> None:
    reserve = tiers.reserve(A[:1], shard=(0, 2))
    commit = tiers.commit(reserve, A, [0], level=AckLevel.SYNCED)
    assert tiers.core.next_deadline() == 30.0
    tiers.tick(30.0)
    assert tiers.levels(commit) == b"\0"
    assert tiers.core.usage()[0].free_bytes == 8 * BLOCK


def test_shards_are_joined_once_and_with_the_same_number(tiers: Rig) -> None:
    for session in (2, 3, 4):
        tiers.open(session)
    reserve_shards(tiers, A[:1])
    assert tiers.reserved(tiers.reserve(A[:1], session=3, shard=(1, 2)), 3).statuses == bytes(
        [BUSY]
    )
    assert tiers.reserved(tiers.reserve(A[:1], session=3, shard=(2, 3)), 3).statuses == bytes(
        [BUSY]
    )
    assert tiers.put(A[:1], session=4) == bytes([BUSY])
    tiers.apply(tiers.core.session_quarantined(1, 0.0))
    tiers.check()
    tiers.apply(tiers.core.session_quarantined(2, 0.0))
    assert tiers.core.usage()[0].quarantined_bytes == BLOCK
    tiers.apply(tiers.core.session_settled(1, 0.0))
    assert tiers.core.usage()[0].quarantined_bytes == BLOCK
    tiers.apply(tiers.core.session_settled(2, 0.0))
    assert tiers.core.usage()[0].free_bytes == 8 * BLOCK

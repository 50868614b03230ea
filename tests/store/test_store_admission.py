"""Which blocks are written to SSD, and what becomes of those that are passed over."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from kvstore.core.admission.base import SsdSpace
from kvstore.core.admission.reuse import ReusePolicy
from kvstore.core.admission.sketch import COUNT_MAX, FrequencySketch
from kvstore.core.effects import End
from kvstore.core.table import Table
from kvstore.core.types import AckLevel, EndReason, ReserveStatus, Tier
from kvstore.errors import ConfigError

from tests.store.rig import BLOCK, Rig, chain

A, B = chain("a", 16), chain("b", 16)
SLOT, HAVE = ReserveStatus.SLOT, ReserveStatus.HAVE


def rig_with(admission: str, dram_blocks: int = 8, ssd_blocks: int = 32) -> Rig:
    rig = Rig(dram_blocks, ssd_blocks, ssd_admission=admission)
    rig.open()
    return rig


def written(rig: Rig) -> list[bytes]:
    """Keys on their way to SSD, in order; they arrive."""
    keys: dict[bytes, None] = {}
    while rig.disk.pending:
        keys.update(dict.fromkeys(op.key for op in rig.disk.writes))
        rig.disk_step()
    return list(keys)


def commit_shard(rig: Rig, keys: list[bytes], shard: int, level: AckLevel) -> int:
    reserve = rig.reserve(keys, shard=(shard, 2))
    rig.fill(reserve, keys)
    return rig.commit(reserve, keys, list(range(len(keys))), level=level)


def test_second_use_writes_what_is_acquired_in_chain_order() -> None:
    rig = rig_with("second-use")
    rig.put(A[:4])
    assert not rig.disk.writes
    assert rig.core.idle()
    rig.get(A[:3])
    assert written(rig) == A[:3]
    assert not rig.disk.writes, "a third use writes nothing again"
    rig.get(A[:4])
    assert written(rig) == A[3:4]
    rig.check()


def test_second_use_writes_what_is_stored_again() -> None:
    rig = rig_with("second-use")
    rig.put(A[:4])
    assert rig.put(A[:4]) == bytes([HAVE] * 4)
    assert written(rig) == A[:4]
    rig.check()


def test_what_was_passed_over_leaves_dram_counted_and_its_miss_says_why() -> None:
    rig = rig_with("second-use")
    rig.put(A[:4])
    rig.put(B[:8])
    assert rig.core.counters["evicted_not_admitted_blocks"] == 4
    assert not rig.core.counters.get("evicted_without_ssd_blocks")
    assert rig.end(rig.acquire(A[:4])) == End(0, EndReason.NOT_ADMITTED)
    assert rig.put(A[:4]) == bytes([SLOT] * 4)
    assert written(rig) == A[:4], "it came back: that is its second use"
    rig.put(chain("c", 8))
    assert rig.get(A[:4]) == (4, EndReason.COMPLETE)
    rig.check()


@pytest.mark.parametrize("admission", ["second-use", "reuse"])
@pytest.mark.parametrize("level", [AckLevel.PERSISTED, AckLevel.SYNCED])
def test_I3_a_durable_write_is_always_admitted_behind_its_parents(
    admission: str, level: AckLevel
) -> None:
    rig = rig_with(admission, ssd_blocks=12)
    if admission == "reuse":  # which takes everything while there is room
        rig.put_on_ssd_only(B[:12])
        rig.get(B[:6])
        rig.get(B[6:12])
    rig.put(A[:3])
    assert not rig.disk.writes
    reserve = rig.reserve(A[3:5], parent=A[2])
    rig.fill(reserve, A[3:5])
    commit = rig.commit(reserve, A[3:5], [0, 1], level=level)
    assert written(rig) == A[:5]
    assert rig.levels(commit) == bytes([AckLevel.SYNCED] * 2)
    rig.check()


def test_a_shard_that_asks_for_durability_is_enough() -> None:
    rig = rig_with("second-use")
    first = commit_shard(rig, A[:2], 0, AckLevel.SYNCED)
    second = commit_shard(rig, A[:2], 1, AckLevel.MEMORY)
    assert rig.levels(second) == bytes([AckLevel.MEMORY] * 2)
    assert written(rig) == A[:2]
    assert rig.levels(first) == bytes([AckLevel.SYNCED] * 2)
    rig.check()


def test_a_parent_that_comes_after_its_child_is_admitted_with_it() -> None:
    rig = rig_with("second-use")
    parent = rig.reserve(A[:2])
    reserve = rig.reserve(A[2:3], parent=A[1])
    rig.fill(reserve, A[2:3])
    rig.commit(reserve, A[2:3], [0], level=AckLevel.SYNCED)
    rig.fill(parent, A[:2])
    rig.commit(parent, A[:2], [0, 1])
    assert sorted(written(rig)) == sorted(A[:3])
    rig.check()


def test_an_administrators_eviction_writes_what_was_passed_over() -> None:
    rig = rig_with("second-use")
    rig.put(A[:4])
    effects, removal = rig.core.evict(Tier.DRAM, b"", 0, False, rig.now)
    rig.apply(effects)
    assert (removal.blocks, removal.waiting) == (0, 4)
    assert written(rig) == A[:4]
    assert rig.core.usage()[0].blocks == 0
    assert rig.get(A[:4]) == (4, EndReason.COMPLETE)
    rig.check()


def test_reuse_takes_everything_while_there_is_room_then_what_is_used_more() -> None:
    rig = rig_with("reuse", dram_blocks=8, ssd_blocks=8)
    rig.put_on_ssd_only(A[:8])
    rig.put(B[:4])
    assert not rig.disk.writes, "as often used as what it would displace"
    rig.get(B[:4])
    assert written(rig) == B[:4]
    assert rig.core.usage()[1].blocks == 8
    assert rig.get(A[:8]) == (4, EndReason.EVICTED)
    rig.put(chain("c", 8))
    assert rig.core.counters["evicted_ssd_blocks"] == 4
    rig.check()


def test_reuse_cuts_a_chain_where_its_blocks_stop_being_worth_it() -> None:
    rig = rig_with("reuse", dram_blocks=16, ssd_blocks=8)
    rig.put_on_ssd_only(A[:8])
    rig.get(A[:8])
    rig.put(B[:4])
    for _ in range(3):
        rig.get(B[:2])
    assert written(rig) == B[:2]
    rig.check()


def test_an_unknown_policy_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="'lru'; take one of always, second-use, reuse"):
        Rig(4, 4, ssd_admission="lru")


def test_sketch_counts_bounds_and_forgets() -> None:
    sketch = FrequencySketch(1 << 12)
    words = np.frombuffer(b"".join(chain("w", 64)), dtype="<u8").reshape(-1, 4)
    assert sketch.estimate(words).max() == 0
    for _ in range(3):
        sketch.add(words[:32], 10_000)
    assert sketch.estimate(words[:32]).min() == 3
    assert sketch.estimate(words[32:]).max() <= 1
    for _ in range(40):
        sketch.add(words[:1], 10_000)
    assert sketch.estimate(words[:1])[0] == COUNT_MAX
    sketch.add(words[:1], 1)
    assert sketch.estimate(words[:2]).tolist() == [COUNT_MAX // 2, 1]


@pytest.mark.parametrize(
    ("rows", "width"), [(100, 1 << 18), (1_000_000, 1 << 20), (1 << 40, 1 << 24)]
)
def test_the_sketch_of_a_large_table_is_large(rows: int, width: int) -> None:
    table = cast(Table, SimpleNamespace(rows_max=rows))
    assert ReusePolicy(table, cast(SsdSpace, None))._sketch._counts.shape == (4, width)


def test_without_an_ssd_nothing_is_asked_about() -> None:
    rig = Rig(4, 0, ssd_admission="second-use")
    rig.open()
    rig.put(A[:4])
    rig.get(A[:4])
    rig.put(B[:4])
    assert rig.get(A[:4]) == (0, EndReason.EVICTED)
    assert rig.core.usage()[0].live_bytes == 4 * BLOCK
    rig.check()


def test_a_durable_reserve_has_blocks_written_that_were_passed_over() -> None:
    """Nothing waits for it: a block that is here already is not acknowledged again."""
    rig = Rig(16, 4, ssd_admission="reuse")
    rig.open()
    wanted, keys = chain("wanted", 4), chain("have", 4)
    rig.put(wanted)
    rig.settle()
    for _ in range(8):
        rig.get(wanted)
    rig.put(keys)

    def reserve(level: AckLevel) -> bytes:
        request = rig.next_id()
        joined = b"".join(keys)
        rig.apply(rig.core.reserve(1, request, rig.ns, joined, b"", 0.0, rig.now, level=level))
        rig.settle()
        return rig.reserved(request).statuses

    have = bytes([ReserveStatus.HAVE]) * 4
    assert reserve(AckLevel.MEMORY) == have
    assert not rig.disk.durable & set(keys), "others are used more"
    assert reserve(AckLevel.SYNCED) == have
    assert rig.disk.index.keys() == set(keys)
    rig.check()

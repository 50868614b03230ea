"""Space on SSD that is freed ahead of writes: enough for them, and not more."""

import numpy as np
from kvstore.core.spec import CacheSpec
from kvstore.core.table import SsdState
from kvstore.core.tiering import FREE_AHEAD_SHARE
from kvstore.core.types import AckLevel, EndReason, Namespace

from tests.store.rig import Rig, chain

MIB = 1 << 20


class TwoSizes:
    """A node with blocks of two sizes on 16 MiB of SSD."""

    def __init__(self, first_bytes: int, second_bytes: int) -> None:
        self.rig = Rig(dram_blocks=512, ssd_blocks=16 * MIB // 4096, segment_bytes=MIB // 4)
        self.rig.open()
        specs = (CacheSpec.raw(str(size), block_bytes=size) for size in (first_bytes, second_bytes))
        self.first, self.second = (self.rig.core.open_namespace(spec, "default") for spec in specs)

    def put(self, namespace: Namespace, name: str, count: int) -> None:
        self.rig.ns, self.rig.namespace = namespace.id, namespace
        self.rig.block_bytes = namespace.block_bytes
        self.rig.put(chain(name, count))
        self.rig.settle()

    def on_ssd(self, namespace: Namespace) -> int:
        table = self.rig.core._blocks.table
        mine = table.namespace == namespace.number
        return int(np.count_nonzero(mine & (table.ssd_state == SsdState.LIVE)))


def test_writes_at_a_full_ssd_find_space_that_earlier_ones_made_for_them() -> None:
    rig = Rig(dram_blocks=256, ssd_blocks=256)
    rig.open()
    for number in range(8):
        rig.put(chain(f"old{number}", 32))
        rig.settle()
    free = 256 - len(rig.disk.index)
    assert free == 256 // FREE_AHEAD_SHARE
    rig.put(chain("new", free))
    assert len(rig.disk.writes) == free  # at once, before any removal has ended
    assert len(rig.disk.drops) == free
    rig.settle()
    rig.core.check_integrity()
    assert 256 - len(rig.disk.index) == free


def test_small_blocks_take_the_bytes_of_large_ones_and_not_their_number() -> None:
    two = TwoSizes(64 << 10, 4 << 10)
    for number in range(32):
        two.put(two.first, f"large{number}", 8)
    for number in range(6):
        two.put(two.second, f"small{number}", 1)
    two.rig.check()
    assert two.on_ssd(two.second) == 6
    assert two.on_ssd(two.first) >= 256 - 256 // FREE_AHEAD_SHARE - 4  # and one span of 4


def test_a_new_size_gets_the_space_that_an_old_one_leaves() -> None:
    two = TwoSizes(8 << 10, 4 << 10)
    for number in range(64):
        two.put(two.first, f"old{number}", 32)
    for number in range(100):
        two.put(two.second, f"new{number}", 16)
    two.rig.core.check_integrity()
    assert two.on_ssd(two.second) == 1600
    assert two.on_ssd(two.first) >= 2048 - 2048 // FREE_AHEAD_SHARE - 800 - 32


def test_the_space_of_a_purged_size_is_used_before_anything_is_evicted() -> None:
    two = TwoSizes(8 << 10, 4 << 10)
    for number in range(60):
        two.put(two.first, f"old{number}", 32)
    effects, _ = two.rig.core.purge(two.first.root, two.rig.now)
    two.rig.apply(effects)
    two.rig.settle()
    before = two.rig.core.counters.get("evicted_ssd_blocks", 0)
    for number in range(100):
        two.put(two.second, f"new{number}", 16)
    assert two.on_ssd(two.second) == 1600
    assert two.rig.core.counters.get("evicted_ssd_blocks", 0) == before


def test_free_space_is_no_reason_for_reuse_admission_to_take_one_time_blocks() -> None:
    rig = Rig(dram_blocks=64, ssd_blocks=256, ssd_admission="reuse")
    rig.open()
    hot = [chain(f"hot{number}", 16) for number in range(15)]
    for keys in hot:
        rig.put(keys)
        rig.settle()
    for _ in range(3):
        for keys in hot:
            rig.get(keys)
    for number in range(60):
        rig.put(chain(f"once{number}", 8))
        rig.settle()
    assert all(key in rig.disk.index for keys in hot for key in keys)


def test_I3_a_write_does_not_push_out_the_block_that_it_continues() -> None:
    rig = Rig(dram_blocks=512, ssd_blocks=256)
    rig.open()
    parent, child = chain("parent", 1), chain("child", 1)
    rig.put(parent)
    rig.settle()
    for number in range(239):
        rig.put(chain(f"other{number}", 1))
        rig.settle()
    assert 256 - len(rig.disk.index) == 256 // FREE_AHEAD_SHARE
    rig.put(child, parent=parent[0], level=AckLevel.SYNCED)
    rig.settle()
    assert {parent[0], child[0]} <= rig.disk.index.keys()
    again = Rig(dram_blocks=512, ssd_blocks=256, disk=rig.disk)
    again.open()
    assert again.get(parent + child) == (2, EndReason.COMPLETE)

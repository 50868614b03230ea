import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path

import pytest
from kvstore.core.effects import DropSsd, ReadSsd, WriteSsd
from kvstore.core.ssd_columns import SsdColumns, decode_many
from kvstore.core.types import IoOutcome
from kvstore.faultpoint import enable_faultpoints
from kvstore.node import ssd_file, ssd_index, ssd_writer
from kvstore.node.ssd_file import SsdFile
from kvstore.node.ssd_index import SsdIndex

from tests.node.ssd_rig import CAPACITY, PAGE, ROOT, Rig, arm


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    enable_faultpoints({})


@pytest.mark.parametrize("direct", [True, False])
async def test_blocks_come_back_as_they_were(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
        monkeypatch.setattr(os, "O_DIRECT", 0, raising=False)
    rig = Rig(tmp_path)
    sizes = [65536, 65536, 100, 5000, 8192, 65536]
    data = [os.urandom(size) for size in sizes]
    offsets = [0, 65536, 131072, 135168, 1 << 20, 2 << 20]
    ops = [
        rig.write(i, d, o, shards=4 if i == 4 else 1)
        for i, (d, o) in enumerate(zip(data, offsets, strict=True))
    ]
    rig.tier.submit_writes(ops)
    await rig.drain()
    assert rig.reports.kept == ops
    rig.clear()
    rig.tier.submit_reads([rig.read(op) for op in ops])
    await rig.drain()
    assert set(rig.reports.reads.values()) == {IoOutcome.OK}
    for op, expected in zip(ops, data, strict=True):
        assert bytes(rig.memory[op.dram_offset : op.dram_offset + op.nbytes]) == expected
    rig.close()


async def test_I8_index_is_found_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    ops = [rig.write(i, os.urandom(PAGE), i * PAGE) for i in range(8)]
    rig.tier.submit_writes(ops)
    await rig.drain()
    rig.tier.submit_drops([DropSsd(3, ops[3].key, ops[3].ssd_offset)])
    rig.index.add_namespace(ROOT, b"spec")
    await rig.drain()
    assert [drop.row for drop in rig.reports.dropped] == [3]
    rig.close()
    rig = Rig(tmp_path)
    records, usable = decode_many(*rig.index.entries())
    assert usable.all()
    assert sorted(records) == sorted(op.record for op in ops if op.row != 3)
    assert rig.index.namespaces() == {ROOT: b"spec"}
    rig.close()


async def test_removal_and_new_write_of_a_key_keep_their_order(rig: Rig) -> None:
    old, new = rig.write(1, os.urandom(PAGE), 0), rig.write(1, os.urandom(PAGE), PAGE)
    rig.tier.submit_writes([old])
    await rig.drain()
    rig.tier.submit_drops([DropSsd(1, old.key, 0)])
    rig.tier.submit_writes([new])
    await rig.drain()
    records, _ = decode_many(*rig.index.entries())
    assert records == [new.record]


@pytest.mark.parametrize("shard", [0, 3])
async def test_I1_flipped_bit_is_corrupt(rig: Rig, shard: int) -> None:
    op, other = rig.write(0, os.urandom(65536), 0, shards=4), rig.write(1, os.urandom(PAGE), 65536)
    rig.tier.submit_writes([op, other])
    await rig.drain()
    with (rig.folder / ssd_file.DATA_NAME).open("r+b") as file:
        file.seek(shard * 16384 + 77)
        byte = file.read(1)[0]
        file.seek(shard * 16384 + 77)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())
    rig.tier.submit_reads([rig.read(op), rig.read(other)])
    await rig.drain()
    assert rig.reports.reads == {0: IoOutcome.CORRUPT, 1: IoOutcome.OK}


def corrupt_in_dram(rig: Rig, op: WriteSsd) -> WriteSsd:
    rig.memory[op.dram_offset + 9] ^= 1
    return op


async def write_corrupt(rig: Rig, *rows: int) -> list[WriteSsd]:
    """Writes one page a row, all with a flipped bit in DRAM."""
    ops = [rig.write(row, os.urandom(PAGE), row * PAGE) for row in rows]
    for op in ops:
        corrupt_in_dram(rig, op)
    rig.tier.submit_writes(ops)
    await rig.drain()
    return ops


@pytest.fixture
def chance(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """As if many writes waited: of those that follow, a sample is verified; 0: this is one."""
    monkeypatch.setattr(ssd_writer, "GROUPS_BEHIND", 0)

    def set_to(number: int) -> None:
        monkeypatch.setattr("random.randrange", lambda _count: number)

    return set_to


async def test_I1_while_writes_keep_up_all_are_verified(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.randrange", lambda _count: 1)
    ops = await write_corrupt(rig, *range(16))
    assert sorted(rig.reports.corrupt, key=attrgetter("row")) == ops
    assert not rig.reports.kept
    assert rig.index.entries() == ([], [])


async def test_I1_while_writes_queue_up_a_sample_is_verified(
    rig: Rig, chance: Callable[[int], None]
) -> None:
    chance(1)
    unseen = await write_corrupt(rig, 1, 2)
    assert sorted(rig.reports.kept, key=attrgetter("row")) == unseen
    chance(0)
    seen = await write_corrupt(rig, 3)
    assert rig.reports.corrupt == seen


async def test_I1_after_a_corrupt_block_all_are_verified(
    rig: Rig, chance: Callable[[int], None]
) -> None:
    chance(0)
    found = await write_corrupt(rig, 0)
    assert rig.tier.verifies_all
    chance(1)
    found += await write_corrupt(rig, *range(1, 16, 2))
    assert sorted(rig.reports.corrupt, key=attrgetter("row")) == found
    assert not rig.reports.kept


DATA_FAILS = ",".join(f"ssd.data:eio@{n}" for n in (1, 2, 3))


@pytest.mark.parametrize("fault", [DATA_FAILS, "ssd.sync:eio", "ssd.index:eio"])
async def test_I1_a_corrupt_block_is_corrupt_whatever_fails_besides(rig: Rig, fault: str) -> None:
    good = rig.write(1, os.urandom(PAGE), PAGE)
    bad = corrupt_in_dram(rig, rig.write(2, os.urandom(PAGE), 2 * PAGE))
    arm(fault)
    rig.tier.submit_writes([good, bad])
    await rig.drain()
    assert (rig.reports.corrupt, rig.reports.failed) == ([bad], [good])
    assert not rig.reports.kept


async def test_read_that_fails_is_told_apart_from_corruption(rig: Rig) -> None:
    op = rig.write(0, os.urandom(PAGE), 0)
    rig.tier.submit_writes([op])
    await rig.drain()
    arm("ssd.read:eio")
    rig.tier.submit_reads([rig.read(op)])
    await rig.drain()
    assert rig.reports.reads == {0: IoOutcome.FAILED}
    rig.tier.submit_reads([ReadSsd(5, bytes(32), CAPACITY, 0, PAGE, (0,))])
    await rig.drain()
    assert rig.reports.reads[5] is IoOutcome.FAILED


async def test_I2_data_that_was_not_written_is_not_indexed(rig: Rig) -> None:
    ops = [rig.write(i, os.urandom(PAGE), i * 2 * PAGE) for i in range(3)]
    arm("ssd.data:eio@2")
    rig.tier.submit_writes(ops)
    await rig.drain()
    assert len(rig.reports.failed) == 1
    assert len(rig.reports.kept) == 2
    records, _ = decode_many(*rig.index.entries())
    assert {r.key for r in records} == {op.key for op in rig.reports.kept}
    assert not rig.tier.failed


async def test_I3_after_a_failed_fdatasync_nothing_is_acknowledged(rig: Rig) -> None:
    arm("ssd.sync:eio")
    for row in range(2):
        rig.tier.submit_writes([rig.write(row, os.urandom(PAGE), row * PAGE)])
        await rig.drain()
    assert [op.row for op in rig.reports.failed] == [0, 1]
    assert "fdatasync" in rig.tier.failed
    assert rig.index.entries() == ([], [])


async def test_I3_failed_index_commit_acknowledges_nothing(rig: Rig) -> None:
    first = rig.write(0, os.urandom(PAGE), 0)
    rig.tier.submit_writes([first])
    await rig.drain()
    arm("ssd.index:eio")
    rig.tier.submit_drops([DropSsd(0, first.key, 0)])
    rig.tier.submit_writes([rig.write(1, os.urandom(PAGE), PAGE)])
    await rig.drain()
    assert [op.row for op in rig.reports.failed] == [1]
    assert rig.reports.dropped == []
    assert [op.row for op in rig.reports.stuck] == [0]
    assert "index commit" in rig.tier.failed
    assert decode_many(*rig.index.entries())[0] == [first.record]


async def test_I3_index_without_room_is_tried_again(rig: Rig) -> None:
    first = rig.write(0, os.urandom(PAGE), 0)
    rig.tier.submit_writes([first])
    await rig.drain()
    arm("ssd.index:enospc@1,ssd.index:enospc@2,ssd.index:enospc@4")
    rig.tier.submit_drops([DropSsd(0, first.key, 0)])
    await rig.drain()
    assert [op.row for op in rig.reports.dropped] == [0]
    assert (rig.tier.failed, rig.tier.full) == ("", "")
    rig.tier.submit_writes([rig.write(1, os.urandom(PAGE), PAGE)])
    await rig.drain()
    assert [op.row for op in rig.reports.failed] == [1]
    assert rig.tier.full
    rig.tier.submit_writes([second := rig.write(2, os.urandom(PAGE), PAGE)])
    await rig.drain()
    assert rig.reports.kept == [first, second]
    assert (rig.tier.failed, rig.tier.full) == ("", "")
    assert rig.index.entries() == ([second.key], [second.record.encode()])


def fail_at(monkeypatch: pytest.MonkeyPatch, file: SsdFile, name: str, bad: int) -> None:
    """Has every request that touches byte ``bad`` end with EIO."""
    real = getattr(file, name)

    def guarded(buffers: Sequence[memoryview], offset: int) -> None:
        if offset <= bad < offset + sum(len(buffer) for buffer in buffers):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(buffers, offset)

    monkeypatch.setattr(file, name, guarded)


async def test_I3_a_bad_sector_costs_no_neighbour_that_is_read_with_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = [rig.write(row, os.urandom(PAGE), row * PAGE) for row in range(8)]
    rig.tier.submit_writes(ops)
    await rig.drain()
    fail_at(monkeypatch, rig.file, "read", 3 * PAGE + 5)
    rig.tier.submit_reads([rig.read(op) for op in ops])
    await rig.drain()
    outcomes = [rig.reports.reads[row] for row in range(8)]
    assert outcomes == [IoOutcome.OK] * 3 + [IoOutcome.FAILED] + [IoOutcome.OK] * 4


async def test_I3_a_bad_sector_costs_no_neighbour_that_is_written_with_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, rig.file, "write", 3 * PAGE + 5)
    ops = [rig.write(row, os.urandom(PAGE), row * PAGE) for row in range(8)]
    rig.tier.submit_writes(ops)
    await rig.drain()
    assert [op.row for op in rig.reports.failed] == [3]
    assert sorted(rig.index.entries()[0]) == sorted(op.key for op in ops if op.row != 3)


async def test_drain_waits_for_what_follows_from_a_report(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = [rig.write(row, os.urandom(PAGE), row * PAGE) for row in range(8)]
    due = ops[1:]
    real = rig.reports.writes_done

    def writes_done(done: Sequence[WriteSsd], ok: bool) -> None:
        real(done, ok)
        if due:
            rig.tier.submit_writes([due.pop(0)])

    monkeypatch.setattr(rig.reports, "writes_done", writes_done)
    rig.tier.submit_writes(ops[:1])
    await rig.drain()
    assert rig.reports.kept == ops


async def test_close_ends_with_work_queued(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for row in range(8):
        rig.tier.submit_writes([rig.write(row, os.urandom(65536), row * 65536)])
    rig.close()
    index = SsdIndex(tmp_path, CAPACITY // PAGE, "node-1")
    assert len(index.entries()[0]) == 8
    index.close()


@pytest.mark.parametrize("blocks", [6, 7])
async def test_the_index_is_read_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    monkeypatch.setattr(ssd_index, "BATCH_ENTRIES", 3)
    rig = Rig(tmp_path)
    ops = [rig.write(row, os.urandom(PAGE), row * PAGE) for row in range(blocks)]
    rig.tier.submit_writes(ops)
    await rig.drain()
    sizes = [len(batch) for batch in rig.index.batches()]
    columns, broken = SsdColumns.decoded(rig.index.batches(), rig.index.count())
    assert sizes == [3] * (blocks // 3) + [1] * (blocks % 3)
    assert not broken
    keys = [key for batch in rig.index.batches() for key, _ in batch]
    assert len(keys) == len(set(keys)) == rig.index.count() == blocks
    assert sorted(columns.entries["ssd_offset"].tolist()) == [row * PAGE for row in range(blocks)]
    rig.close()


async def test_the_first_block_of_a_stream_is_reported_while_the_others_are_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = [rig.write(row, bytes([row]) * PAGE, 2 * row * PAGE) for row in range(16)]
    rig.tier.submit_writes(ops)
    await rig.drain()
    real, go_on = rig.file.read, threading.Event()

    def read(buffers: Sequence[memoryview], offset: int) -> None:
        if offset:
            assert go_on.wait(20)
        real(buffers, offset)

    monkeypatch.setattr(rig.file, "read", read)
    rig.tier.submit_reads([rig.read(op) for op in ops])
    try:
        async with asyncio.timeout(20):
            await rig.reports.read.wait()
        assert rig.reports.reads == {0: IoOutcome.OK}
    finally:
        go_on.set()
    await rig.drain()
    assert rig.reports.reads == dict.fromkeys(range(16), IoOutcome.OK)

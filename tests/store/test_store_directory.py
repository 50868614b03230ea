"""The directory in shared memory, from both sides."""

import mmap
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvstore.core.directory import (
    ENTRIES_MAX,
    ENTRIES_MIN,
    HEADER_BYTES,
    PROBES_MAX,
    DirectoryReader,
    DirectoryWriter,
    entries_for,
)
from kvstore.core.types import Tier
from kvstore.errors import CorruptError, InvalidArgumentError, PreconditionError

from tests.store.rig import chain

PAGE = 4096
KEYS = chain("directory", 400)


def make(entries: int = 1024, pool: int = 64 * PAGE) -> tuple[DirectoryWriter, DirectoryReader]:
    buffer = bytearray(DirectoryWriter.size_bytes(entries, pool))
    writer = DirectoryWriter(buffer, entries=entries, pool_bytes=pool, instance=0xFEED)
    return writer, DirectoryReader(buffer)


def test_match_stops_at_the_first_miss() -> None:
    writer, reader = make()
    writer.publish(KEYS[:3] + KEYS[4:6], Tier.DRAM)
    writer.publish(KEYS[2:3], Tier.SSD)
    assert reader.match(b"".join(KEYS[:8])).tolist() == [2, 2, 3]
    assert reader.match(b"".join(KEYS[3:8])).tolist() == []
    assert reader.match(b"").tolist() == []
    assert reader.instance == 0xFEED
    assert reader.pool_bytes == 64 * PAGE
    with pytest.raises(InvalidArgumentError, match="multiple of 32"):
        reader.match(b"x" * 33)


def test_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    path.write_bytes(bytes(DirectoryWriter.size_bytes(1024, PAGE)))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        writer = DirectoryWriter(memoryview(mapped), entries=1024, pool_bytes=PAGE, instance=1)
        writer.publish(KEYS, Tier.DRAM)
        reader = DirectoryReader(path.read_bytes())
        del writer
    assert len(reader.match(b"".join(KEYS))) == 400


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20), st.integers(0, 3)), max_size=40))
def test_any_history_equals_a_dict(steps: list[tuple[int, int, int]]) -> None:
    writer, reader = make(entries=128)
    model: dict[bytes, int] = {}
    for first, count, tier in steps:
        keys = KEYS[first : first + count]
        if tier:
            writer.publish(keys, tier)
            model.update(dict.fromkeys(keys, tier))
        else:
            writer.unpublish(keys)
            for key in keys:
                model.pop(key, None)
        for key in KEYS[:80]:
            assert reader.match(key).tolist() == ([model[key]] if key in model else [])
        assert writer.live == len(model)


def test_removed_keys_leave_no_trace_that_slows_readers() -> None:
    writer, reader = make(entries=256)
    rng = random.Random(1)
    for turn in range(300):
        keys = chain(f"turn {turn}", 100)
        writer.publish(keys, Tier.DRAM)
        assert len(reader.match(b"".join(keys))) == 100
        rng.shuffle(keys)
        writer.unpublish(keys)
    assert (writer.live, writer.tombstones, writer.unpublished) == (0, 0, 0)


def test_I7_full_table_leaves_keys_out_and_counts_them() -> None:
    writer, reader = make(entries=128)
    writer.publish(KEYS[:200], Tier.DRAM)
    assert writer.live == 96
    assert writer.unpublished == 104
    assert len(reader.match(b"".join(KEYS[:200]))) == 96


def test_I11_keys_made_to_collide_are_bounded() -> None:
    writer, reader = make(entries=1024)
    same = [bytes(8) + key[8:] for key in KEYS[: PROBES_MAX + 40]]
    for key in same:
        writer.publish(key, Tier.DRAM)
    assert writer.live == PROBES_MAX
    assert writer.unpublished == 40
    assert len(reader.match(b"".join(same))) == PROBES_MAX
    writer.unpublish(same[:60])
    assert reader.match(same[100]).tolist() == [2]


def test_I1_only_the_whole_key_matches() -> None:
    writer, reader = make()
    writer.publish(KEYS[:1], Tier.DRAM)
    for byte in range(8, 32):
        other = bytearray(KEYS[0])
        other[byte] ^= 1
        assert not len(reader.match(bytes(other)))


def test_entry_that_is_being_written_is_a_miss() -> None:
    writer, reader = make()
    writer.publish(KEYS[:1], Tier.DRAM)
    words = writer._table[:, 0]
    words[np.flatnonzero(words)] |= np.uint64(1)
    assert not len(reader.match(KEYS[0]))


def test_generations_and_end() -> None:
    writer, reader = make()
    offsets = np.array([0, 2 * PAGE])
    assert writer.bump_generations(offsets).tolist() == [1, 1]
    writer.bump_range(PAGE, 2 * PAGE)
    assert reader.generations_at(np.array([0, PAGE, 2 * PAGE, 3 * PAGE])).tolist() == [1, 1, 2, 0]
    assert writer.generations_at(offsets).tolist() == [1, 2]
    assert not reader.closed
    writer.close_directory()
    assert reader.closed


def test_files_that_are_no_directory_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="power of two"):
        DirectoryWriter(bytearray(1), entries=100, pool_bytes=1, instance=1)
    with pytest.raises(CorruptError, match="no header"):
        DirectoryReader(b"")
    with pytest.raises(CorruptError, match="no kvstore directory"):
        DirectoryReader(bytes(HEADER_BYTES))
    buffer = bytearray(DirectoryWriter.size_bytes(1024, PAGE))
    DirectoryWriter(buffer, entries=1024, pool_bytes=PAGE, instance=1)
    with pytest.raises(CorruptError, match="contradicts"):
        DirectoryReader(bytes(buffer[:-1]))
    buffer[8] = 9
    with pytest.raises(PreconditionError, match="layout 9"):
        DirectoryReader(bytes(buffer))


def test_size_of_the_table() -> None:
    assert entries_for(0) == ENTRIES_MIN
    assert entries_for(1 << 30) == 4 * (1 << 30) // (16 << 10)
    assert entries_for(1 << 50) == ENTRIES_MAX

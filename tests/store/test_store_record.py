"""Records of blocks on SSD."""

import contextlib

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from kvstore.core.effects import Effects, ReadSsd
from kvstore.core.ssd_columns import SsdColumns, decode_many
from kvstore.core.ssd_record import HEAD_BYTES, ONE_SHARD_BYTES, PROOF_BYTES, SsdRecord
from kvstore.errors import CorruptError

from tests.store.rig import chain

KEYS = chain("record", 8)


def record(i: int, shards: int = 1) -> SsdRecord:
    sums = tuple(2**64 - 1 - s for s in range(shards))
    return SsdRecord(KEYS[i], KEYS[0], KEYS[i - 1], 5000 + i, i << 33, sums, 2**61 + i)


@pytest.mark.parametrize("shards", [1, 2, 256])
def test_record_comes_back(shards: int) -> None:
    value = record(3, shards).encode()
    assert len(value) == HEAD_BYTES + 8 * shards + PROOF_BYTES
    assert SsdRecord.decode(KEYS[3], value) == record(3, shards)


def test_many_records_of_one_shard_are_decoded_together() -> None:
    records = [record(i) for i in range(8)]
    decoded, usable = decode_many(KEYS, [r.encode() for r in records])
    assert decoded == records
    assert usable.all()
    assert decoded[0].root is decoded[7].root
    assert decode_many([], [])[0] == []


def test_I11_entries_that_are_no_records_are_left_out() -> None:
    good, shards = record(1).encode(), record(2, 3).encode()
    values = [good, shards, good[:-1], b"", good + bytes(8), good]
    decoded, usable = decode_many([*KEYS[1:6], b"short"], values)
    assert decoded == [record(1), record(2, 3)]
    assert usable.tolist() == [True, True, False, False, False, False]
    odd = bytearray(good)
    odd[HEAD_BYTES - 8] = 2
    assert not decode_many(KEYS[1:2], [reproved(KEYS[1], bytes(odd))])[1].any()


def test_records_of_several_batches_come_newest_first() -> None:
    shards = {2: 3, 5: 2}
    entries = [(KEYS[i], record(i, shards.get(i, 1)).encode()) for i in range(8)]
    entries[4] = (KEYS[4], b"no record")
    batches = [entries[:3], entries[3:5], entries[5:]]
    columns, broken = SsdColumns.decoded(batches, len(entries))
    assert broken == [KEYS[4]]
    assert columns.records() == [record(i, shards.get(i, 1)) for i in (7, 6, 5, 3, 2, 1, 0)]
    none, broken = SsdColumns.decoded([], 0)
    assert (len(none), broken, none.only_root()) == (0, [], None)


def reproved(key: bytes, value: bytes) -> bytes:
    """The value with the checksum that belongs to its other bytes."""
    body = value[:-PROOF_BYTES]
    return body + xxhash.xxh3_64_intdigest(key + body).to_bytes(PROOF_BYTES, "little")


@pytest.mark.parametrize("shards", [1, 2])
def test_I1_a_changed_record_is_refused_or_proves_other_bytes(shards: int) -> None:
    good = record(3, shards)
    value = good.encode()
    for at in range(len(value)):
        changed = value[:at] + bytes([value[at] ^ 0x11]) + value[at + 1 :]
        with pytest.raises(CorruptError):
            SsdRecord.decode(KEYS[3], changed)
        assert not decode_many(KEYS[3:4], [changed])[1].any()
        with contextlib.suppress(CorruptError):
            lie = SsdRecord.decode(KEYS[3], reproved(KEYS[3], changed))
            names_other_bytes = (lie.root, lie.nbytes) != (good.root, good.nbytes)
            assert not names_other_bytes or lie.checksums != good.checksums


def test_I1_a_record_under_another_key_proves_nothing() -> None:
    value = record(3).encode()
    with pytest.raises(CorruptError, match="another key"):
        SsdRecord.decode(KEYS[4], value)
    assert not decode_many(KEYS[4:5], [value])[1].any()
    moved = SsdRecord.decode(KEYS[4], reproved(KEYS[4], value))
    assert moved.checksums != record(3).checksums
    assert decode_many(KEYS[4:5], [reproved(KEYS[4], value)])[0] == [moved]


@given(st.binary(max_size=2 * ONE_SHARD_BYTES))
def test_I11_junk_is_corrupt_or_a_record(value: bytes) -> None:
    with contextlib.suppress(CorruptError):
        assert SsdRecord.decode(KEYS[0], value).encode()[:88] == value[:88]


def test_effects_of_several_calls_are_joined() -> None:
    one, two = Effects(), Effects()
    assert not one
    read = ReadSsd(0, KEYS[0], 0, 0, 1, (1,))
    two.reads.append(read)
    one.extend(two)
    assert one
    assert one.reads == [read]

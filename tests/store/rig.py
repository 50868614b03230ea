"""A node core over bytes in memory and a disk that finishes requests when it is told to."""

import hashlib
import random
from collections.abc import Callable, Mapping

import numpy as np
import xxhash
from kvstore.core.directory import DirectoryReader, DirectoryWriter
from kvstore.core.effects import (
    Body,
    Committed,
    DropSsd,
    Effects,
    End,
    Failed,
    Granted,
    ReadSsd,
    Reserved,
    WriteSsd,
)
from kvstore.core.keys import DEFAULT_TENANTS
from kvstore.core.node_core import NodeCore
from kvstore.core.spec import CacheSpec
from kvstore.core.ssd_record import SsdRecord
from kvstore.core.types import (
    AckLevel,
    CoreConfig,
    EndReason,
    IoOutcome,
    ReserveStatus,
    SlotRun,
    Tier,
)

BLOCK = 4096
Request = tuple[int, int]  # session, request


def chain(name: str, count: int) -> list[bytes]:
    """Keys of a chain; names with a common part before a slash share no key."""
    return [hashlib.sha256(f"{name}:{i}".encode()).digest() for i in range(count)]


def content(key: bytes, nbytes: int = BLOCK) -> bytes:
    """The only right bytes of a block."""
    return (key * (nbytes // 32 + 1))[:nbytes]


def offsets_of(runs: list[SlotRun]) -> dict[int, int]:
    """Pool offset by index into the request's keys."""
    return {run.first + i: run.offset + i * run.stride for run in runs for i in range(run.count)}


class FakeDisk:
    """SSD bytes and index; requests end in the order that the test wants."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)
        self.index: dict[bytes, bytes] = {}
        self.durable: set[bytes] = set()  # keys that were in the index at some time
        self.reads: list[ReadSsd] = []
        self.writes: list[WriteSsd] = []
        self.drops: list[DropSsd] = []

    @property
    def pending(self) -> int:
        return len(self.reads) + len(self.writes) + len(self.drops)


class Rig:
    """One core, its memory, and the answers that its clients got."""

    def __init__(
        self,
        dram_blocks: int = 16,
        ssd_blocks: int = 0,
        *,
        block_bytes: int = BLOCK,
        disk: FakeDisk | None = None,
        tenants: Mapping[str, bytes] = DEFAULT_TENANTS,
        **limits: int | float | str,
    ) -> None:
        slot = -(-block_bytes // 4096) * 4096
        dram_bytes, ssd_bytes = dram_blocks * slot, ssd_blocks * slot
        self.pool = bytearray(dram_bytes)
        entries = 4096
        buffer = bytearray(DirectoryWriter.size_bytes(entries, dram_bytes))
        writer = DirectoryWriter(buffer, entries=entries, pool_bytes=dram_bytes, instance=1)
        self.directory = DirectoryReader(buffer)
        limits.setdefault("segment_bytes", slot)
        config = CoreConfig(dram_bytes=dram_bytes, ssd_bytes=ssd_bytes, **limits)  # type: ignore[arg-type]
        self.core = NodeCore(config, writer, tenants)
        self.disk = disk or FakeDisk(ssd_bytes)
        self.now = 0.0
        self.block_bytes = block_bytes
        self.answers: dict[Request, list[Body]] = {}
        self.stored: dict[tuple[int, bytes], bool] = {}  # what the master was told, by tier and key
        self.last_request = 0
        self.shards: dict[Request, tuple[int, int]] = {}  # index and number, of a reserve
        if disk is not None:
            records = [SsdRecord.decode(k, v) for k, v in disk.index.items()]
            self.apply(self.core.restore(records))
        self.spec = CacheSpec.raw("test", block_bytes=block_bytes)
        self.namespace = self.core.open_namespace(self.spec, next(iter(tenants)))
        self.ns = self.namespace.id

    def apply(self, effects: Effects) -> None:
        for reply in effects.replies:
            self.answers.setdefault((reply.session_id, reply.request_id), []).append(reply.body)
        self.disk.reads += effects.reads
        self.disk.writes += effects.writes
        self.disk.drops += effects.drops
        for event in effects.events:
            for i in range(0, len(event.keys), 32):
                place = (int(event.tier), event.keys[i : i + 32])
                assert self.stored.get(place, False) != event.stored, "an event came twice"
                self.stored[place] = event.stored

    def next_id(self) -> int:
        self.last_request += 1
        return self.last_request

    # Requests

    def open(self, session: int = 1) -> None:
        self.core.open_session(session)

    def reserve(
        self,
        keys: list[bytes],
        *,
        session: int = 1,
        parent: bytes = b"",
        timeout_s: float = 0.0,
        shard: tuple[int, int] = (0, 1),
    ) -> int:
        request = self.next_id()
        self.shards[session, request] = shard
        effects = self.core.reserve(
            session,
            request,
            self.ns,
            b"".join(keys),
            parent,
            timeout_s,
            self.now,
            shard_index=shard[0],
            num_shards=shard[1],
        )
        self.apply(effects)
        return request

    def reserved(self, request: int, session: int = 1) -> Reserved:
        body = self.answers[session, request][-1]
        assert isinstance(body, Reserved), body
        return body

    def fill(self, request: int, keys: list[bytes], session: int = 1) -> list[int]:
        """Writes the blocks into their slots; the indices that have one."""
        body = self.reserved(request, session)
        places = offsets_of(body.runs)
        for index, offset in places.items():
            self.pool[offset : offset + self.block_bytes] = content(keys[index], self.block_bytes)
        slots = [i for i, s in enumerate(body.statuses) if s == ReserveStatus.SLOT]
        assert sorted(places) == slots
        return slots

    def commit(
        self,
        reserve: int,
        keys: list[bytes],
        indices: list[int],
        *,
        session: int = 1,
        level: AckLevel = AckLevel.MEMORY,
    ) -> int:
        request = self.next_id()
        shard, shards = self.shards[session, reserve]
        part = slice(*(self.block_bytes * end // shards for end in (shard, shard + 1)))
        blocks = [content(keys[i], self.block_bytes) for i in indices]
        sums = [xxhash.xxh3_64_intdigest(block[part]) for block in blocks]
        data = np.array(sums, dtype="<u8").tobytes()
        self.apply(self.core.commit(session, request, reserve, indices, data, level, self.now))
        return request

    def put(
        self,
        keys: list[bytes],
        *,
        session: int = 1,
        parent: bytes = b"",
        level: AckLevel = AckLevel.MEMORY,
    ) -> bytes:
        """Stores blocks; their statuses."""
        reserve = self.reserve(keys, session=session, parent=parent)
        statuses = self.reserved(reserve, session).statuses
        slots = self.fill(reserve, keys, session)
        if slots:
            self.commit(reserve, keys, slots, session=session, level=level)
        return statuses

    def put_on_ssd_only(self, keys: list[bytes]) -> None:
        """Stores a chain in parts, then evicts all of DRAM."""
        for first in range(0, len(keys), 4):
            self.put(keys[first : first + 4], parent=keys[first - 1] if first else b"")
            self.settle()
        effects, removal = self.core.evict(Tier.DRAM, b"", 0, False, self.now)
        self.apply(effects)
        assert removal.waiting == 0

    def acquire(self, keys: list[bytes], *, session: int = 1, timeout_s: float = 0.0) -> int:
        request = self.next_id()
        effects = self.core.acquire(
            session, request, self.ns, b"".join(keys), b"", timeout_s, self.now
        )
        self.apply(effects)
        return request

    def granted(self, request: int, session: int = 1) -> dict[int, int]:
        """Pool offset by index of the key, of all that was granted."""
        bodies = self.answers.get((session, request), [])
        runs = [run for body in bodies if isinstance(body, Granted) for run in body.runs]
        return offsets_of(runs)

    def end(self, request: int, session: int = 1) -> End | None:
        body = self.answers[session, request][-1] if (session, request) in self.answers else None
        return body if isinstance(body, End) else None

    def release(self, acquire: int, first: int = 0, count: int = 0, *, session: int = 1) -> None:
        self.apply(self.core.release(session, acquire, first, count, self.now))

    def get(self, keys: list[bytes], *, session: int = 1) -> tuple[int, EndReason]:
        """Reads the leading blocks, with the disk ending everything, and checks their bytes."""
        request = self.acquire(keys, session=session, timeout_s=60.0)
        while self.end(request, session) is None:
            if self.disk.pending:
                self.disk_step()
                continue
            self.tick(60.0)  # leases of others are on the slots that it waits for
            end = self.end(request, session)
            assert end is not None, "the acquire waits for nothing"
            assert end.reason == EndReason.NO_SPACE, "the acquire waited for nothing"
        self.check_bytes(request, keys, session)
        self.release(request, session=session)
        end = self.end(request, session)
        assert end is not None
        return end.granted, end.reason

    def check_bytes(self, acquire: int, keys: list[bytes], session: int = 1) -> None:
        for index, offset in self.granted(acquire, session).items():
            block = self.pool[offset : offset + self.block_bytes]
            assert block == content(keys[index], self.block_bytes), "wrong bytes"

    def failure(self, request: int, session: int = 1) -> Exception:
        body = self.answers[session, request][-1]
        assert isinstance(body, Failed), body
        return body.error

    def levels(self, request: int, session: int = 1) -> bytes | None:
        body = self.answers.get((session, request), [None])[-1]
        return body.levels if isinstance(body, Committed) else None

    # The disk

    def end_read(self, op: ReadSsd, *, fail: bool = False) -> None:
        self.disk.reads.remove(op)
        data = self.disk.data[op.ssd_offset : op.ssd_offset + op.nbytes]
        outcome = IoOutcome.OK
        if fail:
            outcome = IoOutcome.FAILED
        elif not _verified(bytes(data), op.checksums):
            outcome = IoOutcome.CORRUPT
        self.pool[op.dram_offset : op.dram_offset + op.nbytes] = data
        self.apply(self.core.reads_done([(op, outcome)], self.now))

    def end_writes(self, ops: list[WriteSsd], *, fail: bool = False) -> None:
        for op in ops:
            self.disk.writes.remove(op)
            data = self.pool[op.dram_offset : op.dram_offset + op.nbytes]
            if not _verified(bytes(data), op.record.checksums):
                self.apply(self.core.writes_corrupt([op], self.now))
                ops = [other for other in ops if other is not op]
                continue
            self.disk.data[op.ssd_offset : op.ssd_offset + op.nbytes] = data
            if not fail:
                self.disk.index[op.key] = op.record.encode()
                self.disk.durable.add(op.key)
        self.apply(self.core.writes_done(ops, not fail, self.now))

    def end_drop(self, op: DropSsd) -> None:
        self.disk.drops.remove(op)
        self.disk.index.pop(op.key, None)
        self.apply(self.core.drops_done([op], self.now))

    def disk_step(self, pick: Callable[[int], int] = lambda _n: 0) -> None:
        """Ends one request."""
        at = pick(self.disk.pending)
        if at < len(self.disk.reads):
            self.end_read(self.disk.reads[at])
        elif at < len(self.disk.reads) + len(self.disk.writes):
            self.end_writes([self.disk.writes[at - len(self.disk.reads)]])
        else:
            self.end_drop(self.disk.drops[at - len(self.disk.reads) - len(self.disk.writes)])

    def settle(self) -> None:
        """The disk ends everything."""
        while self.disk.pending:
            self.disk_step()

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.apply(self.core.tick(self.now))

    def check(self) -> None:
        """Integrity, and the directory and the master's view against the core."""
        self.core.check_integrity()
        held = {
            (int(tier), joined[i : i + 32])
            for _, tier, joined in self.core.inventory(3)
            for i in range(0, len(joined), 32)
        }
        assert held == {place for place, here in self.stored.items() if here}, "events are off"
        fastest: dict[bytes, int] = {}
        for tier, key in held:
            fastest[key] = min(tier, fastest.get(key, tier))
        for key in {key for _, key in self.stored}:
            tiers = self.directory.match(key).tolist()
            assert tiers == ([fastest[key]] if key in fastest else []), "the directory is off"


def _verified(data: bytes, checksums: tuple[int, ...]) -> bool:
    shards = len(checksums)
    bounds = [i * len(data) // shards for i in range(shards + 1)]
    return all(
        xxhash.xxh3_64_intdigest(data[a:b]) == checksum
        for a, b, checksum in zip(bounds, bounds[1:], checksums, strict=False)
    )


def shuffled(seed: int) -> Callable[[int], int]:
    """A pick for disk_step."""
    return random.Random(seed).randrange

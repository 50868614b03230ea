"""NodeCore under seeded random clients, faults, and a disk that ends requests in any order."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from kvstore.core.effects import Granted
from kvstore.core.types import AckLevel, EndReason, Tier

from tests.store.rig import BLOCK, FakeDisk, Rig, chain

SEEDS = int(os.environ.get("KVSTORE_SIM_SEEDS", "24"))
STEPS = 250


@dataclass
class Client:
    """What a client believes to hold."""

    session: int
    acquires: dict[int, list[bytes]] = field(default_factory=dict)
    reserves: dict[int, list[bytes]] = field(default_factory=dict)
    lost: bool = False


class Simulation:
    """One node, some clients, one disk. Every step ends with the checks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.chains = [chain(f"{seed} {name}", 12) for name in range(5)]
        # Two conversations that share their beginning.
        self.chains += [self.chains[0][:6] + chain(f"{seed} fork", 6)]
        self.ssd_blocks = self.random.choice([0, 6, 40])
        self.policy = self.random.choice(["lru", "s3fifo"])
        self.admission = self.random.choice(["always", "second-use", "reuse"])
        self.rig = self._rig(None)
        self.committed: set[bytes] = set()
        self.synced: dict[int, tuple[int, list[bytes]]] = {}  # commits that asked for SYNCED
        self.clients: list[Client] = []
        self.last_session = 0

    def _rig(self, disk: FakeDisk | None) -> Rig:
        return Rig(
            12,
            self.ssd_blocks,
            disk=disk,
            dram_policy=self.policy,
            ssd_policy=self.policy,
            ssd_admission=self.admission,
            reads_in_flight_max=3,
            writes_in_flight_max=4,
            shard_timeout_s=5.0,
        )

    def run(self, steps: int) -> None:
        weighted: list[tuple[int, Callable[[], None]]] = [
            (10, self.reserve),
            (14, self.commit),
            (3, self.abort),
            (14, self.acquire),
            (10, self.release),
            (3, self.prefetch),
            (2, self.lose_client),
            (2, self.settle_client),
            (1, self.evict),
            (1, self.purge),
            (30, self.disk),
            (8, self.tick),
            (1, self.restart),
        ]
        weights = [weight for weight, _ in weighted]
        actions = [action for _, action in weighted]
        for _ in range(steps):
            if len(self.clients) < 3:
                self.last_session += 1
                self.rig.open(self.last_session)
                self.clients.append(Client(self.last_session))
            self.random.choices(actions, weights)[0]()
            self.check()
        self.finish()

    # Clients

    def client(self) -> Client:
        return self.random.choice([c for c in self.clients if not c.lost] or self.clients)

    def part(self) -> tuple[list[bytes], bytes]:
        """Some consecutive keys of a chain, and the key before them."""
        keys = self.random.choice(self.chains)
        first = self.random.choice([0, 0, 0, self.random.randrange(len(keys))])
        last = self.random.randint(first + 1, len(keys))
        return keys[first:last], keys[first - 1] if first else b""

    def reserve(self) -> None:
        client = self.client()
        if client.lost:
            return
        keys, parent = self.part()
        timeout_s = self.random.choice([0.0, 2.0])
        shards = self.random.choice([1, 1, 1, 2])
        shard = (self.random.randrange(shards), shards)
        request = self.rig.reserve(
            keys, session=client.session, parent=parent, timeout_s=timeout_s, shard=shard
        )
        client.reserves[request] = keys

    def commit(self) -> None:
        client = self.client()
        for request, keys in list(client.reserves.items()):
            if client.lost or (client.session, request) not in self.rig.answers:
                continue
            slots = self.rig.fill(request, keys, client.session)
            some = self.random.sample(slots, self.random.randint(0, len(slots)))
            if some:
                level = self.random.choice([AckLevel.MEMORY, AckLevel.SYNCED])
                self.committed.update(keys[i] for i in some)
                commit = self.rig.commit(request, keys, some, session=client.session, level=level)
                if level == AckLevel.SYNCED:
                    self.synced[commit] = (client.session, [keys[i] for i in some])
            del client.reserves[request]
            rest = self.random.choice([[], [], slots])
            self.rig.apply(
                self.rig.core.abort(client.session, self.rig.next_id(), request, rest, 0.0)
            )

    def abort(self) -> None:
        client = self.client()
        if client.reserves and not client.lost:
            request = self.random.choice(list(client.reserves))
            del client.reserves[request]
            effects = self.rig.core.abort(
                client.session, self.rig.next_id(), request, [], self.rig.now
            )
            self.rig.apply(effects)

    def acquire(self) -> None:
        client = self.client()
        if not client.lost:
            keys, _ = self.part()
            timeout_s = self.random.choice([0.0, 1.0, 3.0])
            request = self.rig.acquire(keys, session=client.session, timeout_s=timeout_s)
            client.acquires[request] = keys

    def release(self) -> None:
        client = self.client()
        if client.acquires and not client.lost:
            request = self.random.choice(list(client.acquires))
            del client.acquires[request]
            if self.random.random() < 0.2:
                self.rig.release(request, 1, 2, session=client.session)
            self.rig.release(request, session=client.session)

    def prefetch(self) -> None:
        client = self.client()
        keys, parent = self.part()
        effects = self.rig.core.prefetch(
            client.session, self.rig.next_id(), self.rig.ns, b"".join(keys), parent, self.rig.now
        )
        self.rig.apply(effects)

    def lose_client(self) -> None:
        client = self.client()
        client.lost = True
        self.rig.apply(self.rig.core.session_quarantined(client.session, self.rig.now))

    def settle_client(self) -> None:
        client = self.random.choice(self.clients)
        self.clients.remove(client)
        self.rig.apply(self.rig.core.session_settled(client.session, self.rig.now))

    # The node's surroundings

    def evict(self) -> None:
        keys = self.random.choice([[], self.part()[0]])
        tier = self.random.choice([Tier.DRAM, Tier.SSD])
        drop = self.random.random() < 0.5
        limit = self.random.choice([0, 2 * BLOCK])
        self.rig.apply(self.rig.core.evict(tier, b"".join(keys), limit, drop, self.rig.now)[0])

    def purge(self) -> None:
        self.rig.apply(self.rig.core.purge(self.rig.namespace.root, self.rig.now)[0])

    def disk(self) -> None:
        disk = self.rig.disk
        for _ in range(self.random.randint(1, 3)):
            if not disk.pending:
                return
            fault = self.random.random()
            if fault < 0.02 and disk.reads:
                self.rig.end_read(self.random.choice(disk.reads), fail=True)
            elif fault < 0.04 and disk.reads:
                disk.data[self.random.choice(disk.reads).ssd_offset + 77] ^= 0x10
            elif fault < 0.05 and disk.writes:
                self.scribble()
            elif fault < 0.08 and disk.writes:
                self.rig.end_writes([self.random.choice(disk.writes)], fail=True)
            elif fault < 0.3 and len(disk.writes) > 1:
                self.rig.end_writes(disk.writes[:2])
            else:
                self.rig.disk_step(self.random.randrange)

    def scribble(self) -> None:
        """I1: what is about to be written changes in DRAM, where nobody reads it now."""
        write = self.random.choice(self.rig.disk.writes)
        slots = range(write.dram_offset, write.dram_offset + BLOCK)
        for client in self.clients:
            for request in client.acquires:
                if any(at in slots for at in self.rig.granted(request, client.session).values()):
                    return
        self.rig.pool[write.dram_offset + 40] ^= 1
        self.rig.end_writes([write])
        assert write.key not in self.rig.disk.index

    def tick(self) -> None:
        self.rig.tick(self.random.choice([0.1, 0.5, 2.0]))

    def restart(self) -> None:
        """Killed: requests that were out never happened, or did without a word."""
        if not self.ssd_blocks or self.random.random() < 0.5:
            return
        disk = self.rig.disk
        disk.reads.clear()
        disk.writes.clear()
        disk.drops.clear()
        self.synced.clear()
        self.rig = self._rig(disk)
        self.clients.clear()

    # Checks

    def check(self) -> None:
        self.rig.check()
        self.write_late()
        for client in self.clients:
            for request, keys in client.acquires.items():
                self.rig.check_bytes(request, keys, client.session)
                assert self.committed.issuperset(
                    keys[i] for i in self.rig.granted(request, client.session)
                ), "a block was visible that nobody committed"
                self.check_generations(request, client.session)
        for commit, (session, keys) in list(self.synced.items()):
            levels = self.rig.levels(commit, session)
            if levels is not None:
                del self.synced[commit]
                acked = [k for k, level in zip(keys, levels, strict=True) if level == 3]
                assert self.rig.disk.durable.issuperset(acked), "acknowledged before it was durable"
        on_ssd = {key for (tier, key), here in self.rig.stored.items() if here and tier == Tier.SSD}
        assert on_ssd <= self.rig.disk.index.keys(), "a block is called durable and is not"

    def check_generations(self, request: int, session: int) -> None:
        """I4: under a lease no slot was given out again."""
        for body in self.rig.answers.get((session, request), []):
            if isinstance(body, Granted):
                offsets = [r.offset + i * r.stride for r in body.runs for i in range(r.count)]
                now = self.rig.directory.generations_at(np.array(offsets, dtype=np.int64))
                assert now.tobytes() == body.generations, "a slot under a lease was given out"

    def write_late(self) -> None:
        """I4: lost clients go on writing into the slots that they had reserved."""
        for client in self.clients:
            for request in client.reserves:
                if client.lost and (client.session, request) in self.rig.answers:
                    body = self.rig.reserved(request, client.session)
                    for run in body.runs:
                        for i in range(run.count):
                            at = run.offset + i * run.stride
                            junk = self.random.randbytes(16)
                            self.rig.pool[at + 64 : at + 80] = junk

    def finish(self) -> None:
        """Everybody leaves, the disk ends everything: all space is free or live."""
        for client in self.clients:
            self.rig.apply(self.rig.core.session_settled(client.session, self.rig.now))
        self.clients.clear()
        for _ in range(2):
            self.rig.settle()
            self.rig.tick(100.0)
        self.rig.check()
        assert self.rig.core.idle()
        assert self.rig.core.next_deadline() is None
        assert self.rig.core.pinned_blocks() == 0
        for usage in self.rig.core.usage():
            assert usage.pending_bytes == usage.quarantined_bytes == 0
        self.rig.open(10_000)
        for keys in self.chains:
            for first in range(len(keys)):
                granted, reason = self.rig.get(keys[first : first + 4], session=10_000)
                assert granted == 4 or reason != EndReason.UNSPECIFIED


@pytest.mark.parametrize("seed", range(SEEDS))
def test_I1_I2_I4_I6_hold_in_a_random_run(seed: int) -> None:
    print(f"seed={seed}")
    simulation = Simulation(seed)
    simulation.run(STEPS)


def test_a_seed_replays_exactly() -> None:
    runs = []
    for _ in range(2):
        simulation = Simulation(3)
        simulation.run(60)
        runs.append((simulation.rig.answers, simulation.rig.core.counters))
    assert repr(runs[0]) == repr(runs[1])

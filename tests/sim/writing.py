"""One write of a client: slots, a copy that takes its time, the commit, or none of it."""

from typing import TYPE_CHECKING

import numpy as np
import xxhash
from kvstore.core.effects import Body, Committed, Reserved
from kvstore.core.types import AckLevel, ReserveStatus

from tests.sim.node import Welcome
from tests.sim.oracle import HELD_BY_ONE, Hold, must
from tests.sim.scenery import Chain, Space

if TYPE_CHECKING:
    from tests.sim.client import Client

FILL_S = 0.05


class Writing:
    """A reserve, from its request until its last slot is committed or given back."""

    def __init__(self, client: "Client", space: Space, chain: Chain, first: int, last: int) -> None:
        assert client.welcome is not None
        self.client = client
        self.welcome: Welcome = client.welcome
        self.space = space
        self.shards = chain.shards
        self.keys = chain.keys[first:last]
        random = client.world.random
        self.shard = random.randrange(chain.shards)
        self.version = random.randrange(3) if chain.shards == 1 else 0
        self.slots: dict[int, int] = {}
        self.holds: dict[int, Hold] = {}
        self.session_lives = True
        self._waiting = True
        timeout_s = random.choice((0.0, 0.2, 1.5))
        self.request = client.ask(
            self.answered,
            "reserve",
            client.namespace(space),
            b"".join(self.keys),
            chain.keys[first - 1] if first else b"",
            timeout_s,
            self.shard,
            self.shards,
        )
        if random.random() < 0.05:
            client.later("impatient", client.world.soon(0.1), self._abort)

    def answered(self, body: Body) -> None:
        """The slots; they are scribbled on at once, as nobody may read them yet."""
        self._waiting = False
        if not isinstance(body, Reserved):
            self._done()
            return
        for run in body.runs:
            for i in range(run.count):
                self.slots[run.first + i] = run.offset + i * run.stride
        statuses = np.frombuffer(body.statuses, dtype=np.uint8)
        asked = np.flatnonzero(statuses == ReserveStatus.SLOT).tolist()
        must(sorted(self.slots) == asked, "I2", "slots and statuses do not agree")
        oracle = self.client.cluster.oracle
        if self.shards == 1:
            for index, offset in self.slots.items():
                hold = Hold(self.client.process, HELD_BY_ONE)
                oracle.take(self.welcome.instance, offset, hold)
                self.holds[index] = hold
        self._write(0, 2, poison=True)
        if self.slots:
            self.client.later("fill", self._pause(0.3), self._fill)
        else:
            self._done()

    def _data(self, index: int) -> bytes:
        oracle, key = self.client.cluster.oracle, self.keys[index]
        oracle.issued[self.space.tenant, key].add(self.version)
        block = oracle.content(self.space.tenant, key, self.version, self.space.spec.block_bytes)
        part = len(block) // self.shards
        return block[self.shard * part : (self.shard + 1) * part]

    def _write(self, first: int, last: int, *, poison: bool = False) -> None:
        """Halves ``first`` to ``last`` - 1 of every block that is still its own."""
        pool = self.welcome.pool
        for index, offset in self.slots.items():
            data = self._data(index)
            start = offset + self.shard * len(data)
            low, high = first * len(data) // 2, last * len(data) // 2
            piece = b"\xee" * (high - low) if poison else data[low:high]
            pool[start + low : start + high] = np.frombuffer(piece, dtype=np.uint8)

    def _pause(self, longest_s: float) -> float:
        """A whole transfer takes less than the quarantine, as a node may count on."""
        mean = self.client.world.random.choices((FILL_S, longest_s), (6, 1))[0]
        return min(longest_s, self.client.world.soon(mean))

    def _fill(self) -> bool:
        if self not in self.client.writings:
            return False
        self._write(0, 1)
        self.client.later("filled", self._pause(0.5), self._filled)
        return True

    def _filled(self) -> bool:
        if self not in self.client.writings:
            return False
        self._write(1, 2)
        if not self.session_lives:
            self._done()
            return True
        random = self.client.world.random
        if random.random() < 0.1:
            return self._abort()
        chosen = list(self.slots)
        if random.random() < 0.2:
            chosen = sorted(random.sample(chosen, random.randint(1, len(chosen))))
        self._commit(chosen)
        if self.slots:
            later = random.choice((self._abort, self._fill))
            self.client.later("the rest", self.client.world.soon(0.2), later)
        else:
            self._done()
        return True

    def _commit(self, chosen: list[int]) -> None:
        client = self.client
        level = client.world.random.choice((AckLevel.MEMORY, AckLevel.SYNCED))
        sums = [xxhash.xxh3_64_intdigest(self._data(index)) for index in chosen]
        keys = [self.keys[index] for index in chosen]
        namespace = self.welcome.namespaces[self.space.tenant, self.space.spec]
        for index in chosen:
            client.cluster.oracle.committed.add(
                (client.node.node_id, self.space.tenant, self.keys[index])
            )
            self._let_go(index)
        client.ask(
            self._committed,
            "commit",
            self.request,
            chosen,
            np.array(sums, dtype="<u8").tobytes(),
            level,
            namespace,
            keys,
        )

    def _committed(self, body: Body) -> None:
        must(isinstance(body, Committed), "I2", f"a commit was answered with {body}")

    def _abort(self) -> bool:
        """Gives back what it has; a reserve that waits gets nothing."""
        if self not in self.client.writings:
            return False
        if self.session_lives:
            self.client.ask(None, "abort", self.request, [])
        self._done()
        return True

    def _let_go(self, index: int) -> None:
        offset = self.slots.pop(index)
        hold = self.holds.pop(index, None)
        if hold is not None:
            self.client.cluster.oracle.let_go(self.welcome.instance, offset, hold)

    def _done(self) -> None:
        self.client.receivers.pop(self.request, None)
        self.drop()
        if self in self.client.writings:
            self.client.writings.remove(self)

    def lost(self) -> None:
        """The session is lost. What is being copied goes on: the process is slow, not dead."""
        self.session_lives = False
        if self._waiting or not self.slots:
            self._done()

    def in_doubt(self) -> None:
        """The node waits for this client no longer; by contract it has stopped long ago."""
        for hold in self.holds.values():
            hold.safe = False

    def drop(self) -> None:
        """Nothing of it is touched any more."""
        for index in list(self.slots):
            self._let_go(index)

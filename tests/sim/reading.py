"""One read of a client: the real Lease, a copy that takes its time, and the check behind it."""

from typing import TYPE_CHECKING, Any

import numpy as np
from kvstore.core.effects import Body, Reply
from kvstore.errors import UnavailableError
from kvstore.node import translate
from kvstore_client.lease import Lease
from kvstore_proto import node_pb2

from tests.sim.node import Welcome
from tests.sim.oracle import SHARED, Broken, Hold, must
from tests.sim.scenery import Chain, Space

if TYPE_CHECKING:
    from tests.sim.client import Client

COPY_S = 0.05


class Wire:
    """What a Lease needs of its session."""

    def __init__(self, client: "Client") -> None:
        self.client = client
        self.id = 0

    def expect(self, receiver: object) -> int:
        """The id under which the acquire goes out."""
        self.id = next(self.client.ids)
        return self.id

    def forget(self, request: int) -> None:
        """No answer is wanted any more."""
        self.client.receivers.pop(request, None)

    def next_id(self) -> int:
        """Of a request without an answer."""
        return next(self.client.ids)

    def post(self, request: node_pb2.SessionRequest) -> None:
        """Sends a release."""
        if self.client.stream is not None:
            self.client.stream.send(self.client, request)


class SimLease(Lease):
    """A Lease whose request the simulation sends, without asyncio's timer."""

    def begin(self) -> None:
        """It may be released from now on."""
        self._closed = lambda: None

    def gave_back(self, index: int) -> bool:
        """Whether the block was released, maybe before it came."""
        return bool(self._released[index])

    def expire(self) -> None:
        """What its timer does."""
        if not self.ended:
            self._expire()


class Reading:
    """An acquire, from its request to the release of the last block."""

    def __init__(self, client: "Client", space: Space, chain: Chain, first: int, last: int) -> None:
        assert client.welcome is not None
        self.client = client
        self.welcome: Welcome = client.welcome
        self.space = space
        self.keys = chain.keys[first:last]
        wire = Wire(client)
        pieces: tuple[Any, Any] = (wire, self.welcome)
        self.lease = SimLease(*pieces, len(self.keys), space.spec.block_bytes)
        self.lease.begin()
        self.holds: dict[int, Hold] = {}
        self.session_lives = True
        self._copying = False
        self._stalled = False  # the process was slow once, for longer than a quarantine
        random = client.world.random
        timeout_s = random.choice((0.0, 0.3, 2.0))
        parent = chain.keys[first - 1] if first else b""
        client.receivers[self.lease.id] = self.answered
        assert client.stream is not None
        message = ("acquire", self.lease.id, client.namespace(space), b"".join(self.keys), parent)
        client.stream.send(client, (*message, timeout_s))
        client.later("lease timer", timeout_s + 3.0, self._time_out)
        if random.random() < 0.1:
            client.later("impatient", client.world.soon(0.05), self._release_part)

    def answered(self, body: Body) -> None:
        """Granted, End or an error: through the protocol's message, as on the wire."""
        before = self.lease.granted
        message = translate.reply_to_message(Reply(0, self.lease.id, body))
        if message.WhichOneof("response") == "error":
            self.lease.on_error(UnavailableError(message.error.message))
        else:
            self.lease.on_response(message)
        oracle = self.client.cluster.oracle
        for index in range(before, self.lease.granted):
            if (offset := int(self.lease.offsets[index])) < 0 or self.lease.gave_back(index):
                continue
            name = (self.client.node.node_id, self.space.tenant, self.keys[index])
            must(name in oracle.committed, "I2", f"block {index} was never committed")
            hold = Hold(self.client.process, SHARED)
            oracle.take(self.welcome.instance, offset, hold)
            self.holds[index] = hold
        came = self.lease.granted > before
        if self.lease.ended or (came and self.client.world.chance(0.5)):
            self._copy_soon()

    def _time_out(self) -> bool:
        if self.lease.ended or not self.session_lives:
            return False
        self.lease.expire()
        self._copy_soon()
        return True

    def _release_part(self) -> bool:
        if not self.session_lives or self._copying:
            return False
        first = self.client.world.random.randrange(len(self.keys))
        self._release(first, 1)
        return True

    def _copy_soon(self) -> None:
        if not self._copying:
            self._copying = True
            self.client.later("copy", self.client.world.soon(COPY_S), self._copy)

    def _wanted(self) -> list[int]:
        return [i for i in range(self.lease.granted) if i in self.holds]

    def _copy(self) -> None:
        """The first half of the bytes now, the second one later."""
        pool, nbytes = self.welcome.pool, self.lease.block_bytes
        half = self.client.world.random.choice((0, nbytes // 2, nbytes))
        parts = {}
        for index in self._wanted():
            offset = int(self.lease.offsets[index])
            parts[index] = pool[offset : offset + half].tobytes()
        pause = self.client.world.random.choices((COPY_S, 0.8), (1, 1))[0]
        self.client.later("copied", self.client.world.soon(pause), self._copied, parts, half)

    def _copied(self, parts: dict[int, bytes], half: int) -> None:
        """The rest, then the generation check: right bytes, or they are discarded."""
        if not self.session_lives and not self._stalled and self.client.world.chance(0.9):
            self._stalled = True
            pause = self.client.world.random.uniform(1.5, 5.0)
            self.client.later("copied late", pause, self._copied, parts, half)
            return
        oracle, pool = self.client.cluster.oracle, self.welcome.pool
        for index, part in parts.items():
            if index not in self.holds:
                continue
            offset = int(self.lease.offsets[index])
            data = part + pool[offset + half : offset + self.lease.block_bytes].tobytes()
            valid = self.lease.still_valid(index, 1)
            must(valid or not self.session_lives, "I4", "a slot changed under a live lease")
            if not valid:
                oracle.discarded += 1
                continue
            oracle.reads += 1
            if not oracle.is_right(self.space.tenant, self.keys[index], data):
                raise Broken("I1", f"wrong bytes of {self.keys[index].hex()[:16]}: {data[:16]!r}")
        self._copying = False
        if self.session_lives and self.client.world.chance(0.3) and len(self.holds) > 1:
            first = min(self.holds)
            self._release(first, self.client.world.random.randint(1, len(self.holds)))
            self.client.later("release", self.client.world.soon(0.3), self._release_rest)
        else:
            self._release_rest()

    def _release(self, first: int, count: int) -> None:
        for index in [i for i in self.holds if first <= i < first + count]:
            self._forget(index)
        self.lease.release(first, count)

    def _release_rest(self) -> bool:
        if self not in self.client.readings:
            return False
        if self._copying:
            return False
        if self.session_lives and not self.lease.ended:
            self.lease.expire()
        self.drop()
        self.lease.release()
        self.client.readings.remove(self)
        return True

    def lost(self) -> None:
        """The session is lost: what was granted may be copied still, and is in doubt."""
        self.session_lives = False
        self.lease.on_error(UnavailableError("the session is lost"))
        if not self._copying:
            random = self.client.world.random
            delay = random.choice((random.uniform(0.0, 0.5), random.uniform(2.0, 4.0)))
            self.client.later("let go", delay, self._let_go)

    def _let_go(self) -> bool:
        if self not in self.client.readings or self._copying:
            return False
        if self.client.world.chance(0.7):
            self._copy_soon()
            return True
        return self._release_rest()

    def in_doubt(self) -> None:
        """The node waits for this client no longer: only the generations protect it."""
        for hold in self.holds.values():
            hold.safe = False

    def _forget(self, index: int) -> None:
        hold = self.holds.pop(index)
        offset = int(self.lease.offsets[index])
        self.client.cluster.oracle.let_go(self.welcome.instance, offset, hold)

    def drop(self) -> None:
        """Nothing of it is touched any more."""
        for index in list(self.holds):
            self._forget(index)

    def check(self) -> None:
        """I1 and I4 at any moment: a live lease shows right bytes in slots that stay."""
        if not self.session_lives or not self.holds:
            return
        if self.client.node.up and self.client.node.instance == self.welcome.instance:
            pool = self.welcome.pool
            for index in self._wanted():
                offset = int(self.lease.offsets[index])
                data = pool[offset : offset + self.lease.block_bytes].tobytes()
                right = self.client.cluster.oracle.is_right(
                    self.space.tenant, self.keys[index], data
                )
                must(right, "I1", f"{self.keys[index].hex()[:16]} is wrong under a lease")
            must(
                np.array_equal(
                    self.welcome.directory.generations_at(self.lease.offsets[self._wanted()]),
                    self.lease.generations[self._wanted()],
                ),
                "I4",
                "another generation under a live lease",
            )

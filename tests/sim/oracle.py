"""What is true: which bytes exist, who may touch which slot, what was promised to survive."""

from collections import defaultdict
from dataclasses import dataclass, field

from kvstore.core.types import Namespace

from tests.faults.content import content

HELD_BY_ONE = "write"
SHARED = "read"


class Broken(AssertionError):  # noqa: N818
    """A promise was broken. ``wrong`` bytes or state, or ``lost`` blocks."""

    def __init__(self, promise: str, what: str, *, lost: bool = False) -> None:
        super().__init__(f"{promise}: {what}")
        self.lost = lost


def must(condition: object, promise: str, what: str) -> None:
    """Raises Broken unless the condition holds."""
    if not condition:
        raise Broken(promise, what)


@dataclass(eq=False)
class Hold:
    """A client's use of one slot, from the answer that gave it until the client lets go."""

    client: str
    kind: str  # HELD_BY_ONE or SHARED
    safe: bool = True  # the session lives, or the node must wait for the process


@dataclass
class Commit:
    """What is to be acknowledged, and which keys of it have become durable since."""

    namespace: Namespace
    keys: list[bytes]
    durable: set[bytes] = field(default_factory=set)


@dataclass
class Oracle:
    """Knows everything, and is never asked by the product."""

    seed: int
    issued: dict[tuple[str, bytes], set[int]] = field(default_factory=lambda: defaultdict(set))
    committed: set[tuple[str, str, bytes]] = field(default_factory=set)  # node, tenant, key
    holds: dict[tuple[int, int], list[Hold]] = field(default_factory=lambda: defaultdict(list))
    synced: dict[str, set[tuple[bytes, bytes]]] = field(default_factory=lambda: defaultdict(set))
    reads: int = 0
    discarded: int = 0
    acked: int = 0
    _bytes: dict[tuple[str, bytes, int, int], bytes] = field(default_factory=dict)

    def content(self, tenant: str, key: bytes, version: int, nbytes: int) -> bytes:
        """The bytes of a block."""
        name = (tenant, key, version, nbytes)
        if (found := self._bytes.get(name)) is None:
            found = self._bytes[name] = content(self.seed, tenant, key, version, nbytes)
        return found

    def is_right(self, tenant: str, key: bytes, data: bytes) -> bool:
        """Whether these are all the bytes of one version that somebody put."""
        return any(
            data == self.content(tenant, key, version, len(data))
            for version in self.issued.get((tenant, key), ())
        )

    def take(self, instance: int, offset: int, hold: Hold) -> None:
        """A client was given a slot."""
        others = self.holds[instance, offset]
        for other in others:
            if other.safe and HELD_BY_ONE in (hold.kind, other.kind):
                raise Broken(
                    "I4",
                    f"{hold.client} got slot {offset} to {hold.kind} while {other.client} has it "
                    f"to {other.kind}",
                )
        others.append(hold)

    def let_go(self, instance: int, offset: int, hold: Hold) -> None:
        """The client does not touch the slot any more."""
        others = self.holds[instance, offset]
        if hold in others:
            others.remove(hold)
        if not others:
            del self.holds[instance, offset]

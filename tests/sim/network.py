"""Virtual links: packets that are lost, doubled, reordered and late, and the streams above them."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.sim.world import World

RETRY_S = 0.2
RETRY_S_MAX = 2.0


@dataclass
class Link:
    """What happens to packets between two places. Faults change it; ``heal`` ends them."""

    name: str
    delay_s: float
    usual_s: float = field(init=False)
    lost: float = 0.0
    doubled: float = 0.0
    cut: bool = False  # nothing gets through

    def __post_init__(self) -> None:
        self.usual_s = self.delay_s

    def heal(self) -> None:
        """Works as it should."""
        self.delay_s, self.lost, self.doubled, self.cut = self.usual_s, 0.0, 0.0, False


class End(Protocol):
    """Who holds one end of a stream."""

    def received(self, stream: "Stream", message: Any) -> object:
        """The next message, in order."""

    def broken(self, stream: "Stream") -> None:
        """The stream is over; the other end may have had all, some or none of the last messages."""


@dataclass
class _Side:
    owner: End
    open: bool = True
    sent: int = 0
    expected: int = 0
    early: dict[int, Any] = field(default_factory=dict)  # came before their turn


class Stream:
    """A stream as gRPC gives it: messages in order, or an end; what is lost is sent again.

    Both ends learn of its end, each at its own time.
    """

    def __init__(self, world: World, link: Link, first: End, second: End) -> None:
        self.link = link
        self._world = world
        self._sides = (_Side(first), _Side(second))

    def is_open(self, owner: End) -> bool:
        """Whether this end has not heard of an end yet."""
        return self._sides[self._index(owner)].open

    def send(self, sender: End, message: Any) -> None:
        """Queues a message to the other end; after the end it goes nowhere."""
        index = self._index(sender)
        side = self._sides[index]
        if side.open:
            side.sent += 1
            self._transmit(1 - index, side.sent - 1, message, RETRY_S)

    def close(self, owner: End) -> None:
        """This end is gone at once; the other one hears of it later."""
        index = self._index(owner)
        self._sides[index].open = False
        self._tell_end(1 - index)

    def cut(self) -> None:
        """The link broke it: both ends hear of it."""
        self._tell_end(0)
        self._tell_end(1)

    def _index(self, owner: End) -> int:
        return 0 if self._sides[0].owner is owner else 1

    def _tell_end(self, index: int) -> None:
        delay = self._world.random.uniform(0.0, 0.3)
        self._world.after(delay, f"{self.link.name} end {index}", self._end, index)

    def _end(self, index: int) -> bool:
        side = self._sides[index]
        if not side.open:
            return False
        if self.link.cut:
            self._tell_end(index)
            return False
        side.open = False
        side.owner.broken(self)
        return True

    def _transmit(self, index: int, number: int, message: Any, retry_s: float) -> bool:
        world, link = self._world, self.link
        if self._sides[index].open:
            if link.cut or (link.lost and world.chance(link.lost)):
                arguments = (index, number, message, min(2 * retry_s, RETRY_S_MAX))
                world.after(retry_s, "", self._transmit, *arguments)
                return False
            label = f"{link.name} to {index}"
            world.after(world.soon(link.delay_s), label, self._arrive, index, number, message)
            if link.doubled and world.chance(link.doubled):
                world.after(world.soon(link.delay_s), label, self._arrive, index, number, message)
        return False

    def _arrive(self, index: int, number: int, message: Any) -> bool:
        side = self._sides[index]
        if not side.open or number < side.expected:
            return False
        side.early[number] = message
        reached = False
        while side.open and side.expected in side.early:
            message = side.early.pop(side.expected)
            side.expected += 1
            reached = True
            side.owner.received(self, message)
        return reached

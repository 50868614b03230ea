"""Virtual time: events in the order of their moments, all chance from one seed, a trace of it."""

import hashlib
import heapq
import random
from collections.abc import Callable
from typing import Any

Call = Callable[..., object]


class World:
    """The clock, the events to come, and the only source of chance.

    A step is one event that reaches the product, or changes its surroundings; what the network
    swallows on the way is none. Equal seeds give equal steps: the trace's hash says so.
    """

    def __init__(self, seed: int, show: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self._show = show
        self._events: list[tuple[float, int, str, Call, tuple[Any, ...]]] = []
        self._number = 0
        self._hash = hashlib.blake2b(digest_size=12)

    @property
    def trace_hash(self) -> str:
        """Of everything that happened so far."""
        return self._hash.hexdigest()

    def after(self, delay_s: float, label: str, call: Call, *arguments: Any) -> None:
        """Has ``call`` happen later; one that returns False was no step."""
        self._number += 1
        event = (self.now + delay_s, self._number, label, call, arguments)
        heapq.heappush(self._events, event)

    def note(self, text: str) -> None:
        """Adds a line to the trace."""
        line = f"{self.now:.6f} {text}\n"
        self._hash.update(line.encode())
        if self._show is not None:
            self._show(line[:-1])

    def step(self) -> None:
        """The next event that counts."""
        while True:
            self.now, _, label, call, arguments = heapq.heappop(self._events)
            if call(*arguments) is not False:
                self.steps += 1
                self.note(label)
                return

    def chance(self, probability: float) -> bool:
        """True as often as that."""
        return self.random.random() < probability

    def soon(self, mean_s: float) -> float:
        """A delay, mostly near the mean, now and then much longer."""
        return self.random.expovariate(1.0 / mean_s)

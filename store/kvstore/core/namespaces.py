"""Namespaces: what clients know each one by, its number in the table, and which one goes."""

from collections.abc import Callable, Set

import numpy as np
import numpy.typing as npt

from kvstore.core.types import Namespace
from kvstore.errors import NotFoundError, ResourceExhaustedError

ID_MAX = (1 << 32) - 1  # what the protocol has room for


class Namespaces:
    """At most ``limit``; at the limit one that nothing needs goes for a new one.

    Clients know a namespace by its ``id``, which is never given out again: who asks for one that
    has gone finds none. The columns of the table have its ``number``, which is.
    """

    def __init__(self, limit: int) -> None:
        self.slot_bytes: npt.NDArray[np.int64] = np.zeros(limit, dtype=np.int64)  # by number
        self.dropped = 0
        self._limit = limit
        self._by_id: dict[int, Namespace] = {}  # the one used longest ago first
        self._by_number: dict[int, Namespace] = {}
        self._free = list(reversed(range(limit)))
        self._last_id = 0

    def all(self) -> list[Namespace]:
        """Every namespace, the one used longest ago first."""
        return list(self._by_id.values())

    @property
    def full(self) -> bool:
        """Whether none can be added."""
        return not self._free

    def numbered(self, number: int) -> Namespace:
        """The one with this number in the table."""
        return self._by_number[number]

    def of_root(self, root: bytes) -> Namespace | None:
        """The one whose chains start at ``root``."""
        return next((n for n in self._by_id.values() if n.root == root), None)

    def use(self, namespace_id: int) -> Namespace:
        """The one that a client asks for, which is now the one used last; NotFoundError."""
        namespace = self._by_id.pop(namespace_id, None)
        if namespace is None:
            raise NotFoundError(
                f"namespace {namespace_id} is not open on this node: it never was, or it was not "
                "needed any more; open it again"
            )
        self._by_id[namespace_id] = namespace
        return namespace

    def open(
        self, root: bytes, block_bytes: int, needed: Callable[[], Set[Namespace]]
    ) -> Namespace:
        """The namespace of a root, made if need be.

        At the limit the one goes that was used longest ago and is not ``needed``;
        ResourceExhaustedError if there is none.
        """
        if (known := self.of_root(root)) is not None:
            return self.use(known.id)
        if self._last_id >= ID_MAX:
            raise ResourceExhaustedError(
                f"this node has given {ID_MAX} namespaces their ids, there are no more: restart it"
            )
        if self.full:
            self._drop_one(needed())
        return self.add(root, block_bytes)

    def add(self, root: bytes, block_bytes: int) -> Namespace:
        """A new one; there must be room."""
        self._last_id += 1
        namespace = Namespace(self._last_id, self._free.pop(), root, block_bytes)
        self._by_id[namespace.id] = self._by_number[namespace.number] = namespace
        self.slot_bytes[namespace.number] = namespace.slot_bytes
        return namespace

    def _drop_one(self, needed: Set[Namespace]) -> None:
        for namespace in self._by_id.values():
            if namespace not in needed:
                break
        else:
            raise ResourceExhaustedError(
                f"{self._limit} namespaces are open, the most that a node takes, and each has "
                "blocks or a client: close the clients that opened those which are out of use, "
                "and purge their blocks (`kvstore purge --namespace ROOT`)"
            )
        del self._by_id[namespace.id], self._by_number[namespace.number]
        self._free.append(namespace.number)
        self.dropped += 1

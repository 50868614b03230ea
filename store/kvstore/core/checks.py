"""Checks of requests: everything is refused before anything is changed."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import Blocks
from kvstore.core.keys import KEY_BYTES, check_joined, holds_key
from kvstore.core.leases import Session
from kvstore.core.spec import CacheSpec
from kvstore.core.types import Namespace
from kvstore.errors import InvalidArgumentError, ResourceExhaustedError

Indices = Sequence[int] | npt.NDArray[np.integer]


class RequestChecks:
    """What a client's numbers and keys must be like on this node."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._config = blocks.config

    @staticmethod
    def tenant(name: str, known: Collection[str]) -> None:
        """InvalidArgumentError unless the tenant exists; the others stay unnamed."""
        if name not in known:
            raise InvalidArgumentError(
                f"tenant {name!r} is not known here; with security off the one tenant is 'default'"
            )

    def namespace_fits(self, spec: CacheSpec) -> None:
        """InvalidArgumentError unless both tiers can hold a block."""
        for space, name in ((self._blocks.dram, "DRAM pool"), (self._blocks.ssd, "SSD tier")):
            if space and not space.slots_max(spec.slot_bytes):
                raise InvalidArgumentError(
                    f"a block of {spec.block_bytes} bytes does not fit into the {name} of "
                    f"{space.capacity_bytes} bytes; give the node a larger one"
                )

    def keys(self, session: Session, ns_id: int, keys: bytes, parent: bytes) -> Namespace:
        """The namespace of a request whose joined ``keys`` and parent can be keys of blocks.

        The session keeps it from now on.
        """
        namespace = self._blocks.namespaces.use(ns_id)
        check_joined(keys)
        if len(keys) > KEY_BYTES * self._config.keys_per_request_max:
            raise InvalidArgumentError(
                f"{len(keys) // KEY_BYTES} keys in one; "
                f"send {self._config.keys_per_request_max} at most"
            )
        if len(parent) not in (0, KEY_BYTES):
            raise InvalidArgumentError(f"a parent key has {len(parent)} bytes, not {KEY_BYTES}")
        if holds_key(keys, namespace.root) or holds_key(keys, bytes(KEY_BYTES)):
            raise InvalidArgumentError("the root and 32 zero bytes are no keys of blocks")
        session.namespaces.add(namespace)
        return namespace

    def reserve(self, keys: list[bytes], shard_index: int, num_shards: int) -> None:
        """No key twice, and a shard that exists."""
        if len(set(keys)) != len(keys):
            raise InvalidArgumentError("a reserve names a key twice")
        shards_max = self._config.shards_max
        if not 0 <= num_shards <= shards_max or not 0 <= shard_index < (num_shards or 1):
            raise InvalidArgumentError(
                f"shard {shard_index} of {num_shards}; take at most {shards_max} shards and an "
                "index below their number"
            )

    def wait_s(self, session: Session, timeout_s: float, waiting: int) -> float:
        """Seconds that one more acquire or reserve may wait; ``waiting`` do, of all sessions.

        ResourceExhaustedError if the session has too much open, or too many would wait.
        """
        held = len(session.leases) + len(session.reservations)
        if held >= self._config.holds_per_session_max:
            raise ResourceExhaustedError(
                f"this session has {held} acquires and reserves open; release some"
            )
        if timeout_s <= 0:
            return 0.0
        if session.waiting >= self._config.waiting_per_session_max:
            raise ResourceExhaustedError(
                f"{session.waiting} acquires and reserves of this session wait already; try later"
            )
        if waiting >= self._config.waiting_max:
            raise ResourceExhaustedError(
                f"{waiting} others wait already, of all sessions; try later"
            )
        return min(timeout_s, self._config.wait_s_max)


def places_of(indices: Indices, count: int) -> npt.NDArray[np.int64]:
    """Indices into the keys of a reserve, each once."""
    if len(indices) > count:
        raise InvalidArgumentError(f"{len(indices)} indices for the {count} keys of the reserve")
    places = np.fromiter(indices, dtype=np.int64, count=len(indices))
    if len(places) and (places.min() < 0 or places.max() >= count):
        raise InvalidArgumentError(f"an index is outside of the {count} keys of the reserve")
    named = np.zeros(count, dtype=np.bool_)
    named[places] = True
    if np.count_nonzero(named) != len(places):
        raise InvalidArgumentError("an index comes twice")
    return places


def checksums_of(joined: bytes, count: int) -> npt.NDArray[np.uint64]:
    """One u64 little-endian a block. InvalidArgumentError if these are not ``count``."""
    if len(joined) != 8 * count:
        raise InvalidArgumentError(
            f"{len(joined)} bytes of checksums for {count} blocks; take 8 each"
        )
    return np.frombuffer(joined, dtype="<u8")

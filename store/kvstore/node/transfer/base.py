"""What a transport between nodes does; none is used while a node works on one host alone."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class RemoteSlot(NamedTuple):
    """A block in a peer's pool, under a lease, and the local slot that it is to fill."""

    remote_offset: int  # bytes into the peer's pool
    generation: int  # of the peer's slot when the lease was given
    local_offset: int  # bytes into this node's pool
    nbytes: int


class Transfer(Protocol):
    """Moves blocks from a peer's pool into this node's pool.

    The caller holds a lease on the peer's slots for at least ``timeout_s``, verifies checksums
    after the transfer, and discards what came from a slot of another generation.
    """

    name: str

    async def fetch(
        self, peer: str, slots: Sequence[RemoteSlot], timeout_s: float
    ) -> Sequence[bool]:
        """Whether each slot was filled; UnavailableError if the peer cannot be reached."""
        ...

    async def close(self) -> None:
        """Ends all connections."""
        ...

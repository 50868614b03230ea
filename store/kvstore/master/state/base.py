"""What a store of cluster state must do; every change is durable when its call returns."""

from dataclasses import dataclass
from typing import Protocol

from kvstore_proto import master_pb2

FORMAT_VERSION = 1
NAMESPACES_MAX = 65_536
NODES_MAX = 4_096


@dataclass(frozen=True, slots=True)
class KnownNode:
    """A node that has been here before."""

    node_id: str
    address: str
    hostname: str
    version: str


class MasterState(Protocol):
    """Cluster epoch, namespaces and known nodes.

    The epoch never goes back. Calls block for as long as the medium takes, and may come from any
    thread, one at a time.
    """

    @property
    def epoch(self) -> int:
        """Newest cluster epoch; 0 before the first."""
        ...

    def raise_epoch(self, at_least: int = 0) -> int:
        """Makes the epoch one more than the newest and than ``at_least``; returns it."""
        ...

    def namespaces(self) -> list[master_pb2.NamespaceReport]:
        """Every namespace that a node has reported."""
        ...

    def put_namespace(self, report: master_pb2.NamespaceReport, dropped: bytes = b"") -> None:
        """Adds or replaces one, and forgets the one with the root ``dropped``, both or none.

        ResourceExhaustedError beyond ``NAMESPACES_MAX``.
        """
        ...

    def nodes(self) -> list[KnownNode]:
        """Every known node."""
        ...

    def put_node(self, node: KnownNode) -> None:
        """Adds or replaces one; ResourceExhaustedError beyond ``NODES_MAX``."""
        ...

    def remove_node(self, node_id: str) -> None:
        """Forgets one; nothing happens if it is not known."""
        ...

    def close(self) -> None:
        """Releases the medium."""
        ...

"""The Node service of gRPC: sessions and statistics."""

from typing import Any

from kvstore_proto import node_pb2, node_pb2_grpc

from kvstore.core.keys import KEY_BYTES
from kvstore.core.types import CoreConfig
from kvstore.node import translate
from kvstore.node.node import Node
from kvstore.node.session import Session


def request_bytes_max(config: CoreConfig) -> int:
    """What the largest message of a client may have: twice the keys of a request, so that one
    with a few too many is answered, and does not end its stream.
    """
    return 2 * KEY_BYTES * config.keys_per_request_max


class NodeService(node_pb2_grpc.NodeServicer):
    """Hands each stream to a Session of its own."""

    def __init__(self, node: Node) -> None:
        self._node = node

    # A coroutine that writes, not a generator that yields: its cleanup runs when the stream ends.
    async def Session(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: Any
    ) -> None:
        """One client process, from its Hello to the end of its stream."""
        del request_iterator
        await Session(self._node, context).run()

    async def Stats(  # noqa: N802
        self, request: node_pb2.StatsRequest, context: object
    ) -> node_pb2.StatsResponse:
        """Space and counters."""
        del request, context
        node = self._node
        return node_pb2.StatsResponse(
            node_id=node.node_id,
            instance=node.instance,
            tiers=[translate.usage_to_message(usage) for usage in node.core.usage()],
            sessions=node.clients.open_count,
            counters=node.core.counters,
            pinned_blocks=node.core.pinned_blocks(),
            problems=node.problems(),
        )

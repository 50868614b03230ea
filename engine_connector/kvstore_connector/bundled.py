"""The connector for kvstore's own engine: the seam ``KVConnector`` over the core."""

from collections.abc import Mapping
from typing import Any

import torch
from kvstore.core.spec import CacheSpec
from kvstore.errors import InvalidArgumentError
from kvstore_engine.kv_transfer import BlockSource, LoadResult, SaveBlock, TransferEvents

from kvstore_connector.config import ConnectorConfig, parse_transfer_config
from kvstore_connector.core import ConnectorCore
from kvstore_connector.outbox import FinishedLoad
from kvstore_connector.store import Connect, node_connect


class KVStoreConnector:
    """Implements ``kvstore_engine.kv_transfer.KVConnector``; see there for the contract."""

    def __init__(self, config: ConnectorConfig, spec: CacheSpec, connect: Connect) -> None:
        self._core = ConnectorCore(config, spec, connect)
        self._block_tokens = spec.block_tokens

    @property
    def root(self) -> bytes:
        """Namespace root of this engine's model."""
        return self._core.root

    @property
    def wake_fd(self) -> int:
        """Readable when ``poll`` has something."""
        return self._core.wake_fd

    @property
    def connected(self) -> bool:
        """Whether a node answers at the moment."""
        return self._core.connected

    def register_pages(self, pages: torch.Tensor) -> None:
        """Takes the page storage; its pages are the blocks' bytes as they are."""
        if pages.device.type != "cpu" or not pages.is_contiguous():
            raise InvalidArgumentError("this connector copies to and from contiguous CPU pages")
        self._core.register_pages(pages.view(len(pages), -1).view(torch.uint8).numpy())

    def on_request(self, request_id: str, keys: list[bytes]) -> None:
        """Starts the look-up of a new request."""
        self._core.on_request(request_id, keys)

    def match(self, request_id: str, first: int) -> BlockSource | None:
        """Blocks in the store from ``first`` on; always known at once."""
        return BlockSource(*self._core.match(request_id, first))

    def end_reason(self, request_id: str) -> str | None:
        """Why the store has no more, if the node has told since the match."""
        return self._core.end_reason(request_id)

    def start_load(self, request_id: str, first: int, pages: list[int]) -> None:
        """Loads into ``pages``; one LoadResult follows."""
        self._core.start_load(request_id, first, pages)

    def save(self, request_id: str, parent: bytes | None, blocks: list[SaveBlock]) -> None:  # noqa: ARG002
        """Stores blocks; their pages come back from ``poll``, saved or not."""
        self._core.save(parent, [block.key for block in blocks], [block.page for block in blocks])

    def hurry_saves(self) -> None:
        """What is to be saved waits for no others of its batch."""
        self._core.hurry_saves()

    def request_finished(self, request_id: str) -> None:
        """Forgets the request."""
        self._core.request_finished(request_id)

    def pages_changed(self, stored: list[bytes], removed: list[bytes]) -> None:
        """Passes the engine's own cache events on."""
        self._core.pages_changed(stored, removed)

    def poll(self) -> TransferEvents:
        """What ended since the last call."""
        finished = self._core.poll()
        return TransferEvents([self._result(load) for load in finished.loads], finished.pages)

    def counters(self) -> dict[str, float]:
        """Monotonic counters."""
        return self._core.counters()

    def close(self) -> None:
        """Ends everything within a few seconds."""
        self._core.close()

    def _result(self, load: FinishedLoad) -> LoadResult:
        tokens = {tier: n * self._block_tokens for tier, n in load.blocks_by_tier.items()}
        return LoadResult(load.request_id, load.blocks, load.end_reason, tokens)


def create_connector(
    kv_transfer_config: Mapping[str, Any], spec: CacheSpec, engine_id: str
) -> KVStoreConnector:
    """The connector that a ``kv-transfer-config`` asks for; ConfigError where it is wrong.

    A node that is away is no error: the engine works without it until it comes.
    """
    config = parse_transfer_config(kv_transfer_config)
    connect = node_connect(config.node, engine_id, config.connect_timeout_s)
    return KVStoreConnector(config, spec, connect)

"""A connector core over a fake store, with small pages."""

import select
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from kvstore.core.keys import block_keys
from kvstore.core.spec import CacheSpec
from kvstore_connector.config import ConnectorConfig
from kvstore_connector.core import ConnectorCore
from kvstore_connector.outbox import FinishedLoad
from kvstore_connector.store import Connect

from tests.connector.fake_store import FakeStore

BLOCK_BYTES = 512
SPEC = CacheSpec.raw("connector tests", block_bytes=BLOCK_BYTES, block_tokens=4)


def content(key: bytes) -> bytes:
    """The right bytes of a block: a function of its key."""
    return (key * (BLOCK_BYTES // len(key) + 1))[:BLOCK_BYTES]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits for a condition that another thread brings about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.002)


class Rig:
    """The core, its pages, and its fake store unless ``connect`` leads to a real one.

    ``settings`` are those of ConnectorConfig.
    """

    def __init__(
        self,
        *,
        store: FakeStore | None = None,
        connect: Connect | None = None,
        num_pages: int = 64,
        **settings: Any,
    ) -> None:
        self.store = store or FakeStore()
        self.rows = np.zeros((num_pages, BLOCK_BYTES), np.uint8)
        config = ConnectorConfig(**{"node": "unix:/fake", "connect_timeout_s": 5.0, **settings})
        self.core = ConnectorCore(config, SPEC, connect or self.store.connect)
        self.core.register_pages(self.rows)
        self.loads: list[FinishedLoad] = []
        self.pages: list[int] = []

    def keys(self, blocks: int, seed: int = 0) -> list[bytes]:
        """A chain of this many blocks."""
        return self.chain(self.core.root, blocks, seed)

    @staticmethod
    def chain(root: bytes, blocks: int, seed: int = 0) -> list[bytes]:
        """A chain of this many blocks from ``root`` on."""
        return block_keys(root, [seed, *range(1, 4 * blocks)], 4)

    def put(self, keys: Sequence[bytes]) -> None:
        """Has them stored already."""
        self.store.blocks.update({key: content(key) for key in keys})

    def poll(self) -> None:
        """Collects what ended."""
        finished = self.core.poll()
        self.loads += finished.loads
        self.pages += finished.pages

    def wait(self, *, loads: int = 0, pages: int = 0, timeout_s: float = 10.0) -> None:
        """Waits on the wake descriptor until this much has ended."""
        deadline_s = time.monotonic() + timeout_s
        self.poll()
        while len(self.loads) < loads or len(self.pages) < pages:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"loads: {self.loads}, pages: {sorted(self.pages)}"
            select.select([self.core.wake_fd], [], [], left_s)
            self.poll()

    def load(self, keys: list[bytes], first: int = 0, *, request_id: str = "r") -> FinishedLoad:
        """Looks a prompt up and loads what is there, into pages 0 and on."""
        self.core.on_request(request_id, keys)
        blocks, _ = self.core.match(request_id, first)
        self.core.start_load(request_id, first, list(range(blocks)))
        self.wait(loads=1)
        return self.loads.pop()

    def save(self, keys: list[bytes], parent: bytes | None = None, *, first_page: int = 0) -> None:
        """Puts the right bytes into pages and saves them."""
        pages = list(range(first_page, first_page + len(keys)))
        for key, page in zip(keys, pages, strict=True):
            self.rows[page] = np.frombuffer(content(key), np.uint8)
        self.core.save(parent, keys, pages)

    def right(self, keys: Sequence[bytes], first_page: int = 0) -> bool:
        """Whether pages hold exactly the bytes of ``keys``."""
        return all(
            self.rows[first_page + i].tobytes() == content(key) for i, key in enumerate(keys)
        )

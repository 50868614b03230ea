"""What the connector needs of a client of the node; kvstore_client has it, tests stand in."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from kvstore.core.spec import CacheSpec
from kvstore.core.types import EndReason
from kvstore_client import AsyncClient


class Match(Protocol):
    """What the directory has of the start of a chain."""

    @property
    def count(self) -> int: ...
    @property
    def tiers(self) -> npt.NDArray[np.uint8]: ...


class Lease(Protocol):
    """Pinned blocks, in chain order, growing until the node says why it stopped."""

    @property
    def reason(self) -> EndReason | None: ...
    @property
    def sources(self) -> npt.NDArray[np.uint8]: ...
    async def wait(self, count: int | None = None) -> int: ...
    def arrivals(self) -> AsyncIterator[tuple[int, int]]: ...
    def copy_into(self, out: Any, first: int = 0, count: int | None = None) -> int: ...
    def release(self, first: int = 0, count: int = 0) -> None: ...


class Write(Protocol):
    """Reserved slots; leaving the context gives back what was not committed."""

    @property
    def statuses(self) -> npt.NDArray[np.uint8]: ...
    def put(self, index: int, data: Any) -> None: ...
    async def commit(self, indices: Sequence[int] | None = None) -> npt.NDArray[np.uint8]: ...


class Namespace(Protocol):
    """One spec of one tenant at one node."""

    @property
    def root(self) -> bytes: ...
    def match(self, keys: Sequence[bytes]) -> Match: ...
    async def acquire(
        self, keys: Sequence[bytes], *, parent: bytes | None, timeout_s: float
    ) -> Lease: ...
    def write(
        self, keys: Sequence[bytes], *, parent: bytes | None, timeout_s: float
    ) -> AbstractAsyncContextManager[Write]: ...
    async def prefetch(self, keys: Sequence[bytes], *, parent: bytes | None = None) -> int: ...
    def hbm_events(
        self, *, stored: Sequence[bytes], removed: Sequence[bytes], cleared: bool
    ) -> None: ...


class Client(Protocol):
    """A session with a node, opened again by ``reconnect`` once it was lost."""

    @property
    def closed(self) -> bool: ...
    async def reconnect(self, timeout_s: float | None = None) -> None: ...
    async def open_namespace(self, spec: CacheSpec, *, tenant: str = "default") -> Namespace: ...
    async def close(self) -> None: ...


# Opens a session; the callback is called in the loop's thread whenever a session is lost.
Connect = Callable[[Callable[[], None]], Awaitable[Client]]


def node_connect(address: str, engine_id: str, timeout_s: float) -> Connect:
    """Connects to the node at ``address`` with kvstore's own client."""

    async def connect(on_lost: Callable[[], None]) -> Client:
        return await AsyncClient.connect(
            address,
            name=f"kvstore-engine {engine_id}",
            engine_id=engine_id,
            timeout_s=timeout_s,
            on_lost=lambda _: on_lost(),
        )

    return connect

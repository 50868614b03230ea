"""The seam between the engine and a KV connector. No call here may block the scheduler."""

from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class BlockSource:
    """Blocks found beyond the engine's own pages: how many, and why not more."""

    blocks: int
    end_reason: str


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A finished load: its leading ``blocks`` are in their pages, the others are not."""

    request_id: str
    blocks: int
    end_reason: str
    tokens_by_tier: dict[str, int]  # "dram", "ssd", "remote"


@dataclass(slots=True)
class TransferEvents:
    """What ended since the last poll."""

    loads: list[LoadResult] = field(default_factory=list)
    saved_pages: list[int] = field(default_factory=list)  # once for each page given to save()


@dataclass(frozen=True, slots=True)
class SaveBlock:
    """A full, computed page; the engine keeps it unchanged until it comes back from poll()."""

    key: bytes
    page: int


class KVConnector(Protocol):
    """What the engine asks of a connector. Single-threaded caller: the engine loop.

    A store that is gone, slow or wrong shows as misses and short loads, never as an exception.
    ``wake_fd`` becomes readable when poll() has something; the engine loop waits on it.
    """

    @property
    def root(self) -> bytes:
        """Namespace root, start of every block key; 32 bytes, fixed for the engine's life."""
        ...

    @property
    def wake_fd(self) -> int:
        """File descriptor to wait on; poll() drains it."""
        ...

    def register_pages(self, pages: torch.Tensor) -> None:
        """Gives the page storage, ``[page, kv_head, layer, 2, token, head_dim]``, contiguous."""
        ...

    def on_request(self, request_id: str, keys: list[bytes]) -> None:
        """A request arrived: ``keys`` of its full blocks. Starts its look-up.

        Comes again after a preemption, with the keys of generated blocks besides: look up anew.
        """
        ...

    def match(self, request_id: str, first: int) -> BlockSource | None:
        """Blocks loadable from block ``first`` on. None: not known yet, ask in a later step."""
        ...

    def end_reason(self, request_id: str) -> str | None:
        """Why the store has no more than the last match said, where that was learnt since."""
        ...

    def start_load(self, request_id: str, first: int, pages: list[int]) -> None:
        """Loads blocks ``first …`` into ``pages``; exactly one LoadResult follows, always.

        Until then the pages are the connector's, also when the request ends or the engine no longer
        waits. A request has at most one load at a time.
        """
        ...

    def save(self, request_id: str, parent: bytes | None, blocks: list[SaveBlock]) -> None:
        """Stores consecutive blocks of one chain behind ``parent`` (None: the root)."""
        ...

    def hurry_saves(self) -> None:
        """Pages are short: those given to ``save`` should come back soon. Often called in a row."""
        ...

    def request_finished(self, request_id: str) -> None:
        """The request ended or was aborted: forget it. A running load still ends by its result,
        and running saves by their pages.
        """
        ...

    def pages_changed(self, stored: list[bytes], removed: list[bytes]) -> None:
        """Keys that came into or left the engine's own prefix cache, for the master."""
        ...

    def poll(self) -> TransferEvents:
        """What ended since the last call; returns at once."""
        ...

    def counters(self) -> dict[str, float]:
        """Monotonic counters for the engine's metrics."""
        ...

    def close(self) -> None:
        """Ends transfers and gives everything back; bounded by a few seconds."""
        ...

"""One request inside the engine: its tokens, block keys, pages and progress."""

from dataclasses import dataclass, field
from enum import Enum

import torch
from kvstore.core.keys import block_keys, salt_extra

from kvstore_engine.messages import CacheUsage, SamplingParams


class RequestState(Enum):
    """Where a request is; every one but RUNNING and LOADING holds no pages."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and what was generated behind it.

    ``tokens`` may be the list of several choices of one prompt, until the first is generated.
    The KV of ``tokens[:num_computed]`` is in ``pages``; ``num_cached`` leading blocks of them are
    in the prefix cache. ``keys`` holds the key of each full block as far as it was needed; a
    block is hashed once.
    """

    request_id: str
    tokens: list[int]
    params: SamplingParams
    arrival: int
    page_tokens: int
    root: bytes
    cache_salt: str | None = None
    generator: torch.Generator | None = None
    state: RequestState = RequestState.WAITING
    num_prompt: int = 0
    num_computed: int = 0
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    cache: CacheUsage = field(default_factory=CacheUsage)
    asked_store_at: float | None = None
    store_overdue: bool = False  # the connector still owes this request a load
    started: bool = False  # something of it was computed: what it finds from now on may be its own

    _page_table: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        extra = salt_extra(self.cache_salt)
        self.keys = block_keys(self.root, self.tokens, self.page_tokens, extra)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    def append(self, token: int) -> None:
        """Adds a generated token, to a list of this request's own."""
        if self.num_output:
            self.tokens.append(token)
        else:
            self.tokens = [*self.tokens, token]

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose KV is still to be computed; at least one until the end."""
        return len(self.tokens) - self.num_computed

    @property
    def cacheable_keys(self) -> list[bytes]:
        """Keys that may be taken from a cache: the last token is computed in any case."""
        blocks = (len(self.tokens) - 1) // self.page_tokens
        self.extend_keys(blocks)
        return self.keys[:blocks]

    def extend_keys(self, blocks: int) -> None:
        """Hashes the blocks that generated tokens filled, up to ``blocks`` keys in all."""
        have = len(self.keys)
        if have >= blocks:
            return
        tokens = self.tokens[have * self.page_tokens : blocks * self.page_tokens]
        # The salt is in block 0, which a prompt shorter than a block leaves to this place.
        extra = salt_extra(self.cache_salt)
        parent = self.keys[-1] if have else None
        self.keys += block_keys(
            self.root, tokens, self.page_tokens, extra, parent=parent, first_block=have
        )

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.page_tokens)

    def page_table(self) -> torch.Tensor:
        """``pages`` as an int64 tensor, built anew only after a change."""
        if self._page_table is None:
            self._page_table = torch.tensor(self.pages, dtype=torch.int64)
        return self._page_table

    def set_pages(self, pages: list[int]) -> None:
        """Replaces all pages."""
        self.pages = pages
        self._page_table = None

    def add_pages(self, pages: list[int]) -> None:
        """Appends pages."""
        self.pages += pages
        self._page_table = None

    def replace_page(self, index: int, page: int) -> None:
        """Puts ``page``, which holds the same KV, at ``index``."""
        self.pages[index] = page
        self._page_table = None

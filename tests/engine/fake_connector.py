"""A connector over a dictionary, with every manner that a store can have. Time is its polls."""

import os
import random
from dataclasses import dataclass, field

import torch
from kvstore_engine.kv_transfer import BlockSource, LoadResult, SaveBlock, TransferEvents

POISON = 7777.0


@dataclass(frozen=True)
class Manner:
    """How the store behaves; shares are probabilities, delays polls."""

    match_delay_max: int = 0
    load_delay_max: int = 0
    save_delay_max: int = 0
    partial: float = 0.0  # loads that end early
    lost: float = 0.0  # loads that bring nothing
    never_load: float = 0.0  # loads that are not answered until ``answer_all``
    never_match: bool = False
    never_save: bool = False
    late_reason: str | None = None  # known once the match was answered


@dataclass
class _Load:
    request_id: str
    keys: list[bytes]
    pages: list[int]
    due: float


@dataclass
class _Save:
    blocks: list[SaveBlock]
    due: float


@dataclass
class FakeConnector:
    """Implements the seam; bytes are copied at the last moment, as late as a slow store would."""

    root: bytes
    store: dict[bytes, torch.Tensor] = field(default_factory=dict)
    manner: Manner = Manner()
    seed: int = 0

    def __post_init__(self) -> None:
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.tick = 0
        self.loads_started = 0
        self.short_loads = 0
        self.hurried = 0
        self.hbm: set[bytes] = set()
        self.closed = False
        self._random = random.Random(self.seed)
        self._known: dict[str, tuple[list[bytes], int]] = {}
        self._loads: list[_Load] = []
        self._saves: list[_Save] = []
        self._pages = torch.empty(0)

    @property
    def busy(self) -> bool:
        """Whether pages are still lent."""
        return bool(self._loads or self._saves)

    def register_pages(self, pages: torch.Tensor) -> None:
        self._pages = pages

    def on_request(self, request_id: str, keys: list[bytes]) -> None:
        self._known[request_id] = keys, self._due(self.manner.match_delay_max)

    def match(self, request_id: str, first: int) -> BlockSource | None:
        keys, due = self._known[request_id]
        if self.manner.never_match or self.tick < due:
            return None
        blocks = 0
        while first + blocks < len(keys) and keys[first + blocks] in self.store:
            blocks += 1
        complete = first + blocks == len(keys)
        return BlockSource(blocks, "complete" if complete else "never_stored")

    def end_reason(self, request_id: str) -> str | None:
        assert request_id in self._known
        return self.manner.late_reason

    def start_load(self, request_id: str, first: int, pages: list[int]) -> None:
        assert all(load.request_id != request_id for load in self._loads), "two loads at a time"
        assert pages
        self.loads_started += 1
        keys = self._known[request_id][0][first : first + len(pages)]
        never = self._random.random() < self.manner.never_load
        due = float("inf") if never else self._due(self.manner.load_delay_max)
        self._loads.append(_Load(request_id, keys, list(pages), due))

    def save(self, request_id: str, parent: bytes | None, blocks: list[SaveBlock]) -> None:
        due = float("inf") if self.manner.never_save else self._due(self.manner.save_delay_max)
        self._saves.append(_Save(list(blocks), due))

    def hurry_saves(self) -> None:
        self.hurried += 1

    def request_finished(self, request_id: str) -> None:
        del self._known[request_id]

    def pages_changed(self, stored: list[bytes], removed: list[bytes]) -> None:
        assert not self.hbm.intersection(stored)
        assert self.hbm.issuperset(removed)
        self.hbm = (self.hbm | set(stored)) - set(removed)

    def poll(self) -> TransferEvents:
        self.tick += 1
        events = TransferEvents()
        for save in [save for save in self._saves if save.due <= self.tick]:
            self._saves.remove(save)
            for block in save.blocks:
                self.store.setdefault(block.key, self._pages[block.page].clone())
                events.saved_pages.append(block.page)
        for load in [load for load in self._loads if load.due <= self.tick]:
            self._loads.remove(load)
            events.loads.append(self._carry_out(load))
        return events

    def answer_all(self) -> None:
        """Everything outstanding is due now."""
        for load in self._loads:
            load.due = self.tick
        for save in self._saves:
            save.due = self.tick

    def counters(self) -> dict[str, float]:
        return {"fake_loads": float(self.loads_started)}

    def close(self) -> None:
        if not self.closed:
            os.close(self.wake_fd)
        self.closed = True

    def _due(self, delay_max: int) -> int:
        return self.tick + self._random.randint(0, delay_max)

    def _carry_out(self, load: _Load) -> LoadResult:
        blocks, reason = len(load.pages), "complete"
        if self._random.random() < self.manner.lost:
            blocks, reason = 0, "store_unavailable"
        elif self._random.random() < self.manner.partial:
            blocks, reason = self._random.randrange(len(load.pages)), "timed_out"
        self.short_loads += blocks < len(load.pages)
        self._pages[load.pages] = POISON  # what is not reported as loaded may hold anything
        for key, page in zip(load.keys[:blocks], load.pages, strict=False):
            self._pages[page] = self.store[key]
        tokens = blocks * self._pages.shape[4]
        tiers = {"dram": tokens} if tokens else {}
        return LoadResult(load.request_id, blocks, reason, tiers)

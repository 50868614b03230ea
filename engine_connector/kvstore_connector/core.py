"""The engine-agnostic connector: look-ups, loads and saves of one engine process."""

import time
from collections.abc import Sequence

from kvstore.core.spec import CacheSpec
from kvstore.errors import KVStoreError

from kvstore_connector.config import ConnectorConfig
from kvstore_connector.counters import Counters
from kvstore_connector.hbm import HbmBlocks
from kvstore_connector.link import Link
from kvstore_connector.loads import Loads
from kvstore_connector.lookups import Lookups
from kvstore_connector.outbox import Finished, Outbox
from kvstore_connector.pages import Bytes, PageRows
from kvstore_connector.saves import Chain, Saves
from kvstore_connector.store import Connect

HBM_REPORT_S = 1.0
FLUSH_S_MAX = 2.0


class ConnectorCore:
    """What adapters for engines are made of. Called from one thread, the engine's; never blocks.

    The store's state shows as hits and misses only. Each load ends in one FinishedLoad, each page
    to save comes back once; both through ``poll``.
    """

    def __init__(self, config: ConnectorConfig, spec: CacheSpec, connect: Connect) -> None:
        self.config = config
        self.spec = spec
        self._counters = Counters()
        self._outbox = Outbox()
        self._hbm = HbmBlocks()
        self._report_due = False
        self._link = Link(
            connect,
            spec,
            config.tenant,
            self._counters,
            on_up=self._report_hbm,
            on_down=self._hbm.lost,
        )
        self._lookups = Lookups(self._link, config, self._hbm, self._counters)
        self._loads: Loads | None = None
        self._saves: Saves | None = None
        self._closed = False
        self._link.start(config.connect_timeout_s)

    @property
    def root(self) -> bytes:
        """Start of every key chain; the same for the life of this object."""
        return self._link.root

    @property
    def connected(self) -> bool:
        """Whether a node answers at the moment."""
        return self._link.namespace is not None

    @property
    def wake_fd(self) -> int:
        """Readable when ``poll`` has something."""
        return self._outbox.fd

    def register_pages(self, rows: Bytes) -> None:
        """Takes the engine's pages: row i is page i, ``block_bytes`` long."""
        pages = PageRows(rows, self.spec.block_bytes)
        # Pages that wait to be saved are lost to the engine: never more than half of them, and an
        # eighth of them does not wait for more.
        queue_bytes = min(self.config.save_queue_bytes, rows.nbytes // 2)
        self._loads = Loads(self._link, pages, self._outbox, self._counters)
        self._saves = Saves(
            self._link,
            pages,
            self._outbox,
            self._counters,
            queue_bytes=queue_bytes,
            # A full queue drops blocks: it is emptied before that.
            batch_bytes=min(self.config.save_batch_bytes, rows.nbytes // 8, queue_bytes // 2),
            linger_s=self.config.save_linger_s,
            timeout_s=self.config.save_timeout_s,
        )

    def on_request(self, request_id: str, keys: list[bytes]) -> None:
        """A request arrived, with the keys of its full prompt blocks."""
        self._lookups.start(request_id, keys)

    def match(self, request_id: str, first: int) -> tuple[int, str]:
        """How many blocks from ``first`` on can be loaded, and why not more."""
        return self._lookups.match(request_id, first)

    def end_reason(self, request_id: str) -> str | None:
        """Why the store has no more than the last match said, if that is known by now."""
        return self._lookups.end_reason(request_id)

    def start_load(self, request_id: str, first: int, pages: Sequence[int]) -> None:
        """Loads blocks ``first …`` of the request into ``pages``."""
        assert self._loads is not None, "register_pages comes first"
        limit_s = self.config.load_seconds(len(pages) * self.spec.block_bytes)
        deadline_s = time.monotonic() + limit_s
        self._loads.start(self._lookups.load(request_id, first, list(pages), deadline_s))

    def save(self, parent: bytes | None, keys: list[bytes], pages: list[int]) -> None:
        """Saves consecutive blocks behind ``parent``; what the store has already is skipped."""
        assert self._saves is not None, "register_pages comes first"
        held = self._held_already(keys) if self.config.saves else len(keys)
        self._outbox.put_pages(pages[:held])
        if held < len(keys):
            parent = keys[held - 1] if held else parent
            self._saves.add(Chain(parent, keys[held:], pages[held:]))
            if not self._lookups.num_open:
                self._saves.hurry()

    def hurry_saves(self) -> None:
        """The engine wants its pages back: what is to be saved waits for no others of its batch."""
        if self._saves is not None:
            self._saves.hurry()

    def request_finished(self, request_id: str) -> None:
        """The request ended: its running load ends early."""
        self._lookups.forget(request_id)
        if self._loads is not None:
            self._loads.cancel(request_id)
        if not self._lookups.num_open:
            self.hurry_saves()

    def pages_changed(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """Keys that came into or left the engine's own prefix cache."""
        self._hbm.change(stored, removed)
        if not self._report_due:
            self._report_due = self._link.submit(self._report_later)

    def poll(self) -> Finished:
        """What ended since the last call."""
        finished = self._outbox.drain()
        if self._loads is not None:
            for result in finished.loads:
                if (load := self._loads.ended(result.request_id)) is not None:
                    self._lookups.loaded(load)
        return finished

    def counters(self) -> dict[str, float]:
        """Monotonic counters, named as in the engine's metrics."""
        return self._counters.snapshot()

    def close(self) -> None:
        """Lets queued saves end for a short while, then ends everything; a few seconds at most."""
        if self._closed:
            return
        self._closed = True
        if self._saves is not None:
            self._saves.flush(FLUSH_S_MAX)
        self._link.close()
        if self._saves is not None:
            self._saves.close()
        if self._loads is not None:
            self._loads.close()
        self._outbox.close()

    def _held_already(self, keys: list[bytes]) -> int:
        namespace = self._link.namespace
        if namespace is None:
            self._counters.add("connector_saves_skipped_unavailable_blocks", len(keys))
            return len(keys)
        try:
            held = namespace.match(keys).count
        except KVStoreError:
            return len(keys)
        self._counters.add("connector_saves_held_blocks", held)
        return held

    def _report_later(self) -> None:
        self._link.loop.call_later(HBM_REPORT_S, self._report_hbm)

    def _report_hbm(self) -> None:
        self._report_due = False
        namespace = self._link.namespace
        if namespace is None:
            return
        stored, removed, cleared = self._hbm.take()
        if stored or removed or cleared:
            try:
                namespace.hbm_events(stored=stored, removed=removed, cleared=cleared)
            except KVStoreError:
                self._hbm.lost()

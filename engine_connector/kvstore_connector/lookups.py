"""Look-ups: what the directory has of a prompt, and why it has no more."""

import logging
from dataclasses import dataclass

from kvstore.core.types import EndReason, Tier
from kvstore.errors import KVStoreError

from kvstore_connector.config import ConnectorConfig
from kvstore_connector.counters import Counters
from kvstore_connector.hbm import HbmBlocks
from kvstore_connector.link import Link, end_of_chain
from kvstore_connector.loads import UNAVAILABLE, Load
from kvstore_connector.store import Namespace

log = logging.getLogger(__name__)

NEVER_STORED = "never_stored"
COMPLETE = "complete"


@dataclass(slots=True)
class Lookup:
    """One request's prompt blocks and what is known about where they end."""

    keys: list[bytes]
    first_seen: int  # index of the first block that was looked for in the directory
    tiers_seen: list[int]  # where blocks were when the request came, before any prefetch
    found_end: int = 0  # index after the last block that the directory had
    asked_at: int = -1  # index of the block whose absence the node was asked to explain
    reason_at: int = -1  # index of the block that ``reason`` is about
    reason: str = NEVER_STORED


class Lookups:
    """Asks the directory from the engine loop, and the node, behind it, for reasons.

    The directory answers in a tenth of a millisecond, without a call. It does not tell why a block
    is absent; the node is asked for that once a request, and the answer shows in later matches.
    """

    def __init__(
        self, link: Link, config: ConnectorConfig, hbm: HbmBlocks, counters: Counters
    ) -> None:
        self._link = link
        self._config = config
        self._hbm = hbm
        self._counters = counters
        self._open: dict[str, Lookup] = {}

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def start(self, request_id: str, keys: list[bytes]) -> None:
        """A request arrived: sets its look-up going."""
        namespace = self._link.namespace
        if namespace is None or not self._config.loads:
            self._open[request_id] = Lookup(keys, 0, [])
            return
        first = self._hbm.leading(keys)
        tiers = self._in_directory(namespace, keys[first:])
        self._open[request_id] = Lookup(keys, first, tiers)
        if max(tiers, default=0) >= Tier.SSD:
            self._link.submit(self._spawn_prefetch, namespace, keys[: first + len(tiers)], first)

    def match(self, request_id: str, first: int) -> tuple[int, str]:
        """How many blocks from ``first`` on can be loaded, and why not more."""
        lookup = self._open.get(request_id)
        if lookup is None or not self._config.loads:
            return 0, NEVER_STORED
        if first >= len(lookup.keys):
            return 0, COMPLETE
        namespace = self._link.namespace
        if namespace is None:
            return 0, UNAVAILABLE
        count = len(self._in_directory(namespace, lookup.keys[first:]))
        lookup.found_end = first + count
        if count < self._config.min_load_blocks:
            count = 0
        if lookup.found_end == len(lookup.keys):
            return count, COMPLETE
        if not count:  # a load asks by itself
            self._explain_once(namespace, lookup)
        known = lookup.reason_at == lookup.found_end
        return count, lookup.reason if known else NEVER_STORED

    def end_reason(self, request_id: str) -> str | None:
        """Why the node has no more than the last match said, if it has told."""
        lookup = self._open.get(request_id)
        known = lookup is not None and lookup.reason_at == lookup.found_end
        return lookup.reason if lookup is not None and known else None

    def loaded(self, load: Load) -> None:
        """A load that asked for the block behind its own tells why that is not there."""
        lookup = self._open.get(load.request_id)
        if lookup is not None and load.next_key and load.blocks == len(load.keys):
            lookup.reason, lookup.reason_at = load.end_reason, lookup.found_end

    def load(self, request_id: str, first: int, pages: list[int], deadline_s: float) -> Load:
        """The load of blocks ``first …`` into ``pages``.

        It also asks for the block behind them if the directory lacks that, to learn why.
        """
        lookup = self._open.get(request_id) or Lookup([], 0, [])
        keys, end = lookup.keys, first + len(pages)
        absent = end == lookup.found_end and end < len(keys)
        seen = dict(enumerate(lookup.tiers_seen, lookup.first_seen))
        return Load(
            request_id,
            parent=keys[first - 1] if first and keys else None,
            keys=keys[first:end],
            pages=pages,
            next_key=keys[end] if absent else None,
            tiers_seen=[seen.get(index, 0) for index in range(first, end)],
            deadline_s=deadline_s,
        )

    def forget(self, request_id: str) -> None:
        """The request ended."""
        self._open.pop(request_id, None)

    def _in_directory(self, namespace: Namespace, keys: list[bytes]) -> list[int]:
        """The tiers of the leading blocks that the directory has."""
        try:
            tiers: list[int] = namespace.match(keys).tiers.tolist()
        except KVStoreError:
            return []
        self._counters.add("connector_directory_lookups")
        return tiers

    def _spawn_prefetch(self, namespace: Namespace, keys: list[bytes], first: int) -> None:
        self._link.spawn(self._prefetch(namespace, keys, first))

    async def _prefetch(self, namespace: Namespace, keys: list[bytes], first: int) -> None:
        try:
            await namespace.prefetch(keys[first:], parent=keys[first - 1] if first else None)
        except KVStoreError as error:
            log.debug("a prefetch failed: %s", error)

    def _explain_once(self, namespace: Namespace, lookup: Lookup) -> None:
        if lookup.asked_at != lookup.found_end:
            lookup.asked_at = lookup.found_end
            self._link.submit(self._spawn_explain, namespace, lookup, lookup.found_end)

    def _spawn_explain(self, namespace: Namespace, lookup: Lookup, index: int) -> None:
        self._link.spawn(self._explain(namespace, lookup, index))

    async def _explain(self, namespace: Namespace, lookup: Lookup, index: int) -> None:
        parent = lookup.keys[index - 1] if index else None
        try:
            reason = await end_of_chain(namespace, lookup.keys[index], parent)
        except KVStoreError as error:
            log.debug("no reason for a miss: %s", error)
            return
        if reason == EndReason.TIMED_OUT:
            self._link.missed_deadline(namespace)
        elif reason != EndReason.COMPLETE:
            lookup.reason, lookup.reason_at = reason.name.lower(), index

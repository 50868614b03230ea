"""Looks at the accounts of an idle node now and then, and counts promises that are broken."""

import asyncio
import logging
from collections.abc import Callable

from kvstore.core.node_core import NodeCore
from kvstore.core.types import Tier

log = logging.getLogger(__name__)

EVERY_S = 10.0
LOOK_S = 1.0  # a look that is under way at the end has so long


class Auditor:
    """A broken promise is a bug of the node: it is counted and logged, the node serves on."""

    def __init__(self, core: NodeCore, look: Callable[[], None] = lambda: None) -> None:
        """``look`` looks at the files of the node; called on a thread, also when it is busy."""
        self.broken = {"I4": 0, "I6": 0}  # audits that found it so
        self.imbalance_bytes: dict[Tier, int] = {usage.tier: 0 for usage in core.usage()}
        self._core = core
        self._look = look
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins; returns at once."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self._looked()
                if self._core.idle():
                    self.check()
            except Exception:  # a bug; what it should have found may show yet
                log.exception("an audit failed")

    async def _looked(self) -> None:
        look = asyncio.ensure_future(asyncio.to_thread(self._look))
        try:
            await asyncio.shield(look)
        except asyncio.CancelledError:  # what it looks at is closed next
            await asyncio.wait({look}, timeout=LOOK_S)
            raise

    def check(self) -> None:
        """One audit."""
        found = self._core.audit()
        self.imbalance_bytes = found.imbalance_bytes
        if any(found.imbalance_bytes.values()):
            self.broken["I6"] += 1
            log.error("I6 is broken: the accounts are off by %s bytes", found.imbalance_bytes)
        if found.leases_of_nothing:
            self.broken["I4"] += 1
            log.error("I4 is broken: %d leased blocks are in no tier", found.leases_of_nothing)

"""The scrubber: reads SSD blocks again in the background, slowly, and drops what has gone bad."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvstore.core.scrub import ScrubSsd
from kvstore.core.types import IoOutcome
from kvstore.node.block_reader import BlockReader, runs_of
from kvstore.node.driver import Driver

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
START_AFTER_S = 60.0
PASS_EVERY_S = 3600.0  # at the most often
PATIENCE_S = 1.0  # how long a piece waits for reads of clients to end


class Scrubber:
    """One thread, one buffer and one descriptor of its own: no read of a client waits for it.

    What the two share is the device; there a piece of at most 1 MiB (or one block) is out at a
    time, at the configured rate, and preferably while no client's read is.
    """

    def __init__(self, driver: Driver, path: Path, mb_s: float) -> None:
        """``path`` is the data file, ``mb_s`` how many million bytes a second are read."""
        self.pass_finished_unix_s = 0.0  # for people; 0 before the first
        self._driver = driver
        self._bytes_per_s = mb_s * 1e6
        self._reader = BlockReader(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ssd-scrub")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins a minute from now; returns at once."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends after the piece in hand."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def close(self) -> None:
        """Frees what it holds, once stopped."""
        self._thread.shutdown()
        self._reader.close()

    async def _run(self) -> None:
        await asyncio.sleep(START_AFTER_S)
        while True:
            started = time.monotonic()
            try:
                await self.scrub_all()
            except Exception:  # a bug; the next pass may fare better
                log.exception("a pass of the scrubber failed")
            await asyncio.sleep(max(0.0, started + PASS_EVERY_S - time.monotonic()))

    async def scrub_all(self) -> None:
        """One pass over everything on SSD."""
        row = seen = bad = 0
        due = started = time.monotonic()
        while row >= 0:
            copies, row = self._driver.core.scrub_next(row, PIECE_BYTES)
            for run in runs_of(copies, PIECE_BYTES):
                await self._wait_for_clients()
                due = max(due, time.monotonic())
                due += sum(copy.nbytes for copy in run) / self._bytes_per_s
                bad += await self._scrub(run)
                seen += len(run)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            await asyncio.sleep(0)
        self.pass_finished_unix_s = time.time()
        log.info("scrubbed %d blocks in %.0f s, %d were bad", seen, time.monotonic() - started, bad)

    async def _wait_for_clients(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._driver.reads_idle.wait()

    async def _scrub(self, run: Sequence[ScrubSsd]) -> int:
        """Reads and judges neighbours; how many were dropped."""
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self._thread, self._outcomes, run)
        effects = self._driver.core.scrub_done(
            list(zip(run, outcomes, strict=True)), self._driver.now()
        )
        self._driver.heed_corruption()
        dropped = {drop.key for drop in effects.drops}
        self._driver.apply(effects)
        bad = [copy for copy in run if copy.key in dropped]
        for copy in bad:
            log.error(
                "SSD block %s at byte %d has gone bad: dropped",
                copy.key.hex()[:16],
                copy.ssd_offset,
            )
        return len(bad)

    def _outcomes(self, run: Sequence[ScrubSsd]) -> list[IoOutcome]:
        """On the thread. What fails is read once more: its space may just have been written to."""
        return [
            outcome if outcome is IoOutcome.OK else self._reader.outcomes([copy])[0]
            for copy, outcome in zip(run, self._reader.outcomes(run), strict=True)
        ]

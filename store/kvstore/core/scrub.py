"""Scrubbing: SSD copies named for a second look, and what becomes of those that fail it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvstore.core.blocks import Blocks
from kvstore.core.table import DramState, Rows, SsdState
from kvstore.core.types import EndReason, IoOutcome

ROWS_PER_CALL = 4096


class ScrubSsd(NamedTuple):
    """Read a copy into memory of one's own, verify it, then call ``scrub_done``.

    Nothing is held for it: the copy may be gone, and its space another's, before it is read.
    """

    row: int
    key: bytes
    ssd_offset: int
    nbytes: int
    checksums: tuple[int, ...]


def next_copies(blocks: Blocks, first_row: int, bytes_max: int) -> tuple[list[ScrubSsd], int]:
    """Copies in rows from ``first_row`` on, at least one if there is one near, in file order.

    Also the row to go on with, -1 when the table has ended. The table's order is close to the
    order of writing, so that neighbours are mostly neighbours on the medium as well.
    """
    table = blocks.table
    end = min(first_row + ROWS_PER_CALL, table.capacity)
    rows = first_row + np.flatnonzero(table.ssd_state[first_row:end] == SsdState.LIVE)
    after = np.cumsum(blocks.slot_bytes[table.namespace[rows]])
    count = max(1, int(np.searchsorted(after, bytes_max, side="right")))
    if count < len(rows):
        end = int(rows[count])
    rows = rows[:count]
    rows = rows[np.argsort(table.ssd_offset[rows])]
    columns = zip(
        rows.tolist(),
        table.key_list(rows),
        table.ssd_offset[rows].tolist(),
        table.namespace[rows].tolist(),
        strict=True,
    )
    numbered = blocks.namespaces.numbered
    copies = [
        ScrubSsd(row, key, offset, numbered(number).block_bytes, blocks.checksums(row))
        for row, key, offset, number in columns
    ]
    return copies, end if end < table.capacity else -1


def settle_copies(blocks: Blocks, seen: Sequence[tuple[ScrubSsd, IoOutcome]]) -> Rows:
    """Drops the bad ones, as a failed read does; their rows.

    A block that is in DRAM as well is written anew. One that is being read into DRAM is left to
    that read, which verifies it too.
    """
    table = blocks.table
    present = [(copy, outcome) for copy, outcome in seen if _is_there(blocks, copy)]
    bad = [copy.row for copy, outcome in present if outcome is not IoOutcome.OK]
    rows: Rows = np.array(bad, dtype=np.int64)
    rows = rows[table.dram_state[rows] != DramState.LOADING]
    blocks.drop_ssd(rows, EndReason.CORRUPT)
    outcomes = [outcome for _, outcome in present]
    blocks.count("scrubbed_blocks", len(present))
    blocks.count("scrub_corrupt_blocks", outcomes.count(IoOutcome.CORRUPT))
    blocks.count("scrub_read_errors", outcomes.count(IoOutcome.FAILED))
    return rows


def _is_there(blocks: Blocks, copy: ScrubSsd) -> bool:
    """Whether the copy is still the one that was to be looked at."""
    table = blocks.table
    return (
        table.index.find(copy.key) == copy.row
        and table.ssd_state[copy.row] == SsdState.LIVE
        and table.ssd_offset[copy.row] == copy.ssd_offset
        and blocks.checksums(copy.row) == copy.checksums
    )

"""What an administrator asks of the tiers: evict and purge."""

import numpy as np

from kvstore.core.table import DramState, Mask, Rows, SsdState
from kvstore.core.tiering import Tiering
from kvstore.core.types import Removal, Tier
from kvstore.errors import InvalidArgumentError


def evict_blocks(
    tiering: Tiering, tier: Tier, keys: list[bytes], max_bytes: int, *, drop: bool
) -> Removal:
    """Removes blocks from one tier; never a pinned one, never one before its child.

    Without ``drop`` nothing is lost: blocks that are in DRAM only leave when they are on SSD, and
    copies on SSD go only where DRAM has the block.
    """
    if tier not in (Tier.DRAM, Tier.SSD):
        raise InvalidArgumentError(f"tier {tier.name} is not one that a node evicts from")
    blocks, table = tiering.blocks, tiering.blocks.table
    if tier == Tier.SSD and blocks.ssd is None:
        return Removal(0, 0, 0)
    rows = _asked_for(tiering, tier, keys)
    chosen = _select(tiering, tier, rows, max_bytes, by_keys=bool(keys), drop=drop)
    nbytes = int(blocks.slot_bytes[table.namespace[chosen]].sum())
    left = rows[~np.isin(rows, chosen)]
    pinned = left[table.pins[left] > 0]
    waiting = left[table.pins[left] == 0]
    if tier == Tier.SSD:
        tiering.evict_ssd(chosen)
        return Removal(len(chosen), nbytes, len(pinned))
    if len(chosen):
        tiering.evict_dram(chosen)
    if drop or max_bytes or blocks.ssd is None:
        return Removal(len(chosen), nbytes, len(pinned))
    tiering.leaving.update(waiting.tolist())
    return Removal(len(chosen), nbytes, len(pinned), len(waiting))


def purge_blocks(tiering: Tiering, root: bytes | None) -> tuple[Rows, Removal]:
    """Forgets the blocks of one namespace, or of all; the rows that were forgotten."""
    blocks, table = tiering.blocks, tiering.blocks.table
    rows = table.all_rows()
    if root is not None:
        known = blocks.namespaces.of_root(root)
        rows = rows[table.namespace[rows] == known.number] if known else rows[:0]
    in_dram = np.isin(table.dram_state[rows], (DramState.LIVE, DramState.LOADING))
    on_ssd = table.ssd_state[rows] == SsdState.LIVE
    rows = rows[in_dram | on_ssd]
    copies = np.concatenate(
        (
            rows[table.dram_state[rows] == DramState.LIVE],
            rows[table.ssd_state[rows] == SsdState.LIVE],
        )
    )
    nbytes = int(blocks.slot_bytes[table.namespace[copies]].sum())
    removal = Removal(len(rows), nbytes, int((table.pins[rows] > 0).sum()))
    tiering.purge(rows)
    blocks.count("purged_blocks", len(rows))
    return rows, removal


def _asked_for(tiering: Tiering, tier: Tier, keys: list[bytes]) -> Rows:
    table = tiering.blocks.table
    rows = np.unique(table.lookup(keys)) if keys else table.all_rows()
    rows = rows[rows >= 0]
    found: Rows = rows[table.state_in(tier)[rows] == DramState.LIVE]
    return found


def _select(
    tiering: Tiering, tier: Tier, rows: Rows, max_bytes: int, *, by_keys: bool, drop: bool
) -> Rows:
    """What may go of the rows, children first, up to the limit of bytes."""
    blocks, table = tiering.blocks, tiering.blocks.table

    def eligible(some: Rows) -> Mask:
        if tier == Tier.DRAM:
            return tiering.may_be_dropped(some) if drop else tiering.on_ssd_too(some)
        in_dram: Mask = table.dram_state[some] == DramState.LIVE
        return tiering.may_leave_ssd(some) & (in_dram | drop)

    policy = blocks.dram_policy if tier == Tier.DRAM else blocks.ssd_policy
    if by_keys:
        may_go = tiering.closed(rows, eligible(rows), table.children_in(tier))
        chosen = policy.in_order(rows[may_go])
    else:
        chosen = policy.select(max(1, len(rows)), eligible)
    if max_bytes:
        sizes = np.cumsum(blocks.slot_bytes[table.namespace[chosen]])
        chosen = chosen[: int(np.searchsorted(sizes, max_bytes)) + 1]
    return chosen

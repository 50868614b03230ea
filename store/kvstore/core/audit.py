"""The audit: what an idle node can tell, in milliseconds, about promises that are broken."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import DRAM_COUNT, SSD_COUNT, Blocks
from kvstore.core.slots import SlotSpace
from kvstore.core.table import DramState, SsdState
from kvstore.core.types import Tier


class Audit(NamedTuple):
    """All zero in a node that is right."""

    imbalance_bytes: dict[Tier, int]  # I6: how far rows, slots and accounts of a tier are apart
    leases_of_nothing: int  # I4: blocks under a lease that are in no tier


def audit(blocks: Blocks) -> Audit:
    """Between two calls of the core only; no list is walked, no key is looked up."""
    table = blocks.table
    imbalance = {Tier.DRAM: _imbalance(blocks, blocks.dram, table.dram_state, DRAM_COUNT)}
    if blocks.ssd:
        imbalance[Tier.SSD] = _imbalance(blocks, blocks.ssd, table.ssd_state, SSD_COUNT)
    pinned = np.flatnonzero(table.pins)
    gone = table.dram_state[pinned] == DramState.NONE
    gone &= table.ssd_state[pinned] != SsdState.LIVE
    return Audit(imbalance, int(gone.sum()))


def _imbalance(
    blocks: Blocks,
    space: SlotSpace,
    state: npt.NDArray[np.uint8],
    counts: dict[int, str],
) -> int:
    rows = np.flatnonzero(state)
    slots = blocks.slot_bytes[blocks.table.namespace[rows]]
    sums = dict.fromkeys(counts.values(), 0)
    for value, name in counts.items():
        sums[name] += int(slots[state[rows] == value].sum())
    counted = {name: int(getattr(space, f"{name}_bytes")) for name in sums}
    apart = sum(abs(sums[name] - counted[name]) for name in sums)
    return apart + abs(space.slots_used_bytes - sum(counted.values())) + max(0, -space.free_bytes)

"""Runs of slots: how an answer says where blocks are."""

import numpy as np
import numpy.typing as npt

from kvstore.core.types import SlotRun, Tier

_TIERS = {int(tier): tier for tier in Tier}  # a call takes ten times as long as a look-up


def slot_runs(
    offsets: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int64],
    sources: npt.NDArray[np.uint8],
    stride: int,
) -> list[SlotRun]:
    """Slots of keys ``indices`` as few runs as possible."""
    if not len(offsets):
        return []
    breaks = (offsets[1:] - offsets[:-1]) != stride
    breaks |= (indices[1:] - indices[:-1]) != 1
    breaks |= sources[1:] != sources[:-1]
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    return [
        SlotRun(first, end - start, offset, stride, _TIERS[source])
        for start, end, first, offset, source in zip(
            starts,
            [*starts[1:], len(offsets)],
            indices[starts].tolist(),
            offsets[starts].tolist(),
            sources[starts].tolist(),
            strict=True,
        )
    ]

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
    if int(indices[-1] - indices[0]) != len(indices) - 1:
        breaks |= (indices[1:] - indices[:-1]) != 1
    if sources.tobytes().count(sources[0]) != len(sources):
        breaks |= sources[1:] != sources[:-1]
    inner = np.flatnonzero(breaks) + 1
    starts = np.concatenate((np.zeros(1, dtype=np.int64), inner)) if len(inner) else slice(0, 1)
    return [
        SlotRun(first, end - start, offset, stride, _TIERS[source])
        for start, end, first, offset, source in zip(
            [0, *inner.tolist()],
            [*inner.tolist(), len(offsets)],
            indices[starts].tolist(),
            offsets[starts].tolist(),
            sources[starts].tolist(),
            strict=True,
        )
    ]

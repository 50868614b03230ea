"""Vectorised questions about chains: rows are nodes of a forest, each with one parent."""

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int32]


def local_parents(rows: Rows, parent: Ints, scratch: Ints) -> Rows:
    """For each of the distinct ``rows``, where in ``rows`` its parent is; -1 if it is not there.

    ``scratch`` is a column of -1 and is left so.
    """
    scratch[rows] = np.arange(len(rows), dtype=np.int32)
    up = parent[rows]
    places = np.where(up >= 0, scratch[up], -1).astype(np.int64)
    scratch[rows] = -1
    return places


def closed_under_children(
    rows: Rows, parent: Ints, children: Ints, scratch: Ints, eligible: Mask | None = None
) -> Mask:
    """The largest part of ``rows`` in which every row is eligible and has all its children there.

    ``children`` counts those children that matter.
    """
    if not len(rows):
        return np.zeros(0, dtype=np.bool_)
    up = local_parents(rows, parent, scratch)
    inside = np.bincount(up[up >= 0], minlength=len(rows))
    if eligible is None:
        blocked = children[rows] != inside
    else:
        # Children that are none of ``children`` (another tier has them) cannot block.
        blocked = (children[rows] > inside) | ~eligible
    return ~spread_up(blocked, up)


def spread_up(marked: Mask, up: Rows) -> Mask:
    """Marks all ancestors of what is marked, by pointer doubling."""
    marked = marked.copy()
    if not marked.any():
        return marked
    while True:
        below = np.flatnonzero(up >= 0)
        if not len(below):
            return marked
        targets = up[below]
        marked[targets[marked[below]]] = True
        up = up.copy()
        up[below] = up[targets]


def spread_down(marked: Mask, parent: Ints) -> Mask:
    """Marks all descendants of what is marked; both arrays are over all rows."""
    end = len(parent)  # stands for the parent of roots
    up = np.append(np.where(parent < 0, end, parent), end)
    below = np.append(marked, False)
    while (up[:end] != end).any():
        below |= below[up]
        up = up[up]
    return below[:end]


def raise_above_children(rank: Rows, up: Rows) -> Rows:
    """Ranks in which every row lies above all its descendants, raised no more than needed."""
    inner = up >= 0
    if not (rank[inner] >= rank[up[inner]]).any():
        return rank
    rank, distance = rank.copy(), 1
    while True:
        below = np.flatnonzero(up >= 0)
        if not len(below):
            return rank
        targets = up[below]
        np.maximum.at(rank, targets, rank[below] + distance)
        up = up.copy()
        up[below] = up[targets]
        distance *= 2

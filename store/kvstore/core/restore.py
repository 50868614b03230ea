"""Restore: the blocks that an SSD index names, taken over at the start of a node."""

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import Blocks
from kvstore.core.effects import DropSsd
from kvstore.core.keys import KEY_BYTES
from kvstore.core.ssd_columns import SsdColumns
from kvstore.core.ssd_record import NO_PARENT
from kvstore.core.table import NO_ROW, Mask, Rows, SsdState
from kvstore.core.types import Namespace
from kvstore.errors import PreconditionError


def restore_blocks(blocks: Blocks, records: SsdColumns) -> int:
    """Fills the empty table; the newest sequence seen. What cannot be used becomes drops.

    Of records that name one slot, the newest wins.
    """
    if len(blocks.table):
        raise PreconditionError("blocks are restored at start only")
    records = records.take(records.newest_first())
    newest = int(records.numbers("sequence")[0]) if len(records) else 0
    rows: Rows = np.full(len(records), NO_ROW, dtype=np.int64)
    for root, nbytes, places in _by_namespace(records):
        namespace = _namespace(blocks, root, nbytes)
        if namespace is not None:
            some = records.take(places)
            usable = _claim(blocks, namespace, some)
            taken = np.flatnonzero(usable)
            rows[places[taken]] = _add(blocks, namespace, some.take(taken))
    kept = np.flatnonzero(rows >= 0)
    if len(kept):
        _link(blocks, records.take(kept), rows[kept])
    refused = records.take(np.flatnonzero(rows < 0)).records()
    blocks.out.drops += [DropSsd(NO_ROW, record.key, record.ssd_offset) for record in refused]
    blocks.count("restored_blocks", len(kept))
    blocks.count("restore_refused_records", len(refused))
    return newest


def _by_namespace(records: SsdColumns) -> list[tuple[bytes, int, Rows]]:
    """Root, size of a block, and the places of the records that have both; mostly there is one."""
    sizes, only = records.numbers("nbytes"), records.only_root()
    if only is not None and (sizes == sizes[0]).all():
        return [(only, int(sizes[0]), np.arange(len(records)))]
    roots = records.joined("root")
    found: dict[tuple[bytes, int], list[int]] = {}
    for i, nbytes in enumerate(sizes.tolist()):
        root = roots[i * KEY_BYTES : (i + 1) * KEY_BYTES]
        found.setdefault((root, nbytes), []).append(i)
    return [(root, nbytes, np.array(places)) for (root, nbytes), places in found.items()]


def _namespace(blocks: Blocks, root: bytes, nbytes: int) -> Namespace | None:
    if (known := blocks.namespaces.of_root(root)) is not None:
        return known if known.block_bytes == nbytes else None
    if blocks.namespaces.full or nbytes <= 0:
        return None
    return blocks.namespaces.add(root, nbytes)


def _claim(blocks: Blocks, namespace: Namespace, records: SsdColumns) -> Mask:
    if blocks.ssd is None:
        return np.zeros(len(records), dtype=np.bool_)
    fresh: Mask
    if len(blocks.table):
        fresh = blocks.table.index.find_all(records.joined("key")) < 0
    else:  # a search would touch the whole of its index for nothing
        fresh = np.ones(len(records), dtype=np.bool_)
    fresh &= np.cumsum(fresh) <= blocks.table.room()
    usable = fresh.copy()
    offsets = records.numbers("ssd_offset")
    usable[fresh] = blocks.ssd.claim(namespace.slot_bytes, offsets[fresh])
    return usable


def _add(blocks: Blocks, namespace: Namespace, records: SsdColumns) -> Rows:
    table = blocks.table
    rows = table.add_joined(records.joined("key"), namespace.number)
    table.checksum[rows] = records.entries["checksum"]
    table.ssd_offset[rows] = records.numbers("ssd_offset")
    for i, checksums in records.several.items():
        blocks.shard_checksums[int(rows[i])] = checksums
    return rows


def _link(blocks: Blocks, records: SsdColumns, rows: Rows) -> None:
    """Chains in whatever order their blocks were written; the newest count as used last."""
    table = blocks.table
    entries, parents = records.entries, records.joined("parent")
    at_root = entries["parent"] == entries["root"]
    at_root |= entries["parent"] == np.void(NO_PARENT)
    found = np.where(at_root, NO_ROW, table.index.find_all(parents))
    for i in np.flatnonzero(~at_root & (found < 0)).tolist():
        key = parents[i * KEY_BYTES : (i + 1) * KEY_BYTES]
        if (row := table.index.find(key)) < 0 and table.room():
            row = int(table.add([key], int(table.namespace[rows[i]]))[0])  # a placeholder
        found[i] = row
    found[table.namespace[found] != table.namespace[rows]] = NO_ROW
    found[_in_rings(rows, found, table.capacity)] = NO_ROW
    table.link(rows, found)
    blocks.take_ssd(rows, table.ssd_offset[rows], SsdState.LIVE)
    blocks.show_ssd(rows, SsdState.LIVE)


def _in_rings(rows: Rows, parents: Rows, capacity: int) -> npt.NDArray[np.bool_]:
    """Rows whose ancestors never end, which only a damaged index can say."""
    up = np.full(capacity + 1, capacity, dtype=np.int64)
    up[rows] = np.where(parents >= 0, parents, capacity)
    for _ in range(max(1, len(rows)).bit_length() + 1):
        up = up[up]
        if (up[rows] == capacity).all():
            break
    endless: npt.NDArray[np.bool_] = up[rows] != capacity
    return endless

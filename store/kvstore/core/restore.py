"""Restore: the blocks that an SSD index names, taken over at the start of a node."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import Blocks
from kvstore.core.effects import DropSsd
from kvstore.core.ssd_record import NO_PARENT, SsdRecord
from kvstore.core.table import NO_ROW, Rows, SsdState
from kvstore.core.types import Namespace
from kvstore.errors import PreconditionError


def restore_blocks(blocks: Blocks, records: Iterable[SsdRecord]) -> int:
    """Fills the empty table; the newest sequence seen. What cannot be used becomes drops.

    Of records that name one slot, the newest wins.
    """
    if len(blocks.table):
        raise PreconditionError("blocks are restored at start only")
    ordered = sorted(records, key=lambda record: record.sequence, reverse=True)
    by_root: dict[tuple[bytes, int], list[SsdRecord]] = {}
    for record in ordered:
        by_root.setdefault((record.root, record.nbytes), []).append(record)
    refused: list[SsdRecord] = []
    kept: list[SsdRecord] = []
    for (root, nbytes), some in by_root.items():
        namespace = _namespace(blocks, root, nbytes)
        usable = _claim(blocks, namespace, some) if namespace else np.zeros(len(some), np.bool_)
        taken = [record for record, good in zip(some, usable.tolist(), strict=True) if good]
        refused += [record for record, good in zip(some, usable.tolist(), strict=True) if not good]
        if namespace and taken:
            _add(blocks, namespace, taken)
            kept += taken
    if kept:
        _link(blocks, kept)
    blocks.out.drops += [DropSsd(NO_ROW, record.key, record.ssd_offset) for record in refused]
    blocks.count("restored_blocks", len(kept))
    blocks.count("restore_refused_records", len(refused))
    return max((record.sequence for record in ordered), default=0)


def _namespace(blocks: Blocks, root: bytes, nbytes: int) -> Namespace | None:
    for namespace in blocks.namespaces.values():
        if namespace.root == root:
            return namespace if namespace.block_bytes == nbytes else None
    if len(blocks.namespaces) >= blocks.config.namespaces_max or nbytes <= 0:
        return None
    return blocks.add_namespace(root, nbytes)


def _claim(blocks: Blocks, namespace: Namespace, records: list[SsdRecord]) -> npt.NDArray[np.bool_]:
    if blocks.ssd is None:
        return np.zeros(len(records), dtype=np.bool_)
    fresh = np.fromiter(
        (record.key not in blocks.table.index for record in records), np.bool_, len(records)
    )
    fresh &= np.cumsum(fresh) < blocks.table.room()
    offsets = np.fromiter((record.ssd_offset for record in records), np.int64, len(records))
    usable = fresh.copy()
    usable[fresh] = blocks.ssd.claim(namespace.slot_bytes, offsets[fresh])
    return usable


def _add(blocks: Blocks, namespace: Namespace, records: list[SsdRecord]) -> None:
    table = blocks.table
    rows = table.add([record.key for record in records], namespace.id)
    table.checksum[rows] = np.fromiter((r.checksums[0] for r in records), np.uint64, len(records))
    for row, record in zip(rows.tolist(), records, strict=True):
        if len(record.checksums) > 1:
            blocks.shard_checksums[row] = record.checksums
    table.ssd_offset[rows] = [record.ssd_offset for record in records]


def _link(blocks: Blocks, records: list[SsdRecord]) -> None:
    """Chains in whatever order their blocks were written; the newest count as used last."""
    table = blocks.table
    rows = table.lookup([record.key for record in records])
    parents = [_parent(record) for record in records]
    for key, row in zip(parents, rows.tolist(), strict=True):
        if key and key not in table.index and table.room():
            table.add([key], int(table.namespace[row]))  # a placeholder
    found = table.lookup(parents)
    found[table.namespace[found] != table.namespace[rows]] = NO_ROW
    found[_in_rings(rows, found, table.capacity)] = NO_ROW
    table.link(rows, found)
    blocks.take_ssd(rows, table.ssd_offset[rows], SsdState.LIVE)
    blocks.show_ssd(rows, SsdState.LIVE)


def _parent(record: SsdRecord) -> bytes:
    return b"" if record.parent in (NO_PARENT, record.root) else record.parent


def _in_rings(rows: Rows, parents: Rows, capacity: int) -> npt.NDArray[np.bool_]:
    """Rows whose ancestors never end, which only a damaged index can say."""
    up = np.full(capacity + 1, capacity, dtype=np.int64)
    up[rows] = np.where(parents >= 0, parents, capacity)
    for _ in range(max(1, len(rows)).bit_length() + 1):
        up = up[up]
    endless: npt.NDArray[np.bool_] = up[rows] != capacity
    return endless

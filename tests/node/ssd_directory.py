"""An SSD directory made without a node, and what befalls it."""

import os
from collections.abc import Iterable
from pathlib import Path

import lmdb
import xxhash
from kvstore.core.ssd_mark import Mark
from kvstore.core.ssd_record import NO_PARENT, SsdRecord
from kvstore.node import fsck as check
from kvstore.node.ssd_index import SsdIndex

PAGE = 4096
SLOTS = 256
ROOT = b"r" * 32


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


class Directory:
    """An SSD directory written block by block; ``slots`` has what is on the medium."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.index = SsdIndex(path, SLOTS, "node-1")
        self.data = open(path / "data", "w+b")  # noqa: SIM115  (closed by ``lose_the_root``)
        self.data.truncate(SLOTS * PAGE)

    def write(self, number: int, slot: int, sequence: int, data: bytes | None = None) -> SsdRecord:
        """One block of one page, at the root of its namespace, and its record."""
        record = self.write_block(number, slot, sequence, data)
        self.index.apply([(record.key, record.encode())], sequence)
        return record

    def write_block(
        self, number: int, slot: int, sequence: int, data: bytes | None = None
    ) -> SsdRecord:
        """The same without its record, which it returns."""
        data = os.urandom(PAGE) if data is None else data
        sums = (xxhash.xxh3_64_intdigest(data),)
        self.data.seek(slot * PAGE)
        self.data.write(data)
        return SsdRecord(key_of(number), ROOT, NO_PARENT, PAGE, slot * PAGE, sums, sequence)

    def remove(self, numbers: Iterable[int]) -> None:
        self.index.apply([(key_of(number), None) for number in numbers])

    def lose_the_root(self) -> None:
        """Closes the directory, and damages its index."""
        self.index.close()
        self.data.close()
        lose_the_root(self.path)

    def kept(self) -> dict[int, SsdRecord]:
        """The records of the index, by number."""
        index = SsdIndex.existing(self.path, read_only=True)
        found = [SsdRecord.decode(key, value) for key, value in zip(*index.entries(), strict=True)]
        index.close()
        return {int.from_bytes(record.key, "big"): record for record in found}


def lose_the_root(folder: Path) -> None:
    """Damages what both transactions of the index begin with, and nothing that it holds."""
    with open(folder / "index" / "data.mdb", "r+b") as file:
        for page in (0, PAGE):
            file.seek(page + 16)
            file.write(b"gone")


def run(folder: Path, *, repair: bool = False) -> check.Report:
    return check.fsck(folder, repair=repair, progress=lambda _done, _total: None)


def mark_in(folder: Path) -> Mark:
    env = lmdb.open(str(folder / "index"), max_dbs=3, readonly=True, lock=False)
    with env.begin(db=env.open_db(b"meta", create=False)) as txn:
        value = txn.get(b"sequences")
    env.close()
    assert value is not None
    return Mark.decode(value)

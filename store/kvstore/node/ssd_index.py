"""The SSD tier's durable index: LMDB from key to record, committed after the data it names."""

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt

from kvstore.core.ssd_mark import Mark
from kvstore.durable import private_directory, sync_directory, take_lmdb_lock_file
from kvstore.errors import ConfigError, CorruptError, KVStoreError
from kvstore.faultpoint import faultpoint
from kvstore.node.index_pages import PAGE_BYTES_MAX, IndexPages, read_metas
from kvstore.node.ssd_file import DATA_NAME, lost_file

log = logging.getLogger(__name__)

INDEX_NAME = "index"
FILE_NAME = "data.mdb"
FORMAT_VERSION = 2
MAP_BYTES_MIN = 256 << 20
ENTRY_BYTES = 1024  # of map for each block: several records, for copy-on-write
ROOM_FACTOR = 4  # of map for the bytes of records: pages half empty, and those that are copied
BATCH_ENTRIES = 8192  # read at a time: their objects take 3 MB
DATABASES = frozenset({"meta", "blocks", "namespaces"})
_FORMAT_KEY = b"format_version"
NODE_KEY = b"node_id"
MARK_KEY = b"sequences"
_DATA_BYTES_KEY = b"data_bytes"


HEAD_BYTES = 2 * PAGE_BYTES_MAX  # holds both meta pages
FULL_BYTES = 1 << 20  # a file system with less has no room for an index
GROWTH_BYTES_MIN = 1 << 20  # a small file may lack so much at its end, that LMDB never wrote
REMEDY = (
    "with the node stopped, `kvstore fsck {folder} --repair` makes a new index of what can be saved"
)


def damaged(path: Path, error: object) -> CorruptError:
    """The error of an index, with its remedy; ``path`` is that of its directory."""
    return CorruptError(f"SSD index {path}: {error}; {REMEDY.format(folder=path.parent)}")


def refused(path: Path, error: lmdb.Error) -> KVStoreError:
    """CorruptError if LMDB found damage; ConfigError if the system refused what LMDB asked of it.

    What the system says has no class of its own in LMDB's binding, but for a full disk.
    """
    if type(error) is lmdb.Error or isinstance(error, lmdb.DiskError):
        return ConfigError(f"SSD index {path}: {error}; look at the device")
    return damaged(path, error)


def _prove(path: Path, *, read_only: bool) -> None:
    """Proves every page of the index in directory ``path``; CorruptError if one is damaged.

    LMDB maps the file, follows its pages wherever they lead, and would crash. It also maps pages
    that it never wrote at the end of the file, which are in no tree: they get their zeros here,
    unless nobody is going to write.
    """
    file_path = path / FILE_NAME
    try:
        with open(file_path, "rb") as file:
            head = file.read(HEAD_BYTES)
            file_bytes = file.seek(0, os.SEEK_END)
            metas = read_metas(head)
            newest = max(metas, key=lambda meta: meta.transaction)
        needed = (newest.last_page + 1) * newest.page_bytes
        # A transaction may take a new page for each that there is, and free it unwritten.
        if 2 * file_bytes + GROWTH_BYTES_MIN < needed:
            raise CorruptError(f"it has {file_bytes} of its {needed} bytes")
        IndexPages(file_path, newest.page_bytes, needed).check(metas, DATABASES)
        if file_bytes < needed and not read_only:
            log.warning("%s has %d of its %d bytes", file_path, file_bytes, needed)
            os.truncate(file_path, needed)
    except CorruptError as error:
        raise damaged(path, error) from None
    except OSError as error:
        raise ConfigError(f"SSD index {path}: {error.strerror}") from None


def _exists(folder: Path) -> bool:
    """Whether the directory has an index; CorruptError if it has lost the one that it had."""
    with contextlib.suppress(OSError):
        if (folder / INDEX_NAME / FILE_NAME).stat().st_size:
            return True
    with contextlib.suppress(OSError):
        if (folder / DATA_NAME).stat().st_size:  # made after the index was on the medium
            raise damaged(folder / INDEX_NAME, "it is missing, though its data file is there")
    return False


class SsdIndex:
    """What the data file holds; each ``apply`` is one transaction, on disk when it returns."""

    def __init__(
        self, folder: Path, blocks_max: int, node_id: str, *, records_bytes: int = 0
    ) -> None:
        """Opens or creates the index, with room for ``records_bytes`` of keys and records.

        ConfigError if another format or node owns it; CorruptError if it is damaged.
        """
        room_bytes = max(blocks_max * ENTRY_BYTES, records_bytes * ROOM_FACTOR)
        map_bytes = max(MAP_BYTES_MIN, room_bytes)
        self._open(folder, map_bytes, node_id, create=True)
        try:
            sync_directory(self.path)
            sync_directory(folder)
        except OSError as error:
            self._env.close()
            raise ConfigError(f"SSD index {self.path}: {error.strerror}") from None

    @classmethod
    def existing(cls, folder: Path, *, read_only: bool) -> "SsdIndex":
        """The index of whatever node, for a look at it while that node does not run.

        ConfigError if there is none, or one of another format; CorruptError as for a node.
        """
        self = cls.__new__(cls)
        if not _exists(folder):
            raise ConfigError(
                f"{folder} has no {INDEX_NAME}: it is not the SSD directory of a node; "
                "that is its --ssd-dir, by default DATA_DIR/ssd, or DATA_DIR/node/ssd under "
                "`kvstore up`"
            )
        map_bytes = (folder / INDEX_NAME / FILE_NAME).stat().st_size + MAP_BYTES_MIN
        # Nobody else has it open: no file of locks is made, which a node could not open.
        self._open(folder, map_bytes, None, create=False, readonly=read_only, lock=False)
        return self

    def _open(
        self, folder: Path, map_bytes: int, node_id: str | None, *, create: bool, **options: bool
    ) -> None:
        self.path = folder / INDEX_NAME
        self._read_only = options.get("readonly", False)
        try:
            if create:
                private_directory(self.path)
                take_lmdb_lock_file(self.path)
            if _exists(folder):
                _prove(self.path, read_only=self._read_only)
            self._env = lmdb.open(
                str(self.path), map_size=map_bytes, max_dbs=3, mode=0o600, create=create, **options
            )
            self._opened = os.stat(self.path / FILE_NAME)
            self._seen_bytes = self._opened.st_size
        except (lmdb.Error, OSError) as error:
            raise ConfigError(f"SSD index {self.path}: {error}") from None
        try:
            self._meta = self._env.open_db(b"meta", create=create)
            self._blocks = self._env.open_db(b"blocks", create=create)
            self._namespaces = self._env.open_db(b"namespaces", create=create)
            self._check_format()
            if node_id is not None:
                self._check_owner(node_id)
            self._mark = self._noted = self._read_mark()
        except lmdb.Error as error:
            self._env.close()
            raise refused(self.path, error) from None
        except ConfigError:
            self._env.close()
            raise

    def _check_format(self) -> None:
        with self._env.begin() as txn:
            found = txn.get(_FORMAT_KEY, db=self._meta)
        blocks = self.count()
        if found == str(FORMAT_VERSION).encode() or (found is None and not blocks):
            return
        number = found.decode(errors="replace") if found is not None else "unknown"
        age = "newer" if number.isdecimal() and int(number) > FORMAT_VERSION else "older"
        raise ConfigError(
            f"SSD directory {self.path.parent} has format version {number}, this kvstore reads "
            f"version {FORMAT_VERSION}: start the {age} kvstore that wrote it, or give the node "
            "an empty --ssd-dir (its blocks are computed again)"
        )

    def _check_owner(self, node_id: str) -> None:
        """The first node to open a directory owns it."""
        with self._env.begin(write=True, db=self._meta) as txn:
            txn.put(_FORMAT_KEY, str(FORMAT_VERSION).encode(), overwrite=False)
            owner = txn.get(NODE_KEY)
            if owner is None and node_id:
                txn.put(NODE_KEY, node_id.encode())
            elif owner not in (None, node_id.encode()):
                raise ConfigError(
                    f"SSD directory {self.path.parent} belongs to node_id "
                    f"{owner.decode(errors='replace')}, this node is {node_id}; "
                    "give it an empty --ssd-dir"
                )

    def _read_mark(self) -> Mark:
        """What is noted; a version that knew no marks noted none."""
        with self._env.begin(db=self._meta) as txn:
            value = txn.get(MARK_KEY)
        try:
            return Mark.decode(value) if value is not None else Mark()
        except CorruptError as error:
            log.warning("SSD index %s: %s; its records say how far it is", self.path, error)
            return Mark()

    def go_on_after(self, sequences: npt.NDArray[np.int64]) -> int:
        """Takes in the sequences of all its records; new ones follow the one that it returns.

        It is noted at once, unless nothing may be changed; where the medium refuses that, by the
        next commit.
        """
        self._mark = self._mark.of(sequences)
        if not self._read_only:
            try:
                self.apply(())
            except lmdb.Error as error:
                log.error("SSD index %s: its mark is not noted yet: %s", self.path, error)
        return self._mark.sequence

    def data_bytes(self) -> int | None:
        """Length of the data file as its node made it; None if it was not noted."""
        with self._env.begin(db=self._meta) as txn:
            noted = txn.get(_DATA_BYTES_KEY)
        return int(noted) if noted is not None and noted.isdigit() else None

    def note_data_bytes(self, nbytes: int | None) -> None:
        """Notes the length of the data file, durably; None forgets it.

        ConfigError if the medium refuses it.
        """
        if nbytes == self.data_bytes():
            return
        try:
            with self._env.begin(write=True, db=self._meta) as txn:
                if nbytes is None:
                    txn.delete(_DATA_BYTES_KEY)
                else:
                    txn.put(_DATA_BYTES_KEY, str(nbytes).encode())
        except lmdb.Error as error:
            raise refused(self.path, error) from None

    def check_data_file(self) -> None:
        """CorruptError if the data file is not there, or not as long, as its node made it."""
        path = self.path.parent / DATA_NAME
        noted = self.data_bytes()
        blocks = self.count()
        try:
            nbytes = path.stat().st_size
        except FileNotFoundError:
            if noted is None and not blocks:
                return
            error = "it is missing, though its index is there"
        except OSError as refused_by:
            raise ConfigError(f"SSD file {path}: {refused_by.strerror}") from None
        else:
            if noted is None or nbytes >= noted:
                return
            error = f"it has {nbytes} of its {noted} bytes"
        remedy = f"with the node stopped, `kvstore fsck {path.parent} --repair` drops what is lost"
        raise CorruptError(f"SSD file {path}: {error}; {remedy}")

    def lost(self) -> str:
        """Why nothing that is committed here will be found again; empty while it will."""
        path = self.path / FILE_NAME
        why = lost_file(path, self._opened, self._seen_bytes)
        if not why:
            with contextlib.suppress(OSError):
                self._seen_bytes = max(self._seen_bytes, path.stat().st_size)  # it only grows
        return why

    def count(self) -> int:
        """Records of blocks."""
        with self._env.begin() as txn:
            return int(txn.stat(self._blocks)["entries"])

    def batches(self) -> Iterator[Sequence[tuple[bytes, bytes]]]:
        """Keys and encoded records of every block, some at a time, as they are of one moment.

        CorruptError if they cannot be read.
        """
        try:
            with self._env.begin(db=self._blocks) as txn:
                entries = txn.cursor().iternext()
                while batch := list(islice(entries, BATCH_ENTRIES)):
                    yield batch
        except lmdb.Error as error:
            raise refused(self.path, error) from None

    def entries(self) -> tuple[list[bytes], list[bytes]]:
        """Keys and encoded records of every block; CorruptError if they cannot be read."""
        found = [entry for batch in self.batches() for entry in batch]
        return [key for key, _ in found], [value for _, value in found]

    def _all(self, database: Any) -> dict[bytes, bytes]:
        try:
            with self._env.begin(db=database) as txn:
                return dict(txn.cursor().iternext())
        except lmdb.Error as error:
            raise refused(self.path, error) from None

    def apply(self, changes: Iterable[tuple[bytes, bytes | None]], sequence: int = 0) -> None:
        """Puts ``(key, record)`` and removes ``(key, None)`` in order, all or nothing, durably.

        ``sequence`` is the highest of the records put. Raises lmdb.Error, and then nothing has
        changed.
        """
        with self._env.begin(write=True, db=self._blocks) as txn:
            for key, record in changes:
                if record is None:
                    txn.delete(key)
                else:
                    txn.put(key, record)
            empty = not txn.stat(self._blocks)["entries"]
            mark = self._mark.after(sequence, empty=empty)
            if mark != self._noted:
                txn.put(MARK_KEY, mark.encode(), db=self._meta)
        self._mark = self._noted = mark

    def namespaces(self) -> dict[bytes, bytes]:
        """Root to encoded namespace."""
        return self._all(self._namespaces)

    def keep_namespaces(self, roots: Set[bytes]) -> dict[bytes, bytes]:
        """Forgets all but these, so that those that nobody uses never add up; what is left."""
        known = self.namespaces()
        unused = known.keys() - roots
        if unused:
            self.change_namespaces({}, unused)
        return {root: encoded for root, encoded in known.items() if root in roots}

    def add_namespace(self, root: bytes, encoded: bytes) -> bool:
        """Remembers durably what a namespace is; False if the medium does not take it now."""
        return self.change_namespaces({root: encoded}, frozenset())

    def change_namespaces(self, fresh: Mapping[bytes, bytes], gone: Set[bytes]) -> bool:
        """Remembers some and forgets others, all or nothing, durably; False if it is nothing."""
        try:
            faultpoint("ssd.namespaces")
            with self._env.begin(write=True, db=self._namespaces) as txn:
                for root in gone:
                    txn.delete(root)
                for root, encoded in fresh.items():
                    txn.put(root, encoded)
        except (lmdb.Error, OSError) as error:
            log.error("%d namespaces are not kept, %d stay: %s", len(fresh), len(gone), error)
            return False
        return True

    def close(self) -> None:
        """Closes the environment; nothing may use it any more."""
        self._env.close()


def is_full(error: Exception, path: Path) -> bool:
    """Whether there was no room on the file system, or in the map, of the index.

    LMDB takes the short write of a file system that becomes full for EIO. To go on is safe in any
    case: it has given the transaction up, and itself refuses to go on where that failed.
    """
    if isinstance(error, lmdb.DiskError | lmdb.MapFullError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize < FULL_BYTES

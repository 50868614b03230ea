"""A new index of what can still be read on the pages of a damaged one."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from kvstore_proto import master_pb2

from kvstore.core.keys import KEY_BYTES
from kvstore.core.ssd_mark import Mark
from kvstore.core.ssd_record import SsdRecord
from kvstore.durable import sync_directory
from kvstore.errors import ConfigError, CorruptError
from kvstore.node.index_pages import IndexPages, read_metas
from kvstore.node.ssd_index import (
    FILE_NAME,
    HEAD_BYTES,
    INDEX_NAME,
    MARK_KEY,
    NODE_KEY,
    SsdIndex,
)

DAMAGED_NAME = "data.mdb.damaged"
NEW_NAME = "index.new"
LOCK_NAME = "lock.mdb"
PROBE_NAME = "probe"
PROBE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
PAGE_BYTES = 4096  # where the meta pages do not say it
NODE_ID_BYTES_MAX = 128


class Saved(NamedTuple):
    """What the pages still say. Among the records are some that were removed."""

    node_id: str  # empty if it is not to be found
    mark: Mark
    entries: list[tuple[bytes, bytes]]  # keys and records; a key may have several
    namespaces: dict[bytes, bytes]


class IndexRebuild:
    """A new index, made beside a damaged one and put into its place.

    It belongs to the damaged one's user, once it is there; until then to whoever repairs, and is
    reached by a descriptor: the user may put links in the way. Killed anywhere, it can be done
    again.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the damaged index. ConfigError where a new one cannot be its user's."""
        self._folder = folder
        self._path = folder / INDEX_NAME / FILE_NAME
        self._new = folder / NEW_NAME
        with contextlib.ExitStack() as resources:
            try:
                self.saved = _saved(self._path)
                self._owner = _owner(self._path, folder)
                shutil.rmtree(self._new, ignore_errors=True)
                self._new.mkdir(mode=0o700)
                resources.callback(shutil.rmtree, self._new, ignore_errors=True)
                self._descriptor = _opened(resources, self._new)
                self._index: int | None = None
                with contextlib.suppress(FileNotFoundError):
                    self._index = os.open(self._path.parent, DIRECTORY_FLAGS)
                    resources.callback(os.close, self._index)
                self._give_a_probe()
            except OSError as error:
                raise ConfigError(f"SSD index {self._path}: {error.strerror}") from None
            self._resources = resources.pop_all()

    def replace(self, records: Iterable[SsdRecord], sequences: npt.NDArray[np.int64]) -> None:
        """Puts an index of these records into place; ``sequences`` are of all that were found.

        The damaged file is kept beside it as ``data.mdb.damaged``. ConfigError, and the damaged
        one stands, where the medium or the system refuses.
        """
        path = self._path
        try:
            with contextlib.ExitStack() as opened:
                self._make(records, sequences)
                made = _opened(opened, INDEX_NAME, self._descriptor)
                for name in (FILE_NAME, LOCK_NAME):
                    self._give(name, made)
                if (index := self._index) is None:
                    path.parent.mkdir(mode=0o700)
                    self._give(path.parent)
                    index = _opened(opened, path.parent)
                if LOCK_NAME not in os.listdir(index):
                    os.replace(LOCK_NAME, LOCK_NAME, src_dir_fd=made, dst_dir_fd=index)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(DAMAGED_NAME, dir_fd=index)
                with contextlib.suppress(FileNotFoundError):
                    ends = {"src_dir_fd": index, "dst_dir_fd": index}
                    os.link(FILE_NAME, DAMAGED_NAME, **ends, follow_symlinks=False)
                os.replace(FILE_NAME, FILE_NAME, src_dir_fd=made, dst_dir_fd=index)
                os.fsync(index)
            sync_directory(self._folder)
        except OSError as error:
            raise ConfigError(f"SSD index {path}: {error.strerror}") from None
        except lmdb.Error as error:
            raise ConfigError(f"SSD index {path}: {error}") from None

    def _make(self, records: Iterable[SsdRecord], sequences: npt.NDArray[np.int64]) -> None:
        saved = self.saved
        encoded = sorted((record.key, record.encode()) for record in records)
        folder = Path(f"/proc/self/fd/{self._descriptor}")
        records_bytes = sum(len(key) + len(value) for key, value in encoded)
        index = SsdIndex(folder, len(encoded), saved.node_id, records_bytes=records_bytes)
        try:
            if not index.change_namespaces(saved.namespaces, frozenset()):
                raise ConfigError(f"SSD index {self._path}: the new one takes no namespaces")
            newest = int(sequences.max()) if len(sequences) else 0
            index.apply(encoded, max(newest, saved.mark.sequence))
        finally:
            index.close()

    def _give_a_probe(self) -> None:
        """Finds out before the blocks are read whether files may be given to the user."""
        os.close(os.open(PROBE_NAME, PROBE_FLAGS, 0o600, dir_fd=self._descriptor))
        self._give(PROBE_NAME, self._descriptor)
        os.unlink(PROBE_NAME, dir_fd=self._descriptor)

    def _give(self, place: str | Path, folder: int | None = None) -> None:
        """Makes it the user's whose node is to open it; ConfigError where it is not allowed."""
        owner = self._owner
        found = os.stat(place, dir_fd=folder, follow_symlinks=False)
        if found.st_uid == owner.st_uid:
            return
        try:
            os.chown(place, owner.st_uid, owner.st_gid, dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            raise ConfigError(
                f"SSD index {self._path} belongs to user id {owner.st_uid}, to whom a new one "
                f"cannot be given ({error.strerror}): repair it as that user or as root"
            ) from None

    def close(self) -> None:
        """Removes what was made beside the index."""
        self._resources.close()


def _opened(
    resources: contextlib.ExitStack, directory: str | Path, folder: int | None = None
) -> int:
    """A descriptor of a directory that is no link."""
    descriptor = os.open(directory, DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    resources.callback(os.close, descriptor)
    return descriptor


def _owner(path: Path, folder: Path) -> os.stat_result:
    """Of the index file, or of what is there of the directories that it is to be in."""
    for place in (path, path.parent):
        with contextlib.suppress(FileNotFoundError):
            return place.stat()
    return folder.stat()


def _saved(path: Path) -> Saved:
    node_ids: Counter[str] = Counter()
    mark = Mark()
    records: dict[tuple[bytes, bytes], int] = {}
    namespaces: dict[bytes, bytes] = {}
    for key, value in _entries(path):
        with contextlib.suppress(CorruptError):
            records[key, value] = SsdRecord.decode(key, value).sequence
            continue
        with contextlib.suppress(CorruptError):
            mark = max(mark, Mark.decode(value) if key == MARK_KEY else mark)
        if key == NODE_KEY and value.isascii() and len(value) <= NODE_ID_BYTES_MAX:
            node_ids[value.decode()] += 1
        with contextlib.suppress(DecodeError):
            if len(key) == KEY_BYTES and master_pb2.NamespaceReport.FromString(value).root == key:
                namespaces[key] = value
    likely = node_ids.most_common(1)
    entries = [entry for entry, sequence in records.items() if sequence >= mark.floor]
    return Saved(likely[0][0] if likely else "", mark, entries, namespaces)


def _entries(path: Path) -> Iterator[tuple[bytes, bytes]]:
    page_bytes = PAGE_BYTES
    try:
        with open(path, "rb") as file, contextlib.suppress(CorruptError):
            page_bytes = read_metas(file.read(HEAD_BYTES))[0].page_bytes
        yield from IndexPages(path, page_bytes).entries()
    except FileNotFoundError:
        return

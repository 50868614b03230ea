"""A new index from the records that can still be read on the pages of a damaged one."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError
from kvstore_proto import master_pb2

from kvstore.core.keys import KEY_BYTES
from kvstore.core.ssd_record import SsdRecord
from kvstore.durable import sync_directory
from kvstore.errors import ConfigError, CorruptError
from kvstore.node.index_pages import IndexPages, read_metas
from kvstore.node.ssd_index import HEAD_BYTES, INDEX_NAME, NODE_KEY, SsdIndex

DAMAGED_NAME = "data.mdb.damaged"
NEW_NAME = "index.new"
FILE_NAME = "data.mdb"
LOCK_NAME = "lock.mdb"
PAGE_BYTES = 4096  # where the meta pages do not say it
NODE_ID_BYTES_MAX = 128


class Saved(NamedTuple):
    """What the pages still say. Of the records of one key it is the newest."""

    node_id: str  # empty if it is not to be found
    records: dict[bytes, bytes]
    namespaces: dict[bytes, bytes]


def rebuild_index(folder: Path) -> int:
    """Puts a new index in the place of the damaged one; how many records it has.

    A record is taken if it has its checksum; whether the data file has its bytes is for the
    caller to see. The damaged file is kept beside the new one as ``data.mdb.damaged``. A record
    that was removed not long ago may be back. The new one belongs to the old one's user;
    ConfigError, and nothing is replaced, where it cannot. Killed anywhere, it can be run again.
    """
    path = folder / INDEX_NAME / FILE_NAME
    try:
        saved = _saved(path)
        new = folder / NEW_NAME
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        owner = _owner(path, folder)
        _give([new], owner, path)
        index = SsdIndex(new, len(saved.records), saved.node_id)
        for root, encoded in saved.namespaces.items():
            index.add_namespace(root, encoded)
        index.apply(sorted(saved.records.items()))
        index.close()
        _give(new.rglob("*"), owner, path)
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700)
            _give([path.parent], owner, path)
        if not (lock := path.with_name(LOCK_NAME)).exists():
            os.replace(new / INDEX_NAME / LOCK_NAME, lock)
        with contextlib.suppress(FileNotFoundError):
            path.with_name(DAMAGED_NAME).unlink()
        with contextlib.suppress(FileNotFoundError):
            os.link(path, path.with_name(DAMAGED_NAME))
        os.replace(new / INDEX_NAME / FILE_NAME, path)
        sync_directory(path.parent)
        sync_directory(folder)
        shutil.rmtree(new)
    except OSError as error:
        raise ConfigError(f"SSD index {path}: {error.strerror}") from None
    return len(saved.records)


def _owner(path: Path, folder: Path) -> os.stat_result:
    """Of the index file, or of what is there of the directories that it is to be in."""
    for place in (path, path.parent):
        with contextlib.suppress(FileNotFoundError):
            return place.stat()
    return folder.stat()


def _give(places: Iterable[Path], owner: os.stat_result, path: Path) -> None:
    """Makes them the user's whose node is to open them; ConfigError where that is not allowed."""
    for place in places:
        if place.stat().st_uid == owner.st_uid:
            continue
        try:
            os.chown(place, owner.st_uid, owner.st_gid)
        except OSError as error:
            raise ConfigError(
                f"SSD index {path} belongs to user id {owner.st_uid}, to whom a new one cannot be "
                f"given ({error.strerror}): repair it as that user or as root"
            ) from None


def _saved(path: Path) -> Saved:
    node_ids: Counter[str] = Counter()
    newest: dict[bytes, tuple[int, bytes]] = {}
    namespaces: dict[bytes, bytes] = {}
    for key, value in _entries(path):
        with contextlib.suppress(CorruptError):
            record = SsdRecord.decode(key, value)
            newest[key] = max(newest.get(key, (-1, b"")), (record.sequence, value))
            continue
        if key == NODE_KEY and value.isascii() and len(value) <= NODE_ID_BYTES_MAX:
            node_ids[value.decode()] += 1
        with contextlib.suppress(DecodeError):
            if len(key) == KEY_BYTES and master_pb2.NamespaceReport.FromString(value).root == key:
                namespaces[key] = value
    likely = node_ids.most_common(1)
    records = {key: value for key, (_, value) in newest.items()}
    return Saved(likely[0][0] if likely else "", records, namespaces)


def _entries(path: Path) -> Iterator[tuple[bytes, bytes]]:
    page_bytes = PAGE_BYTES
    try:
        with open(path, "rb") as file, contextlib.suppress(CorruptError):
            page_bytes = read_metas(file.read(HEAD_BYTES))[0].page_bytes
        yield from IndexPages(path, page_bytes).entries()
    except FileNotFoundError:
        return

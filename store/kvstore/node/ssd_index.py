"""The SSD tier's durable index: LMDB from key to record, committed after the data it names."""

import logging
from collections.abc import Iterable
from pathlib import Path

import lmdb

from kvstore.errors import ConfigError

log = logging.getLogger(__name__)

INDEX_NAME = "index"
FORMAT_VERSION = 1
MAP_BYTES_MIN = 256 << 20
ENTRY_BYTES = 1024  # of map for each block: several records, for copy-on-write
_FORMAT_KEY = b"format_version"
_NODE_KEY = b"node_id"


class SsdIndex:
    """What the data file holds; each ``apply`` is one transaction, on disk when it returns."""

    def __init__(self, folder: Path, blocks_max: int, node_id: str) -> None:
        """Opens or creates the index; ConfigError if another format or node owns it."""
        self.path = folder / INDEX_NAME
        map_bytes = max(MAP_BYTES_MIN, blocks_max * ENTRY_BYTES)
        try:
            self._env = lmdb.open(str(self.path), map_size=map_bytes, max_dbs=3, mode=0o600)
        except lmdb.Error as error:
            raise ConfigError(f"SSD index {self.path}: {error}") from None
        self._meta = self._env.open_db(b"meta")
        self._blocks = self._env.open_db(b"blocks")
        self._namespaces = self._env.open_db(b"namespaces")
        try:
            self._check_owner(node_id)
        except ConfigError:
            self._env.close()
            raise

    def _check_owner(self, node_id: str) -> None:
        expected = {_FORMAT_KEY: str(FORMAT_VERSION).encode(), _NODE_KEY: node_id.encode()}
        with self._env.begin(write=True, db=self._meta) as txn:
            for key, value in expected.items():
                found = txn.get(key)
                if found is None:
                    txn.put(key, value)
                elif found != value:
                    raise ConfigError(
                        f"SSD directory {self.path.parent} has {key.decode()} "
                        f"{found.decode(errors='replace')}, this node has {value.decode()}; "
                        "give it an empty --ssd-dir"
                    )

    def entries(self) -> tuple[list[bytes], list[bytes]]:
        """Keys and encoded records of every block."""
        with self._env.begin(db=self._blocks) as txn:
            cursor = txn.cursor()
            return list(cursor.iternext(values=False)), list(cursor.iternext(keys=False))

    def apply(self, changes: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Puts ``(key, record)`` and removes ``(key, None)`` in order, all or nothing, durably.

        Raises lmdb.Error, and then nothing has changed.
        """
        with self._env.begin(write=True, db=self._blocks) as txn:
            for key, record in changes:
                if record is None:
                    txn.delete(key)
                else:
                    txn.put(key, record)

    def namespaces(self) -> dict[bytes, bytes]:
        """Root to encoded namespace, all that ever were opened here."""
        with self._env.begin(db=self._namespaces) as txn:
            return dict(txn.cursor().iternext())

    def add_namespace(self, root: bytes, encoded: bytes) -> None:
        """Remembers a namespace durably; its blocks mean nothing without it."""
        with self._env.begin(write=True, db=self._namespaces) as txn:
            txn.put(root, encoded)

    def close(self) -> None:
        """Closes the environment; nothing may use it any more."""
        self._env.close()

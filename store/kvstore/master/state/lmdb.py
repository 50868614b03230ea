"""Cluster state in one LMDB environment, for a master that is alone."""

import fcntl
import os
import struct
from pathlib import Path

import lmdb
from kvstore_proto import admin_pb2, master_pb2

from kvstore.durable import private_directory, take_lmdb_lock_file
from kvstore.errors import ConfigError, ResourceExhaustedError
from kvstore.master.state.base import FORMAT_VERSION, NAMESPACES_MAX, NODES_MAX, KnownNode

MAP_BYTES = 2 << 30  # of address space: NAMESPACES_MAX of the longest, and their copies
_FORMAT = b"format_version"
_EPOCH = b"cluster_epoch"
_U64 = struct.Struct("<Q")


class LmdbState:
    """MasterState in ``directory``; one process at a time, which a file lock sees to.

    Raises ConfigError where another master has the directory, another build wrote it, or it
    cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"data_dir {directory}: {error.strerror}") from None
        try:
            self._take_lock(directory)
            self._open(directory)
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self, directory: Path) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"data_dir {directory} is in use by another kvstore-master; stop it, or take "
                "another directory"
            ) from None

    def _open(self, directory: Path) -> None:
        try:
            private_directory(directory / "state")
            take_lmdb_lock_file(directory / "state")
            self._env = lmdb.open(
                str(directory / "state"), map_size=MAP_BYTES, max_dbs=3, mode=0o600
            )
        except (lmdb.Error, OSError) as error:
            raise ConfigError(
                f"data_dir {directory}: the state cannot be opened: {error}"
            ) from None
        try:
            self._meta = self._env.open_db(b"meta")
            self._namespaces = self._env.open_db(b"namespaces")
            self._nodes = self._env.open_db(b"nodes")
            self._check_format(directory)
        except lmdb.Error as error:
            self._env.close()
            raise ConfigError(
                f"data_dir {directory}: the state cannot be read and written: {error}; look at "
                "the device and its free space"
            ) from None
        except BaseException:
            self._env.close()
            raise

    def _check_format(self, directory: Path) -> None:
        with self._env.begin(write=True, db=self._meta) as txn:
            raw = txn.get(_FORMAT)
            if raw is None:
                txn.put(_FORMAT, _U64.pack(FORMAT_VERSION))
                return
        found = _U64.unpack(raw)[0] if len(raw) == _U64.size else 0
        if found != FORMAT_VERSION:
            raise ConfigError(
                f"data_dir {directory} has format version {found}; this build reads "
                f"{FORMAT_VERSION}: use the build that wrote it, or an empty directory"
            )

    @property
    def epoch(self) -> int:
        """Newest cluster epoch."""
        with self._env.begin(db=self._meta) as txn:
            return int(_U64.unpack(txn.get(_EPOCH, _U64.pack(0)))[0])

    def raise_epoch(self, at_least: int = 0) -> int:
        """Makes the epoch one more than the newest and than ``at_least``.

        ResourceExhaustedError if it cannot be written; then it stays as it was.
        """
        try:
            with self._env.begin(write=True, db=self._meta) as txn:
                newest = _U64.unpack(txn.get(_EPOCH, _U64.pack(0)))[0]
                epoch = max(newest, at_least) + 1
                txn.put(_EPOCH, _U64.pack(epoch))
        except lmdb.Error as error:
            raise ResourceExhaustedError(f"the cluster state cannot be written: {error}") from None
        return int(epoch)

    def namespaces(self) -> list[master_pb2.NamespaceReport]:
        """Every namespace, in the order of their roots."""
        with self._env.begin(db=self._namespaces) as txn:
            return [master_pb2.NamespaceReport.FromString(raw) for _, raw in txn.cursor()]

    def put_namespace(self, report: master_pb2.NamespaceReport, dropped: bytes = b"") -> None:
        """Adds or replaces one, and forgets ``dropped``."""
        encoded = report.SerializeToString()
        self._put(self._namespaces, report.root, encoded, NAMESPACES_MAX, dropped)

    def nodes(self) -> list[KnownNode]:
        """Every known node, in the order of their ids."""
        with self._env.begin(db=self._nodes) as txn:
            found = [admin_pb2.NodeInfo.FromString(raw) for _, raw in txn.cursor()]
        return [KnownNode(n.node_id, n.address, n.hostname, n.version) for n in found]

    def put_node(self, node: KnownNode) -> None:
        """Adds or replaces one."""
        info = admin_pb2.NodeInfo(
            node_id=node.node_id,
            address=node.address,
            hostname=node.hostname,
            version=node.version,
        )
        self._put(self._nodes, node.node_id.encode(), info.SerializeToString(), NODES_MAX)

    def remove_node(self, node_id: str) -> None:
        """Forgets one."""
        try:
            with self._env.begin(write=True, db=self._nodes) as txn:
                txn.delete(node_id.encode())
        except lmdb.Error as error:
            raise ResourceExhaustedError(f"the cluster state cannot be written: {error}") from None

    def _put(
        self,
        table: "lmdb._Database",
        key: bytes,
        value: bytes,
        entries_max: int,
        dropped: bytes = b"",
    ) -> None:
        try:
            with self._env.begin(write=True, db=table) as txn:
                if dropped:
                    txn.delete(dropped)
                if txn.get(key) is None and txn.stat(table)["entries"] >= entries_max:
                    raise ResourceExhaustedError(f"there are {entries_max} such entries already")
                txn.put(key, value)
        except lmdb.Error as error:
            raise ResourceExhaustedError(f"the cluster state cannot be written: {error}") from None

    def close(self) -> None:
        """Closes the environment and lets go of the directory."""
        self._env.close()
        os.close(self._lock)

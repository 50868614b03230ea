"""Keeps the namespaces of the SSD index up with those that are open; commits on a thread."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor

from google.protobuf.message import DecodeError
from kvstore_proto import master_pb2

from kvstore.core.node_core import NodeCore
from kvstore.errors import CorruptError, KVStoreError
from kvstore.node import translate
from kvstore.node.ssd_index import SsdIndex

log = logging.getLogger(__name__)


def reopen(core: NodeCore, known: Mapping[bytes, bytes], in_use: Iterable[bytes]) -> set[bytes]:
    """Opens the namespaces of roots ``in_use`` whose encoded ones are ``known``; their roots.

    One that cannot be opened is not among them: a client that brings it has it noted anew.
    """
    opened = set()
    for root in in_use:
        if root not in known:
            continue
        try:
            report = master_pb2.NamespaceReport.FromString(known[root])
            if report.root != root:
                raise CorruptError("what is noted of it is of another one")
            core.open_namespace(translate.spec_from_message(report.spec), report.tenant)
            opened.add(root)
        except (DecodeError, KVStoreError) as error:
            log.warning("namespace %s on SSD is not used: %s", root.hex()[:16], error)
    return opened


class NamespaceKeeper:
    """``known`` are the roots that the index has.

    A commit takes as long as the medium does, seconds behind a busy one. There is one at a time;
    it takes in whatever was opened, and has gone, before it begins.
    """

    def __init__(self, core: NodeCore, index: SsdIndex, known: Iterable[bytes]) -> None:
        self.known = set(known)
        self._core = core
        self._index = index
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "ssd-namespaces")
        self._commit: asyncio.Future[bool] | None = None
        self._fresh: Set[bytes] = frozenset()  # roots that the commit under way brings

    async def keep(self, root: bytes) -> None:
        """Returns when the index has the namespace durably, or has refused it."""
        while root not in self.known:
            commit = self._commit or self._begin()
            tried = root in self._fresh
            await asyncio.wait({commit})
            if tried:
                return

    def close(self) -> None:
        """Waits for the commit that is under way; the index stays open."""
        self._thread.shutdown()

    def _begin(self) -> "asyncio.Future[bool]":
        opened = {n.root: n for n in self._core.namespaces()}
        gone = self.known - opened.keys()
        self.known -= gone  # at once: one that is opened again meanwhile must be kept again
        fresh = {
            root: translate.namespace_to_message(namespace).SerializeToString()
            for root, namespace in opened.items()
            if root not in self.known and namespace.spec is not None
        }
        commit = self._loop.run_in_executor(
            self._thread, self._index.change_namespaces, fresh, gone
        )
        commit.add_done_callback(lambda ended: self._ended(ended, fresh.keys(), gone))
        self._commit, self._fresh = commit, fresh.keys()
        return commit

    def _ended(self, commit: "asyncio.Future[bool]", fresh: Set[bytes], gone: Set[bytes]) -> None:
        self._commit = None
        self.known |= fresh if commit.result() else gone

"""The node as a whole: its tiers, its core, its clients, and its link to the master."""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path

from kvstore_proto import node_pb2

import kvstore
from kvstore.core.directory import DirectoryWriter, entries_for
from kvstore.core.effects import BlockEvent, DropSsd, Effects
from kvstore.core.node_core import NodeCore
from kvstore.core.spec import SLOT_ALIGN_BYTES, CacheSpec
from kvstore.core.ssd_columns import SsdColumns
from kvstore.core.types import CoreConfig, Namespace, Tier
from kvstore.durable import write_durably
from kvstore.errors import ConfigError, NotFoundError
from kvstore.node.auditor import Auditor
from kvstore.node.clients import Clients
from kvstore.node.dir_lock import DirectoryLock
from kvstore.node.driver import Driver
from kvstore.node.hbm import HbmInventory
from kvstore.node.huge_pages import HugePages
from kvstore.node.master_link import MasterLink
from kvstore.node.namespaces import NamespaceKeeper, reopen
from kvstore.node.pool import SharedFile, check_room, remove_dead_siblings, remove_stale_files
from kvstore.node.scrub import Scrubber
from kvstore.node.settings import NodeConfig
from kvstore.node.ssd import SsdTier
from kvstore.node.ssd_file import SsdFile
from kvstore.node.ssd_index import SsdIndex

log = logging.getLogger(__name__)

ID_NAME = "node_id"
DRAIN_TIMEOUT_S = 8.0
READS_IN_FLIGHT_MAX = 64  # blocks; neighbours go as one request
SESSIONS_HELD = 4  # sessions, for each that may be open, whose client is lost or restarting


def page_multiple(nbytes: int) -> int:
    """``nbytes`` rounded down to whole pages."""
    return nbytes // SLOT_ALIGN_BYTES * SLOT_ALIGN_BYTES


def persistent_node_id(config: NodeConfig) -> str:
    """The configured id, or the one kept in the data directory, or a new one, kept from now on."""
    if config.node_id:
        return config.node_id
    path = config.data_dir / ID_NAME
    try:
        if path.exists():
            kept = path.read_text(encoding="utf-8")
        else:
            kept = f"node-{random.SystemRandom().getrandbits(48):012x}\n"
            write_durably(path, kept.encode())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"node id file {path}: {error}") from None
    if not kept.strip() or not kept.endswith("\n"):
        raise ConfigError(
            f"node id file {path} is cut off, it has {kept!r}: write the id of this node and a "
            "newline into it; without an SSD tier, or with an empty one, the file may be removed"
        )
    # Goes through the checks of a configured id.
    return NodeConfig(node_id=kept.strip()).node_id


class Node:
    """Everything of one kvstore-node but its servers; made, used and closed on one event loop."""

    def __init__(self, config: NodeConfig) -> None:
        """Takes the directories, makes the pool, and finds the blocks on SSD again.

        Raises ConfigError where a directory is another node's, or a tier has no room.
        """
        self.config = config
        self.instance = random.SystemRandom().getrandbits(63) | 1
        self.hbm = HbmInventory()
        self.address = config.address
        with contextlib.ExitStack() as resources:
            resources.callback(DirectoryLock(config.data_dir).release)
            self.node_id = persistent_node_id(config)
            self._open_pool(resources)
            core_config = CoreConfig(
                dram_bytes=self.pool.size_bytes,
                ssd_bytes=page_multiple(config.ssd),
                ssd_admission=config.ssd_admission,
                reads_in_flight_max=READS_IN_FLIGHT_MAX,
                sessions_max=SESSIONS_HELD * config.sessions_max,
            )
            ssd = self._open_ssd(resources, core_config) if config.ssd else None
            self.core = NodeCore(core_config, self.directory)
            self.auditor = Auditor(self.core, self._look_at_ssd)
            self.driver = Driver(self.core, self._block_events)
            resources.callback(self.driver.close)
            self.clients = Clients(
                self.driver, quarantine_s=config.quarantine_s, sessions_max=config.sessions_max
            )
            resources.callback(self.clients.close)
            self.link = MasterLink(config.master, self)
            self.scrubber: Scrubber | None = None
            self.namespaces: NamespaceKeeper | None = None
            restored = self._restore(resources, ssd[1]) if ssd is not None else Effects()
            self.pool.wait_taken()
            self.huge_pages = HugePages(self.pool)
            resources.callback(self.huge_pages.close)
            if ssd is not None:
                memory = self.pool.map.memory
                try:
                    ssd[0].probe(memory)
                except OSError as error:
                    raise ConfigError(f"SSD file {ssd[0].path}: {error.strerror}") from None
                self.driver.ssd = SsdTier(
                    *ssd, memory, self.driver, prove_all=config.ssd_write_checks == "all"
                )
                resources.callback(self.driver.ssd.close)
                self._open_scrubber(resources, ssd[0].path)
            self.driver.apply(restored)
            self._resources = resources.pop_all()

    def _open_pool(self, resources: contextlib.ExitStack) -> None:
        config = self.config
        if not config.pool_dir.is_dir():
            raise ConfigError(f"pool_dir {config.pool_dir} is not a directory")
        folder = config.pool_dir / f"kvstore-{os.getuid()}-{self.node_id}"
        resources.callback(DirectoryLock(folder).release, remove=True)
        stale = remove_stale_files(folder) + remove_dead_siblings(folder)
        if stale:
            log.info("removed %d pool files of instances that were killed", stale)
        pool_bytes = page_multiple(config.dram)
        entries = entries_for(pool_bytes + config.ssd)
        directory_bytes = DirectoryWriter.size_bytes(entries, pool_bytes)
        name = f"{self.instance:016x}"
        check_room(folder, pool_bytes)  # first, as its size is the one that was asked for
        self.directory_file = SharedFile(folder / f"directory-{name}", directory_bytes)
        resources.callback(self.directory_file.close)
        self.directory_file.wait_taken()
        self.pool = SharedFile(folder / f"pool-{name}", pool_bytes, touch=False)
        resources.callback(self.pool.close)
        self.directory = DirectoryWriter(
            self.directory_file.map.memory,
            entries=entries,
            pool_bytes=pool_bytes,
            instance=self.instance,
        )

    def _open_ssd(
        self, resources: contextlib.ExitStack, core_config: CoreConfig
    ) -> tuple[SsdFile, SsdIndex]:
        folder = self.config.ssd_path
        if folder.resolve() != self.config.data_dir.resolve():  # else it is locked already
            resources.callback(DirectoryLock(folder).release)
        index = SsdIndex(folder, core_config.blocks_max, self.node_id)
        resources.callback(index.close)
        index.check_data_file()
        # Before the file is made shorter: else it would look cut off after a crash in between.
        if (index.data_bytes() or 0) > core_config.ssd_bytes:
            index.note_data_bytes(core_config.ssd_bytes)
        file = SsdFile(folder, core_config.ssd_bytes)
        resources.callback(file.close)
        index.note_data_bytes(file.capacity_bytes)
        return file, index

    def _restore(self, resources: contextlib.ExitStack, index: SsdIndex) -> Effects:
        """Takes over what an earlier instance left on SSD, while the pool's pages are taken."""
        records, broken = SsdColumns.decoded(index.batches(), index.count())
        roots = records.roots()
        known = index.keep_namespaces(set(roots))
        # Each has blocks to come, of which the core does not know yet: one over the limit would
        # push another out.
        opened = reopen(self.core, known, roots[: self.core.config.namespaces_max])
        self.namespaces = NamespaceKeeper(self.core, index, opened)
        resources.callback(self.namespaces.close)
        newest = index.go_on_after(records.numbers("sequence"))
        effects = self.core.restore(records, newest)
        effects.drops += [DropSsd(-1, key, 0) for key in broken]
        if effects.drops:
            log.warning("%d records on SSD cannot be used and are removed", len(effects.drops))
        log.info("found %d blocks on SSD", len(records))
        return effects

    def _open_scrubber(self, resources: contextlib.ExitStack, path: Path) -> None:
        if self.config.scrub_mb_s:
            self.scrubber = Scrubber(self.driver, path, self.config.scrub_mb_s)
            resources.callback(self.scrubber.close)

    def _look_at_ssd(self) -> None:
        if self.driver.ssd is not None:
            self.driver.ssd.look()

    def start(self) -> None:
        """Begins what goes on in the background; the node serves already."""
        self.link.start()
        self.auditor.start()
        self.huge_pages.start()
        if self.scrubber is not None:
            self.scrubber.start()

    async def close(self) -> None:
        """Finishes SSD writes, tells readers of the directory, and removes the pool's files."""
        try:
            await self.link.stop()
            await self.auditor.stop()
            if self.scrubber is not None:
                await self.scrubber.stop()
            if self.driver.ssd is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_TIMEOUT_S):
                        await self.driver.ssd.drain()
            self.directory.close_directory()
        finally:
            self._resources.close()

    def welcome(self) -> node_pb2.Welcome:
        """What a client needs to know of this node."""
        return node_pb2.Welcome(
            node_id=self.node_id,
            instance=self.instance,
            pool_path=str(self.pool.path),
            pool_bytes=self.pool.size_bytes,
            directory_path=str(self.directory_file.path),
            directory_bytes=self.directory_file.size_bytes,
            cluster_epoch=self.core.epoch.newest,
            version=kvstore.__version__,
            has_master=self.link.connected,
        )

    async def open_namespace(self, spec: CacheSpec, tenant: str, session_id: int) -> Namespace:
        """The namespace of a spec; durable before anything is stored in it, if the SSD works.

        At the limit another one goes, if nothing needs it. Errors: NodeCore.open_namespace.
        """
        namespace = self.core.open_namespace(spec, tenant, session_id, self.hbm.roots)
        self.link.namespaces_changed()
        if self.namespaces is not None:
            await self.namespaces.keep(namespace.root)
        return namespace

    def problems(self) -> list[str]:
        """What an operator should look at, in words; empty while all is well."""
        ssd = self.driver.ssd
        if ssd is not None and ssd.failed:
            return [
                f"SSD takes no more writes ({ssd.failed}); reads and DRAM go on, new blocks are in "
                "memory only; look at the device, then restart the node"
            ]
        if ssd is not None and ssd.full:
            return [
                f"SSD index has no room ({ssd.full}); new blocks are in memory only; free space in "
                f"{self.config.ssd_path}"
            ]
        return []

    def sessions_open(self) -> int:
        """Sessions of clients whose stream is open."""
        return self.clients.open_count

    def now(self) -> float:
        """Monotonic seconds."""
        return self.driver.now()

    def apply(self, effects: Effects) -> None:
        """Carries out what a call of the core wants done."""
        self.driver.apply(effects)

    def hbm_events(self, engine_id: str, events: node_pb2.HbmEvents) -> None:
        """Blocks came into or left an engine's own pages."""
        root = next((n.root for n in self.core.namespaces() if n.id == events.namespace_id), None)
        if root is None:
            raise NotFoundError(f"namespace {events.namespace_id} is not open")
        self.hbm.change(root, engine_id, events.stored, events.removed, cleared=events.cleared)
        self.link.changed(
            root, Tier.HBM, engine_id, events.stored, events.removed, cleared=events.cleared
        )

    def session_ended(self, engine_id: str) -> None:
        """What an engine without a session has in its pages is not to be counted on."""
        if self.clients.has_engine(engine_id):
            return
        for root in self.hbm.roots_of(engine_id):
            self.hbm.clear(root, engine_id)
            self.link.changed(root, Tier.HBM, engine_id, b"", b"", cleared=True)

    def _block_events(self, events: Sequence[BlockEvent]) -> None:
        for root, tier, keys, stored in events:
            self.link.changed(root, tier, "", keys if stored else b"", b"" if stored else keys)

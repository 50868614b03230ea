"""What the master's tests share: a master in process, fake nodes, waiting with a deadline."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from kvstore.core.keys import namespace_root
from kvstore.core.spec import CacheSpec
from kvstore.daemon import start_grpc_server
from kvstore.master.admin import AdminService
from kvstore.master.cluster import Cluster
from kvstore.master.config import MasterConfig
from kvstore.master.service import MasterService
from kvstore.master.serving import SERVICE_NAMES
from kvstore.master.state.lmdb import LmdbState
from kvstore_proto import (
    admin_pb2_grpc,
    common_pb2,
    master_pb2,
    master_pb2_grpc,
)

DEADLINE_S = 10.0
SPEC = CacheSpec.raw("tests", block_bytes=4096, block_tokens=4)
ROOT = namespace_root(SPEC)
DRAM, SSD, HBM = common_pb2.TIER_DRAM, common_pb2.TIER_SSD, common_pb2.TIER_HBM


def spec_message(spec: CacheSpec = SPEC) -> common_pb2.CacheSpec:
    return common_pb2.CacheSpec(**{f: getattr(spec, f) for f in spec.__dataclass_fields__})


def keys(*numbers: int) -> bytes:
    return b"".join(n.to_bytes(32, "big") for n in numbers)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition, at most DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


@dataclass
class Master:
    """A serving master and stubs to talk to it."""

    cluster: Cluster
    address: str
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return master_pb2_grpc.MasterStub(self.channel)

    @property
    def admin(self) -> Any:
        return admin_pb2_grpc.AdminStub(self.channel)

    async def node(self, node_id: str = "node-a", **options: Any) -> "FakeNode":
        """A connected node that was welcomed."""
        node = FakeNode(self, node_id)
        await node.hello(**options)
        return node

    async def ready_node(self, node_id: str = "node-a", **blocks: bytes) -> "FakeNode":
        """A node whose inventory is ``blocks``: keys by tier name."""
        node = await self.node(node_id)
        await node.namespace()
        for tier, joined in blocks.items():
            await node.inventory(common_pb2.Tier.Value(f"TIER_{tier.upper()}"), joined)
        await node.end_inventory(sum(map(len, blocks.values())) // 32)
        await until(lambda: self.cluster.members.nodes[node_id].state.value == "ready")
        return node

    async def found(self, joined: bytes) -> int:
        return int((await self.stub.Locate(master_pb2.LocateRequest(keys=joined))).found)


class FakeNode:
    """The master's side of a node: one stream."""

    def __init__(self, master: Master, node_id: str) -> None:
        self.node_id = node_id
        self.call = master.stub.Session()

    async def report(self, **report: Any) -> None:
        await self.call.write(master_pb2.NodeReport(**report))

    async def hello(
        self, *, version: int = 1, instance: int = 1, epoch: int = 0, address: str = ""
    ) -> None:
        await self.report(
            hello=master_pb2.NodeHello(
                protocol_version=version,
                node_id=self.node_id,
                instance=instance,
                address=address or f"unix:/{self.node_id}",
                version="0.1.0",
                cluster_epoch=epoch,
                hostname="host",
            )
        )
        self.welcome = (await self.directive()).welcome

    async def directive(self) -> master_pb2.Directive:
        async with asyncio.timeout(DEADLINE_S):
            directive = await self.call.read()
        if directive is grpc.aio.EOF:
            raise grpc.RpcError(f"{await self.call.code()}: {await self.call.details()}")
        assert isinstance(directive, master_pb2.Directive)
        return directive

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the master ended the stream; its status comes after what it had sent."""
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            return await self.call.code(), await self.call.details()

    async def namespace(self, spec: CacheSpec = SPEC) -> None:
        await self.report(
            namespace=master_pb2.NamespaceReport(
                root=namespace_root(spec), spec=spec_message(spec), tenant="default"
            )
        )

    async def inventory(self, tier: int, joined: bytes, root: bytes = ROOT) -> None:
        await self.report(
            inventory=master_pb2.BlockEvents(root=root, tier=tier, stored=joined)  # type: ignore[arg-type]
        )

    async def end_inventory(self, blocks: int) -> None:
        await self.report(inventory_end=master_pb2.InventoryEnd(blocks=blocks))

    async def delta(self, tier: int, root: bytes = ROOT, **changes: Any) -> None:
        await self.report(delta=master_pb2.BlockEvents(root=root, tier=tier, **changes))  # type: ignore[arg-type]

    async def heartbeat(self, **usage: int) -> None:
        tiers = [common_pb2.TierUsage(tier=DRAM, **usage)]
        await self.report(heartbeat=master_pb2.Heartbeat(tiers=tiers, sessions=3))

    async def answer(self, **result: Any) -> master_pb2.Directive:
        """Reads one directive and answers it with ``result``."""
        directive = await self.directive()
        await self.report(result=master_pb2.DirectiveResult(id=directive.id, **result))
        return directive

    def drop(self) -> None:
        """The stream breaks."""
        self.call.cancel()


@contextlib.asynccontextmanager
async def start_master(data_dir: Path, **options: Any) -> AsyncIterator[Master]:
    """A master on a port of its own; ended, its state is what a killed one leaves."""
    config = MasterConfig(
        **{"listen": "127.0.0.1:0", "data_dir": data_dir, "heartbeat_ms": 60_000, **options}
    )
    with contextlib.closing(LmdbState(config.data_dir)) as state:
        cluster = Cluster(config, state)

        def register(server: grpc.aio.Server) -> None:
            master_pb2_grpc.add_MasterServicer_to_server(MasterService(cluster), server)
            admin_pb2_grpc.add_AdminServicer_to_server(AdminService(cluster), server)

        server = await start_grpc_server(config.listen, register, SERVICE_NAMES)
        watchdog = asyncio.create_task(cluster.watch_nodes())
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield Master(cluster, server.address, channel)
        finally:
            watchdog.cancel()
            await server.stop(0)
            await cluster.written()

"""kvstore-node: start, serve, stop."""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence

from kvstore_proto import node_pb2, node_pb2_grpc

from kvstore import daemon
from kvstore.faultpoint import enable_faultpoints
from kvstore.node.malloc import keep_little_freed_memory
from kvstore.node.metrics import node_registry
from kvstore.node.node import Node
from kvstore.node.service import NodeService, request_bytes_max
from kvstore.node.settings import NodeConfig

log = logging.getLogger(__name__)

PROG = "kvstore-node"
SERVICE_NAME = node_pb2.DESCRIPTOR.services_by_name["Node"].full_name
SSD_SERVICE_NAME = f"{SERVICE_NAME}.ssd"  # to health checkers
STOP_GRACE_S = 0.5
HEALTH_S = 0.5
SWITCH_S = 0.0005  # how long a disk thread waits for the interpreter; 5 ms is longer than its I/O


async def _show_ssd_health(node: Node, server: daemon.GrpcServer) -> None:
    """Keeps the health of the SSD tier current. The node itself serves on when that fails."""
    shown = None
    while True:
        if (serving := not node.problems()) != shown:
            shown = serving
            await server.set_health(SSD_SERVICE_NAME, serving=serving)
        await asyncio.sleep(HEALTH_S)


async def serve(config: NodeConfig) -> None:
    """Runs a node until a signal tells it to stop."""
    daemon.setup_logging(config.log_level)
    sys.setswitchinterval(SWITCH_S)
    stop = daemon.stop_event()
    daemon.check_loopback(config.address, insecure=config.insecure)
    async with contextlib.AsyncExitStack() as running:
        node = Node(config)
        running.push_async_callback(node.close)
        # Not before: the restore takes and frees large pieces, each of which would be mapped anew
        # while other threads map the pool.
        keep_little_freed_memory()
        server = await daemon.start_grpc_server(
            config.address,
            lambda server: node_pb2_grpc.add_NodeServicer_to_server(NodeService(node), server),
            [SERVICE_NAME],
            insecure=config.insecure,
            request_bytes_max=request_bytes_max(node.core.config),
        )
        running.push_async_callback(server.stop, STOP_GRACE_S)
        if config.metrics_listen:
            metrics = daemon.MetricsServer(
                node_registry(node), config.metrics_listen, insecure=config.insecure
            )
            running.callback(metrics.stop)
            log.info("metrics on http://%s/metrics", metrics.address)
        if config.ssd:
            watching = asyncio.create_task(_show_ssd_health(node, server))
            running.callback(watching.cancel)
        running.callback(node.clients.end_all)
        node.address = server.address
        node.start()
        daemon.announce(f"{PROG} ready: {server.address}")
        await stop.wait()
        log.info("stopping")


def run(argv: Sequence[str] | None = None) -> None:
    """Serves as ``argv`` says; exits with 2 for wrong usage, with 1 if the node failed."""
    config = daemon.load_config_or_exit(
        NodeConfig,
        prog=PROG,
        description="Owns one host's DRAM pool and SSD tier of the KV cache.",
        env_prefix="KVSTORE_NODE_",
        argv=argv,
    )
    enable_faultpoints(os.environ)
    daemon.run_daemon(PROG, serve(config))

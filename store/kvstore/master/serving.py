"""kvstore-master: start, serve, stop."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import grpc
from kvstore_proto import admin_pb2_grpc, master_pb2_grpc

from kvstore.daemon import (
    MetricsServer,
    announce,
    load_config_or_exit,
    run_daemon,
    setup_logging,
    start_grpc_server,
    stop_event,
)
from kvstore.master.admin import AdminService
from kvstore.master.cluster import Cluster
from kvstore.master.config import MasterConfig
from kvstore.master.service import MasterService
from kvstore.master.state.lmdb import LmdbState

log = logging.getLogger(__name__)

SERVICE_NAMES = ("kvstore.v1.Master", "kvstore.v1.Admin")
DESCRIPTION = "Index of all nodes' blocks, cluster state and admin service of kvstore."


async def serve(config: MasterConfig) -> None:
    """Runs a master until a signal tells it to stop. Raises ConfigError where it cannot start."""
    stopping = stop_event()
    with contextlib.closing(LmdbState(config.data_dir)) as state:
        cluster = Cluster(config, state)

        def register(server: grpc.aio.Server) -> None:
            master_pb2_grpc.add_MasterServicer_to_server(MasterService(cluster), server)
            admin_pb2_grpc.add_AdminServicer_to_server(AdminService(cluster), server)

        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(cluster.written)  # after the server has stopped
            server = await start_grpc_server(
                config.listen, register, SERVICE_NAMES, insecure=config.insecure
            )
            stack.push_async_callback(server.stop)
            if config.metrics_listen:
                metrics = MetricsServer(
                    cluster.metrics.registry, config.metrics_listen, insecure=config.insecure
                )
                stack.callback(metrics.stop)
                log.info("metrics on http://%s/metrics", metrics.address)
            watchdog = asyncio.create_task(cluster.watch_nodes())
            stack.callback(watchdog.cancel)
            announce(f"kvstore-master ready: {server.address}")
            await stopping.wait()


def run(argv: Sequence[str] | None = None) -> None:
    """Serves as ``argv`` says; exits with 2 for wrong usage, with 1 if the master failed."""
    config = load_config_or_exit(
        MasterConfig,
        prog="kvstore-master",
        description=DESCRIPTION,
        env_prefix="KVSTORE_MASTER_",
        argv=argv,
    )
    run_daemon("kvstore-master", _run(config))


async def _run(config: MasterConfig) -> None:
    setup_logging(config.log_level)
    await serve(config)

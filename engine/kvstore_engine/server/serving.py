"""kvstore-engine: an HTTP server in this process, the engine in a child."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Sequence

import uvicorn
from kvstore.daemon import (
    announce,
    check_loopback,
    load_config_or_exit,
    run_daemon,
    setup_logging,
    stop_event,
)
from kvstore.errors import ConfigError, UnavailableError

from kvstore_engine.model_source import find_model
from kvstore_engine.server.app import create_app
from kvstore_engine.server.config import ServerConfig
from kvstore_engine.server.engine_client import ENGINE_COMMAND, EngineClient
from kvstore_engine.server.http_server import LEAVING_S, Connection, HttpServer
from kvstore_engine.server.metrics import Metrics
from kvstore_engine.server.service import Service
from kvstore_engine.tokenizer import load_tokenizer

PROG = "kvstore-engine"
DRAIN_S = 5.0  # open requests may finish this long after a signal to stop
DEAD_LINGER_S = 1.0  # health says 503 this long before the server follows a dead engine
KEEP_ALIVE_S = 60
ERRORS_S = 0.5  # told to stop again, clients have this long to take the errors of open requests
BACKLOG = 2048

log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is known before anything is loaded."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(found[0], found[1])
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}: {error.strerror}; take another --host"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; take another --port"
        ) from None
    return listener


async def serve(config: ServerConfig, command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Serves until a signal says stop; raises KVStoreError where it cannot start or go on."""
    setup_logging(config.log_level)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))
    check_loopback(f"{config.host}:{config.port}", insecure=config.insecure, unix=False)
    engine_config = config.engine()
    find_model(config.model)
    stop, hurry = stop_event(), asyncio.Event()
    hearing = asyncio.create_task(_hear_again(stop, hurry))
    with contextlib.closing(listen(config.host, config.port)) as listener:
        engine = EngineClient(command)
        try:
            await engine.start(engine_config)
            tokenizer = await asyncio.to_thread(load_tokenizer, config.model)
            metrics = Metrics(lambda: engine.stats)
            service = Service(
                engine, tokenizer, metrics, names=(config.model,), open_max=config.max_waiting
            )
            await run_http(service, listener, config, stop, hurry)
        finally:
            await engine.close(hurry)
            hearing.cancel()


async def _hear_again(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """Sets ``hurry`` at a signal that comes after the one that set ``stop``."""
    await stop.wait()
    await stop_event().wait()
    log.warning("told to stop again: ending at once")
    hurry.set()


async def run_http(
    service: Service,
    listener: socket.socket,
    config: ServerConfig,
    stop: asyncio.Event,
    hurry: asyncio.Event,
) -> None:
    """Answers HTTP from now on, first with 503; ends when the engine fails or ``stop`` is set.

    Open requests then have DRAIN_S to finish, unless ``hurry`` is set.
    """
    http = HttpServer(
        uvicorn.Config(
            create_app(service),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(DRAIN_S) + 2 + LEAVING_S,
        )
    )
    answering = asyncio.create_task(http.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    forcing = asyncio.create_task(_force(http, hurry))
    port = listener.getsockname()[1]
    try:
        await _until_stopped(service.engine, stopping, f"http://{config.host}:{port}")
    finally:
        stopping.cancel()
        http.should_exit = True
        service.bodies.stop()
        await _drain(service.engine, hurry)
        await answering
        forcing.cancel()


async def _force(http: HttpServer, hurry: asyncio.Event) -> None:
    """In a hurry, leaves clients that do not take their answers."""
    await hurry.wait()
    await asyncio.sleep(ERRORS_S)
    http.abandon()
    http.force_exit = True


async def _until_stopped(engine: EngineClient, stopping: asyncio.Task[bool], url: str) -> None:
    """Returns when told to stop; raises KVStoreError if the engine ends before."""
    start_s = time.monotonic()
    ready = asyncio.create_task(engine.wait_ready())
    await asyncio.wait((ready, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        ready.cancel()
        return
    facts = ready.result()
    log.info(
        "%s is loaded after %.1f s: context %d tokens, %d pages of %d tokens",
        facts.model,
        time.monotonic() - start_s,
        facts.max_context,
        facts.num_pages,
        facts.page_tokens,
    )
    announce(f"{PROG} ready: {url}")
    ended = asyncio.create_task(engine.ended.wait())
    await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
    if ended.done() and not stopping.done():
        await asyncio.sleep(DEAD_LINGER_S)
        raise UnavailableError(engine.death)
    ended.cancel()


async def _drain(engine: EngineClient, hurry: asyncio.Event) -> None:
    """Lets open requests finish for a while, then ends them with an error of their own."""
    if engine.open_requests:
        log.info(
            "waiting up to %.0f s for %d open requests; a second signal ends them at once",
            DRAIN_S,
            engine.open_requests,
        )
    waits = [asyncio.create_task(event.wait()) for event in (engine.idle, hurry)]
    await asyncio.wait(waits, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    engine.retire("the server is shutting down")


def run(argv: Sequence[str] | None = None) -> None:
    """Serves as ``argv`` says; exits with 2 for wrong usage, with 1 for another failure."""
    config = load_config_or_exit(
        ServerConfig,
        prog=PROG,
        description="Serves a model over an OpenAI-compatible HTTP API.",
        env_prefix="KVSTORE_ENGINE_",
        argv=argv,
    )
    run_daemon(PROG, serve(config))

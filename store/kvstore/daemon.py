"""Plumbing that the node and the master share: start, listen, report errors, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from kvstore.config import ConfigT, parse_command_line, split_host_port
from kvstore.errors import ConfigError, InvalidArgumentError, KVStoreError
from kvstore.http_metrics import MetricsHttpServer

log = logging.getLogger(__name__)

LOG_LEVELS = ("debug", "info", "warning", "error")
# SIGHUP: the terminal was closed. `nohup` has it ignored.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")
UNIX_PATH_BYTES_MAX = 107
MESSAGE_BYTES_MAX = 64 << 20  # that a daemon sends, or takes from who it connected to
REQUEST_BYTES_MAX = 8 << 20  # that it takes from whoever connects
_STATUS_BY_CODE = {int(status.value[0]): status for status in grpc.StatusCode}


def setup_logging(level: str) -> None:
    """Logs to stderr, one line an event."""
    if level not in LOG_LEVELS:
        raise ConfigError(f"log_level {level!r}; take one of {', '.join(LOG_LEVELS)}")
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )


def load_config_or_exit(
    cls: type[ConfigT],
    *,
    prog: str,
    description: str,
    env_prefix: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ConfigT:
    """The daemon's configuration; a usage error is one line on stderr and exit code 2."""
    try:
        return parse_command_line(
            cls,
            prog=prog,
            description=description,
            env_prefix=env_prefix,
            argv=argv,
            environ=os.environ if environ is None else environ,
        )
    except ConfigError as error:
        sys.stderr.write(f"{prog}: {error}\n")
        raise SystemExit(2) from None


def run_daemon(prog: str, main: Coroutine[Any, Any, None]) -> None:
    """Runs the daemon until it ends; a ConfigError exits with 2, another KVStoreError with 1."""
    raise_file_limit()
    try:
        asyncio.run(main)
    except KVStoreError as error:
        sys.stderr.write(f"{prog}: {error}\n")
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


def raise_file_limit() -> None:
    """As many open files as this process may have; what it inherits is meant for ``select``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # the system may allow less by now
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class StopEvent(asyncio.Event):
    """Set by the signal that tells this process to stop."""

    signum = 0

    def tell(self, signum: int) -> None:
        """Sets the event; the first signal is kept."""
        self.signum = self.signum or signum
        self.set()


def stop_event() -> StopEvent:
    """An event of the running loop that STOP_SIGNALS set, but for what was ignored before."""
    event = StopEvent()
    loop = asyncio.get_running_loop()
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            loop.add_signal_handler(signum, event.tell, signum)
    return event


def announce(line: str) -> None:
    """Prints one line to stdout for whoever started the daemon and waits for it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def check_loopback(address: str, *, insecure: bool, unix: bool = True) -> None:
    """Refuses an address that others on the network reach, unless told ``--insecure``.

    ``unix``: whether the server could take a Unix socket instead.
    """
    if address.startswith("unix:"):
        return
    host, _ = split_host_port(address)
    if host not in LOOPBACK_HOSTS and not insecure:
        raise ConfigError(
            f"listening on {address} without TLS lets anyone on the network in; "
            f"take 127.0.0.1{' or unix:PATH' if unix else ''}, or pass --insecure"
        )


def check_address(address: str, flag: str, *, insecure: bool) -> None:
    """ConfigError if nothing can listen on ``address``, which ``flag`` sets.

    Clears a dead socket file away.
    """
    check_loopback(address, insecure=insecure)
    if address.startswith("unix:"):
        _check_unix_socket(Path(address.removeprefix("unix:")), flag)
    else:
        _check_port(address, flag)


def _check_unix_socket(path: Path, flag: str) -> None:
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        raise ConfigError(
            f"socket path {path} is longer than {UNIX_PATH_BYTES_MAX} bytes; "
            f"take a shorter one, such as {flag} unix:/run/user/{os.getuid()}/kvstore.sock"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"socket path {path}: its directory does not exist")
    if not path.exists():
        return
    if path.is_dir():
        raise ConfigError(f"socket path {path} is a directory; name a file in it, with {flag}")
    if not path.is_socket():
        raise ConfigError(f"socket path {path} is a file of another kind; remove it")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except PermissionError:
            raise ConfigError(
                f"socket path {path} belongs to another user; take another {flag}"
            ) from None
        except OSError as error:
            raise ConfigError(f"socket path {path}: {error.strerror or error}") from None
    raise ConfigError(
        f"address unix:{path} is in use by another process; stop that, or take another {flag}"
    )


def _check_port(address: str, flag: str) -> None:
    # gRPC would log lines of its own to stderr.
    host, port = split_host_port(address)
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], found[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise _cannot_listen(address, error, flag) from None


def _cannot_listen(address: str, error: OSError, flag: str) -> ConfigError:
    remedy = f"take another {flag}"
    if error.errno == errno.EADDRINUSE:
        remedy = f"stop what listens there (another kvstore?), or {remedy}"
    return ConfigError(f"cannot listen on {address}: {error.strerror or error}; {remedy}")


def bind(server: grpc.aio.Server, address: str, flag: str) -> str:
    """Binds ``server`` and returns the address with the port that was taken."""
    check_address(address, flag, insecure=True)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if not port:
        raise ConfigError(f"cannot listen on {address}: it is in use or not of this machine")
    if address.startswith("unix:"):
        os.chmod(address.removeprefix("unix:"), 0o600)
        return address
    return f"{split_host_port(address)[0]}:{port}"


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: KVStoreError) -> NoReturn:
    """Ends a call with the status of ``error``."""
    await context.abort(_STATUS_BY_CODE[error.code], str(error))


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """The one place that turns a KVStoreError of a handler into a gRPC status.

    Handlers are coroutines or, where they stream, async generators; anything that is not a
    KVStoreError is a bug: logged here with its traceback, INTERNAL to the caller. Bytes that are
    no message of the method are INVALID_ARGUMENT, and not logged: anybody can send them.
    """

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        changed: dict[str, Any] = {}
        if not handler.request_streaming and handler.request_deserializer:
            changed["request_deserializer"] = _decoded_or_error(handler.request_deserializer)
        for kind in ("unary_unary", "stream_unary", "unary_stream", "stream_stream"):
            if (inner := getattr(handler, kind)) is not None:
                changed[kind] = _guarded(inner)
        return handler._replace(**changed)  # type: ignore[no-any-return]


def _decoded_or_error(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Hands an error on as if it were the request; gRPC would log it with a traceback."""

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return error

    return decoded


def _check_decoded(request: Any) -> None:
    if isinstance(request, DecodeError):
        raise request


def _malformed(error: DecodeError) -> InvalidArgumentError:
    return InvalidArgumentError(f"the request is no message of this method: {error}")


def _guarded(inner: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: Any) -> Any:
        try:
            _check_decoded(request)
            return await inner(request, context)
        except DecodeError as error:
            await abort_with(context, _malformed(error))
        except KVStoreError as error:
            await abort_with(context, error)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("handler failed")
            await context.abort(grpc.StatusCode.INTERNAL, "a bug; the daemon's log has it")

    async def stream(request: Any, context: Any) -> Any:
        try:
            _check_decoded(request)
            async for response in inner(request, context):
                yield response
        except DecodeError as error:
            await abort_with(context, _malformed(error))
        except KVStoreError as error:
            await abort_with(context, error)
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception:
            log.exception("handler failed")
            await context.abort(grpc.StatusCode.INTERNAL, "a bug; the daemon's log has it")

    return stream if inspect.isasyncgenfunction(inner) else call


@dataclass(frozen=True)
class GrpcServer:
    """A serving gRPC server with health and reflection."""

    server: grpc.aio.Server
    address: str
    health: health.aio.HealthServicer

    async def set_health(self, service_name: str, *, serving: bool) -> None:
        """What health checkers hear of a service."""
        status = health_pb2.HealthCheckResponse
        await self.health.set(service_name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Tells health checkers first, then ends open calls after ``grace_s``."""
        with contextlib.suppress(grpc.RpcError):
            await self.health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


async def start_grpc_server(
    address: str,
    register: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    *,
    insecure: bool = False,
    streams_max: int = 4096,
    request_bytes_max: int = REQUEST_BYTES_MAX,
) -> GrpcServer:
    """Serves what ``register`` adds on ``address`` (``unix:PATH`` or ``HOST:PORT``).

    A larger message than ``request_bytes_max`` ends its call with RESOURCE_EXHAUSTED.
    Raises ConfigError where the address is in use or is open to the network without ``insecure``.
    """
    check_loopback(address, insecure=insecure)
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor()],
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", request_bytes_max),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_concurrent_streams", streams_max),
        ],
    )
    register(server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = [*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)
    bound = bind(server, address, "--listen")
    await server.start()
    for name in ("", *service_names):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return GrpcServer(server, bound, servicer)


class MetricsServer:
    """Prometheus endpoint of one daemon, on a thread of its own."""

    def __init__(self, registry: CollectorRegistry, address: str, *, insecure: bool) -> None:
        """Serves ``registry`` on ``HOST:PORT``; port 0 takes a free one."""
        check_loopback(address, insecure=insecure)
        host, port = split_host_port(address)
        try:
            self._server = MetricsHttpServer(registry, host.strip("[]"), port)
        except OSError as error:
            raise _cannot_listen(address, error, "--metrics-listen") from None
        self.address = f"{host}:{self._server.server_port}"
        self._server.start()

    def stop(self) -> None:
        """Closes the port and ends the thread."""
        self._server.stop()

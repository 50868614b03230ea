"""What the daemons share: addresses, statuses of errors, metrics."""

import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from kvstore import daemon
from kvstore.config import split_host_port
from kvstore.errors import ConfigError, CorruptError, KVStoreError, NotFoundError, UnavailableError
from kvstore_proto import master_pb2, master_pb2_grpc
from prometheus_client import CollectorRegistry, Gauge


class Failing(master_pb2_grpc.MasterServicer):
    """Fails in every way a handler can."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def Locate(self, request: object, context: Any) -> Any:
        raise self._error

    def Session(self, request_iterator: object, context: Any) -> Any:
        raise NotImplementedError

    async def Watch(self, request: object, context: Any) -> AsyncIterator[Any]:
        yield master_pb2.BlockEvents(node_id="n")
        raise self._error


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (NotFoundError("no such thing"), grpc.StatusCode.NOT_FOUND, "no such thing"),
        (CorruptError("bits"), grpc.StatusCode.DATA_LOSS, "bits"),
        (UnavailableError("away"), grpc.StatusCode.UNAVAILABLE, "away"),
        (ZeroDivisionError("secret"), grpc.StatusCode.INTERNAL, "a bug"),
    ],
)
async def test_errors_of_handlers_become_statuses(
    error: Exception, status: grpc.StatusCode, text: str
) -> None:
    server = await daemon.start_grpc_server(
        "127.0.0.1:0",
        lambda server: master_pb2_grpc.add_MasterServicer_to_server(Failing(error), server),
        ["kvstore.v1.Master"],
    )
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = master_pb2_grpc.MasterStub(channel)
        nothing: Any = channel.unary_unary("/kvstore.v1.Master/Nothing")
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await stub.Locate(master_pb2.LocateRequest())
        stream = stub.Watch(master_pb2.WatchRequest())
        assert (await stream.read()).node_id == "n"
        with pytest.raises(grpc.aio.AioRpcError) as streamed:
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await nothing(b"")
    assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for caught in (unary, streamed):
        assert caught.value.code() is status
        assert text in (caught.value.details() or "")
    await server.stop(0)


@pytest.mark.parametrize("address", ["", "x", ":1", "h:", "h:x", "h:65536"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="write it like"):
        split_host_port(address)


def test_loopback_rule() -> None:
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/x"):
        daemon.check_loopback(address, insecure=False)
    with pytest.raises(ConfigError, match="--insecure"):
        daemon.check_loopback("10.0.0.1:1", insecure=False)
    daemon.check_loopback("10.0.0.1:1", insecure=True)


async def test_address_of_another_machine() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        await daemon.start_grpc_server("192.0.2.1:1234", lambda _s: None, [], insecure=True)


async def test_port_that_is_taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    first = await daemon.start_grpc_server("127.0.0.1:0", lambda _s: None, [])
    monkeypatch.setattr(daemon, "_check_port", lambda *_: None)
    with pytest.raises(ConfigError, match="in use"):
        await daemon.start_grpc_server(first.address, lambda _s: None, [])
    await first.stop(0)


def test_metrics_server(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    Gauge("kvstore_test", "A test", registry=registry).set(7)
    server = daemon.MetricsServer(registry, "127.0.0.1:0", insecure=False)
    text = urllib.request.urlopen(f"http://{server.address}/metrics", timeout=5).read()
    assert b"kvstore_test 7.0" in text
    with pytest.raises(ConfigError, match=server.address):
        daemon.MetricsServer(registry, server.address, insecure=False)
    server.stop()


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("bad value"), 2), (UnavailableError("gone"), 1)]
)
def test_daemon_exit_codes(
    capsys: pytest.CaptureFixture[str], error: KVStoreError, code: int
) -> None:
    async def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        daemon.run_daemon("kvstore-x", fail())
    assert stop.value.code == code
    assert capsys.readouterr().err == f"kvstore-x: {error}\n"


def test_log_levels() -> None:
    with pytest.raises(ConfigError, match="loud"):
        daemon.setup_logging("loud")

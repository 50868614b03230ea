"""The metrics port, and who keeps it busy."""

import contextlib
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from kvstore import daemon, http_metrics
from kvstore.config import split_host_port
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

TIMEOUT_S = 10.0


@pytest.fixture
def server() -> Iterator[daemon.MetricsServer]:
    registry = CollectorRegistry()
    Gauge("kvstore_test", "A test", registry=registry).set(7)
    server = daemon.MetricsServer(registry, "127.0.0.1:0", insecure=False)
    yield server
    server.stop()


def connect(
    server: daemon.MetricsServer, data: bytes = b"GET /metrics HTTP/1.1\r\nX: "
) -> socket.socket:
    host, port = split_host_port(server.address)
    connection = socket.create_connection((host, port), TIMEOUT_S)
    connection.sendall(data)
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """What still comes; empty also where it was cut off."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    connection.close()
    return b"".join(parts)


def get(server: daemon.MetricsServer) -> bytes:
    url = f"http://{server.address}/metrics"
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        return answer.read()  # type: ignore[no-any-return]


def test_I7_idle_connections_take_few_threads_and_not_for_ever(
    server: daemon.MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    held = [connect(server) for _ in range(http_metrics.CONNECTIONS_MAX)]
    for _ in range(5):
        assert rest_of(connect(server)) == b"", "there is no room for it"
    assert threading.active_count() - before <= http_metrics.CONNECTIONS_MAX
    monkeypatch.setattr(http_metrics, "CONNECTION_S", 0.0)
    for connection in held:
        rest_of(connection)
    monkeypatch.undo()
    while threading.active_count() > before:  # pytest's limit is the deadline
        time.sleep(0.01)
    assert b"kvstore_test 7.0" in get(server)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=\xff\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=2.\x01\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nAccept: text/plain; version=2.\xff;escaping=\xff\r\n\r\n",
        b"GET /metrics?name[]=%ff%fe&x HTTP/1.1\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"\xff\x00junk\r\n\r\n",
        b"GET " + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"",
    ],
)
def test_I11_no_bytes_give_a_traceback(
    server: daemon.MetricsServer,
    request_: bytes,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    connection = connect(server, request_)
    connection.shutdown(socket.SHUT_WR)
    rest_of(connection)
    assert b"kvstore_test 7.0" in get(server)
    assert not caplog.records
    assert capfd.readouterr().err == ""


class _Failing(Collector):
    def __init__(self, error: Exception) -> None:
        self._error = error

    def collect(self) -> list[Metric]:
        raise self._error


@pytest.mark.parametrize(("error", "status"), [(TimeoutError(), 503), (KeyError("x"), 500)])
def test_a_daemon_that_cannot_say_is_a_status(error: Exception, status: int) -> None:
    registry = CollectorRegistry(auto_describe=False)
    registry._collector_to_names[_Failing(error)] = []
    server = daemon.MetricsServer(registry, "127.0.0.1:0", insecure=False)
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server)
    assert caught.value.code == status
    caught.value.close()
    server.stop()

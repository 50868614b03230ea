"""Serves a daemon's metrics over HTTP: a few connections at a time, and none for long."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, make_wsgi_app

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16  # each has a thread; further ones are closed at once
CONNECTION_S = 10.0  # a connection lasts, whatever it does
ACCEPT_PAUSE_S = 0.1  # after an accept that failed, such as without a free descriptor

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class MetricsHttpServer(ThreadingMixIn, WSGIServer):
    """Bound when made; ``start`` serves on a thread until ``stop``."""

    daemon_threads = True

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """OSError if nothing can listen there."""
        if ":" in host:
            self.address_family = socket.AF_INET6
        self._began: dict[Any, float] = {}  # connections, and when they began
        super().__init__((host, port), _Handler)
        self.set_app(_app(registry))
        self._thread = threading.Thread(target=self.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        """Returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Closes the port and ends the thread; open connections are left to end by themselves."""
        self.shutdown()
        self.server_close()
        self._thread.join()

    def get_request(self) -> tuple[Any, Any]:
        """A connection that came."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(ACCEPT_PAUSE_S)  # it still waits, and would be tried again without a pause
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for the connection."""
        del request, client_address
        return len(self._began) < CONNECTIONS_MAX

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts its thread."""
        self._began[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            del self._began[request]
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers it, on its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._began[request]

    def service_actions(self) -> None:
        """Ends the connections whose time is over; called twice a second."""
        now = time.monotonic()
        for request, began in list(self._began.items()):
            if now - began >= CONNECTION_S:
                with contextlib.suppress(OSError):  # it has just ended
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection broke: anybody can bring that about."""
        del request
        log.debug("the connection of %s broke", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: anybody can send requests."""


def _app(registry: CollectorRegistry) -> App:
    """The exposition, with a status instead of a traceback for what it cannot answer."""
    shown: App = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            choose_encoder(environ.get("HTTP_ACCEPT", ""))
        except (TypeError, ValueError):
            return _refuse(start_response, "400 Bad Request", "the Accept header is malformed")
        try:
            return shown(environ, start_response)
        except TimeoutError:
            return _refuse(start_response, "503 Service Unavailable", "busy; try later")
        except Exception:
            log.exception("the metrics cannot be shown")
            return _refuse(start_response, "500 Internal Server Error", "a bug; see the log")

    return app


def _refuse(start_response: Callable[..., Any], status: str, text: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain")])
    return [f"{text}\n".encode()]

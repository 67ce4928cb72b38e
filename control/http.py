"""A small HTTP server beside a daemon or an agent: metrics, health, and the daemon's page.

Read-only and without keys: bind it where only those who may see names and figures can reach it. An
address without a host is of this machine, and there it answers only to this machine's own names, so
that no page from elsewhere reads it through a visitor's browser.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest

from .errors import ConfigError
from .keys import is_local

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prometheus_client import CollectorRegistry

    Page = Callable[[], tuple[int, str, bytes]]

REQUEST_TIMEOUT_S = 5.0  # of one read or write
CONNECTION_S = 15.0  # of all of a connection, however slowly its visitor speaks
MAX_CONNECTIONS = 32  # at once, each a thread: more are hung up on
TEXT = "text/plain; charset=utf-8"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class HttpServer:
    """Serves pages from functions, on threads of its own.

    Args:
        address: `host:port`; port 0 takes a free one, and without a host it is 127.0.0.1.
        pages: by path, a function that returns status, content type and body. Any thread.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(self, address: str, pages: Mapping[str, Page]) -> None:
        host = http_host(address)
        local = is_local(host)

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_TIMEOUT_S
            server_version = "kvferry"
            sys_version = ""

            def do_GET(self) -> None:
                page = pages.get(self.path.partition("?")[0])
                asked = self.headers.get("Host", "localhost")
                if local and not is_local(_host_of(asked)):
                    status, kind = 403, TEXT
                    body = b"this server is for this machine: ask for it as localhost\n"
                elif page is None:
                    known = " ".join(sorted(pages))
                    status, kind, body = 404, TEXT, f"there is: {known}\n".encode()
                else:
                    status, kind, body = page()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                for name, value in HEADERS.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrape are not worth a line each."""

        try:
            port = int(address.rpartition(":")[2])
            self._server = _Server((host, port), Handler)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"cannot serve http at {address!r}: {error}; give a free host:port"
            ) from error
        bound = self._server.server_address
        self.address = f"{bound[0]!s}:{bound[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="kvferry-http", daemon=True
        )
        self._thread.start()

    def fileno(self) -> int:
        """Return the descriptor that it listens on."""
        return self._server.fileno()

    def close(self) -> None:
        """Stop serving. Once."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """A thread a connection, as long as there are few; and none that lasts."""

    daemon_threads = True
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._lock = threading.Lock()
        self._ends_s: dict[Any, float] = {}  # connections, and when they are cut off
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._ends_s) >= MAX_CONNECTIONS
            if not full:
                self._ends_s[request] = time.monotonic() + CONNECTION_S
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:  # a closed descriptor may be another's at once
            self._ends_s.pop(request, None)
            super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut off whoever is late: called by the server's loop, twice a second and more."""
        now_s = time.monotonic()
        with self._lock, contextlib.suppress(OSError):
            for request in [one for one, end_s in self._ends_s.items() if end_s < now_s]:
                del self._ends_s[request]
                request.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes it

    def handle_error(self, request: object, client_address: object) -> None:
        """A visitor that went away in the middle is worth no line."""


def http_host(address: str) -> str:
    """Return the host of `host:port`; this machine's, if none is named."""
    return address.rpartition(":")[0].strip("[]") or "127.0.0.1"


def _host_of(header: str) -> str:
    """Return the host that a visitor asked for, without its port."""
    if header.startswith("["):
        return header.partition("]")[0][1:]
    return header.partition(":")[0]


def health(problem: Callable[[], str]) -> Page:
    """Return a page that is 200 while `problem` returns "", and 503 with its words otherwise."""

    def page() -> tuple[int, str, bytes]:
        words = problem()
        return (503 if words else 200), TEXT, f"{words or 'ok'}\n".encode()

    return page


def metrics_page(registry: CollectorRegistry) -> Page:
    """Return a registry in Prometheus's text format."""
    return lambda: (200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(registry))

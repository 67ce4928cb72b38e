"""A small HTTP server beside a daemon or an agent: `/metrics`, `/healthz`, `/readyz`.

Read-only and without keys: bind it where only those who may see names and figures can reach it.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Page = Callable[[], tuple[int, str, bytes]]

REQUEST_TIMEOUT_S = 5.0
TEXT = "text/plain; charset=utf-8"


class HttpServer:
    """Serves pages from functions, on threads of its own.

    Args:
        address: `host:port`; port 0 takes a free one.
        pages: by path, a function that returns status, content type and body. Any thread.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(self, address: str, pages: Mapping[str, Page]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_TIMEOUT_S
            server_version = "kvferry"
            sys_version = ""

            def do_GET(self) -> None:
                page = pages.get(self.path.partition("?")[0])
                if page is None:
                    known = " ".join(sorted(pages))
                    status, kind, body = 404, TEXT, f"there is: {known}\n".encode()
                else:
                    status, kind, body = page()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not worth a line each."""

        host, _, port = address.rpartition(":")
        try:
            self._server = ThreadingHTTPServer((host.strip("[]"), int(port)), Handler)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"cannot serve http at {address!r}: {error}; give a free host:port"
            ) from error
        self._server.daemon_threads = True
        bound = self._server.server_address
        self.address = f"{bound[0]!s}:{bound[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="kvferry-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops serving. Once."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def health(problem: Callable[[], str]) -> Page:
    """A page that is 200 while `problem` returns "", and 503 with its words otherwise."""

    def page() -> tuple[int, str, bytes]:
        words = problem()
        return (503 if words else 200), TEXT, f"{words or 'ok'}\n".encode()

    return page

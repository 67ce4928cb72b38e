"""Visitors that hold connections: few threads, and none for long."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from kvferry.control import http
from kvferry.control.http import MAX_CONNECTIONS, HttpServer

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 30.0
EXCESS = 8


@pytest.fixture
def server() -> Iterator[HttpServer]:
    made = HttpServer("127.0.0.1:0", {"/": lambda: (200, http.TEXT, b"here")})
    yield made
    made.close()


def visit(server: HttpServer) -> socket.socket:
    host, port = server.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), WAIT_S)


def ask(server: HttpServer) -> bytes:
    with visit(server) as visitor:
        visitor.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while part := visitor.recv(1 << 12):
            answer += part
    return answer


def hangs_up(visitor: socket.socket) -> bool:
    try:
        return visitor.recv(1) == b""
    except ConnectionResetError:
        return True


def test_visitors_beyond_a_few_are_hung_up_on(server: HttpServer) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        visitors = [stack.enter_context(visit(server)) for _ in range(MAX_CONNECTIONS + EXCESS)]
        assert all(hangs_up(visitor) for visitor in visitors[MAX_CONNECTIONS:])
        assert threading.active_count() <= before + MAX_CONNECTIONS


def test_a_visitor_that_speaks_slowly_is_cut_off(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends something every now and then has the whole connection's time, and no more."""
    monkeypatch.setattr(http, "CONNECTION_S", 0.1)
    with visit(server) as visitor:
        monkeypatch.setattr(http, "REQUEST_TIMEOUT_S", WAIT_S)
        visitor.sendall(b"GET / HTTP/1.1\r\nX: ")
        end_s = time.monotonic() + WAIT_S
        while not select.select([visitor], [], [], 0.05)[0]:
            assert time.monotonic() < end_s, "it may speak for ever"
            visitor.sendall(b"a")
        assert hangs_up(visitor)
    monkeypatch.undo()
    assert ask(server).endswith(b"here")

"""The baseline for tcp: one plain Python socket, iovecs of memoryviews, no engine at all."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any

from kvferry.tools.bench.transfer.driver import TIMEOUT_S, Driver
from kvferry.tools.bench.transfer.workload import block_ids, piece_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvferry.tools.bench.transfer.workload import Pool, Shape

VIEWS = 512  # memoryviews a system call
_HEADER = struct.Struct("<I")


class SocketDriver(Driver):
    """`sendmsg` and `recvmsg_into` over one stream; both ends build their views as they go."""

    def __init__(self, end: str, pool: Pool, shapes: Sequence[Shape]) -> None:
        super().__init__(end, pool, shapes)
        self._view = pool.bytes.data
        self._listener = socket.create_server(("127.0.0.1", 0)) if end == "dst" else None
        self._socket: socket.socket

    def publish(self) -> dict[str, Any]:
        return {"port": self._listener.getsockname()[1]} if self._listener is not None else {}

    def meet(self, other: dict[str, Any]) -> None:
        if self._listener is not None:
            self._listener.settimeout(TIMEOUT_S)
            self._socket = self._listener.accept()[0]
        else:
            self._socket = socket.create_connection(("127.0.0.1", other["port"]), TIMEOUT_S)
        self._socket.settimeout(None)  # a timeout would add a poll() to every call
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def transfer(self, shape: Shape, request: int, operation: str, token: int) -> None:
        self._socket.sendall(_HEADER.pack(request))
        self._run(self._socket.sendmsg, self._pieces(shape, block_ids(shape, request)[0]))

    def arrived(self, shape: Shape, request: int) -> None:
        header = self._socket.recv(_HEADER.size, socket.MSG_WAITALL)
        if header != _HEADER.pack(request):
            raise ConnectionError("the sender closed, or sent another request")

        def receive(views: list[memoryview]) -> int:
            return self._socket.recvmsg_into(views)[0]

        self._run(receive, self._pieces(shape, block_ids(shape, request)[1]))

    def close(self) -> None:
        self._socket.close()
        if self._listener is not None:
            self._listener.close()

    def _pieces(self, shape: Shape, ids: Any) -> list[memoryview]:
        view, nbytes = self._view, shape.block_nbytes
        offsets = (piece_numbers(shape, ids) * nbytes).tolist()
        return [view[offset : offset + nbytes] for offset in offsets]

    def _run(self, call: Any, views: list[memoryview]) -> None:
        """Repeat `call` until every view is done; a call may stop in the middle of one."""
        first = 0
        while first < len(views):
            done = call(views[first : first + VIEWS])
            if not done:
                raise ConnectionError("the other end closed the connection")
            while done and done >= len(views[first]):
                done -= len(views[first])
                first += 1
            if done:
                views[first] = views[first][done:]

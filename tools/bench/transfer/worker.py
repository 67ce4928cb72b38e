"""A process of `kvferry bench transfer`: one end of one library, told what to do over a socket.

The parent's commands and the replies are JSON. For every timed transfer the two ends talk over a
socket of their own: `prepare` → a token → the transfer → when it arrived, by the clock that all
processes of a host share. That talk is the same for every library, and no part of a latency.

Needs NumPy and nothing of kvferry: other libraries run this file in environments of their own.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import signal
import socket
import struct
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from kvferry.tools.bench.transfer.driver import WRITE, Driver
from kvferry.tools.bench.transfer.workload import Pool, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PR_SET_PDEATHSIG = 1
_TALK = struct.Struct("<cQ")
_PREPARE, _TOKEN, _ARRIVED, _END = b"p", b"t", b"a", b"e"


class Worker:
    """What the parent may call; every argument and result is of JSON's types."""

    def __init__(self, talk: socket.socket | None) -> None:
        self._talk = talk
        self._shapes: dict[str, Shape] = {}
        self._pool: Pool
        self._driver: Driver

    def open(
        self,
        driver: str,
        options: dict[str, Any],
        end: str,
        shapes: Sequence[dict[str, Any]],
        packages: Sequence[str],
    ) -> dict[str, Any]:
        """Make the pool and the library's end; return what the other end must know."""
        made = [Shape(**each) for each in shapes]
        self._shapes = {shape.name: shape for shape in made}
        self._pool = Pool(max(shape.pool_nbytes for shape in made))
        if end == "src":
            self._pool.fill()
        else:
            self._pool.clear()
        module, _, name = driver.partition(":")
        self._driver = getattr(importlib.import_module(module), name)(
            end, self._pool, made, **options
        )
        return {"published": self._driver.publish(), "versions": _versions(packages)}

    def meet(self, other: dict[str, Any]) -> None:
        """Connect to the other end."""
        self._driver.meet(other)

    def drive(
        self, shape: str, operation: str, first: int, count: int, limit_s: float
    ) -> dict[str, Any]:
        """Start up to `count` transfers, and none after `limit_s`; return their latencies."""
        driver, what, talk = self._driver, self._shapes[shape], self._talk
        waits = operation == WRITE and driver.notifies
        latencies_ns = []
        driver.select(what)
        cpu_s, stop_s = time.process_time(), time.monotonic() + limit_s
        try:
            for request in range(first, first + count):
                if talk is None:
                    token = driver.prepare(what, request)
                else:
                    token = _ask(talk, _PREPARE, request)
                start_ns = time.monotonic_ns()
                driver.transfer(what, request, operation, token)
                end_ns = time.monotonic_ns()
                if waits and talk is not None:
                    end_ns = max(end_ns, _receive(talk, _ARRIVED))
                latencies_ns.append(end_ns - start_ns)
                if time.monotonic() >= stop_s:
                    break
        finally:
            if talk is not None:
                talk.sendall(_TALK.pack(_END, 0))
        return {"latencies_ns": latencies_ns, "cpu_s": time.process_time() - cpu_s}

    def serve(self, shape: str, operation: str) -> dict[str, Any]:
        """Is the passive end until the other one has had enough."""
        driver, what, talk = self._driver, self._shapes[shape], self._talk
        if talk is None:
            raise RuntimeError("this worker has no other end")
        waits = operation == WRITE and driver.notifies
        driver.select(what)
        cpu_s = time.process_time()
        while True:
            kind, request = _receive_any(talk)
            if kind == _END:
                break
            talk.sendall(_TALK.pack(_TOKEN, driver.prepare(what, request)))
            if waits:
                driver.arrived(what, request)
                talk.sendall(_TALK.pack(_ARRIVED, time.monotonic_ns()))
        return {"cpu_s": time.process_time() - cpu_s}

    def poison(self, shape: str, request: int) -> None:
        """Spoil the sampled bytes that a request will write."""
        self._pool.poison(self._shapes[shape], request)

    def verify(self, shape: str, request: int) -> bool:
        """Return whether the sampled bytes of a request have arrived."""
        return self._pool.holds(self._shapes[shape], request)

    def rest(self, duration_s: float) -> float:
        """CPU seconds that the library takes in `duration_s` while nothing is asked of it."""
        cpu_s = time.process_time()
        time.sleep(duration_s)
        return time.process_time() - cpu_s

    def close(self) -> None:
        """Give back what the library holds."""
        self._driver.close()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the distributions that these packages come from."""
    homes = importlib.metadata.packages_distributions() if packages else {}
    return {
        home: importlib.metadata.version(home)
        for package in packages
        for home in homes.get(package, ())
    }


def _ask(talk: socket.socket, kind: bytes, value: int) -> int:
    talk.sendall(_TALK.pack(kind, value))
    return _receive(talk, _TOKEN)


def _receive(talk: socket.socket, wanted: bytes) -> int:
    kind, value = _receive_any(talk)
    if kind != wanted:
        raise ConnectionError(f"the other end said {kind!r}, not {wanted!r}")
    return value


def _receive_any(talk: socket.socket) -> tuple[bytes, int]:
    data = talk.recv(_TALK.size, socket.MSG_WAITALL)
    if len(data) < _TALK.size:
        raise ConnectionError("the other end of the benchmark has gone")
    kind, value = _TALK.unpack(data)
    return kind, value


def serve_parent(parent: Connection, worker: Worker) -> None:
    """Execute commands until the parent goes away."""
    while True:
        try:
            command: dict[str, Any] = json.loads(parent.recv_bytes())
        except EOFError:
            return
        name = command.pop("do")
        call: Callable[..., Any] = getattr(worker, name)
        try:
            reply = {"result": call(**command)}
        except Exception as error:  # told to the parent, which decides
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        parent.send_bytes(json.dumps(reply).encode())


def main(arguments: Sequence[str]) -> None:
    """`worker PARENT_FD [TALK_FD]`: runs until the parent closes its end."""
    # A frozen worker would outlive a parent that is killed: the kernel ends it with its parent.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent_fd, *talk_fds = map(int, arguments)
    talk = socket.socket(fileno=talk_fds[0]) if talk_fds else None
    serve_parent(Connection(parent_fd), Worker(talk))
    # Libraries are not torn down: some crash in their destructors at interpreter exit.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])

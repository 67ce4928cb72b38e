"""What a handoff's messages and its copy cost by themselves, between two processes of one thread or two.

Decode sends a `Request`, prefill copies one block into decode's memory and says so over a Unix socket,
where a second thread of decode's reads it and wakes the first: what an agent does for a handoff, but
for everything that knows of failures, deadlines, several peers and any layout. No handoff of these two
programs can take less.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from typing import Any

import numpy as np
import zmq

from kvferry.control.handoff.messages import HandoffId, Request, decode, encode
from kvferry.engine.memory import iovec
from kvferry.engine.transports.cma.path import permit_peers
from kvferry.engine.wire import messages as wire
from kvferry.tools.bench.peers import Peer

BLOCK_NBYTES = 256


class _Prefill:
    """The other process: one thread that answers each request with a copy and a message."""

    def __init__(self) -> None:
        self._source = np.zeros(BLOCK_NBYTES, np.uint8)
        self._context = zmq.Context()
        self._requests = self._context.socket(zmq.ROUTER)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0kvferry-floor-{os.getpid()}")
        self._listener.listen()

    def where(self) -> tuple[int, int]:
        return self._requests.bind_to_random_port("tcp://127.0.0.1"), os.getpid()

    def run(self, pid: int, address: int) -> None:
        """Answer requests into the block at `address` of a process, until one is empty."""
        requests = self._requests
        with self._listener.accept()[0] as arrivals:
            while frame := requests.recv_multipart()[-1]:
                request: Any = decode(frame)
                ours = np.array([[self._source.ctypes.data, BLOCK_NBYTES]])
                theirs = np.array([[address, BLOCK_NBYTES]])
                iovec.process_vm(pid, ours, theirs, BLOCK_NBYTES, write=True)
                arrivals.send(wire.encode(wire.Arrived(request.imm, BLOCK_NBYTES, 1)))

    def close(self) -> None:
        self._listener.close()
        self._context.destroy(linger=0)


def measure_floor(count: int) -> list[float]:
    """Seconds of so many such handoffs, one after the other."""
    block = np.zeros(BLOCK_NBYTES, np.uint8)
    waiting: dict[int, threading.Lock] = {}
    seconds = []
    permit_peers()
    with (
        Peer(_Prefill) as peer,
        zmq.Context() as sockets,
        sockets.socket(zmq.DEALER) as requests,
        socket.socket(socket.AF_UNIX) as arrivals,
    ):
        port, pid = peer.call("where")
        arrivals.connect(f"\0kvferry-floor-{pid}")
        requests.connect(f"tcp://127.0.0.1:{port}")
        peer.tell("run", os.getpid(), block.ctypes.data)
        reader = threading.Thread(target=_read, args=(arrivals, waiting), daemon=True)
        reader.start()
        for number in range(1, count + 1):
            began_s = time.perf_counter()
            there = waiting[number] = threading.Lock()
            there.acquire()
            handoff = HandoffId(f"r{number}", 1, number)
            table = struct.pack("<i", number % 256)
            request = Request(1, handoff, "push", 1, BLOCK_NBYTES, 30.0, number, tables=(table,))
            requests.send(encode(request))
            there.acquire()
            seconds.append(time.perf_counter() - began_s)
        requests.send(b"")
        reader.join()
    return seconds


def _read(arrivals: socket.socket, waiting: dict[int, threading.Lock]) -> None:
    received = bytearray()
    while data := arrivals.recv(1 << 16):
        received += data
        for message in wire.decode_all(received):
            if isinstance(message, wire.Arrived):
                waiting.pop(message.imm).release()

"""What a handoff's messages and its copy cost by themselves, between two processes of one thread or two.

Decode sends a `Request`, prefill copies one block into decode's memory and says so over a Unix socket,
where a second thread of decode's reads it and wakes the first: what an agent does for a handoff, but
for everything that knows of failures, deadlines, several peers and any layout. No handoff of these two
programs can take less.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from kvferry.control.handoff.messages import HandoffId, Request, decode, encode, pack_block_ids
from kvferry.engine.memory import iovec
from kvferry.engine.transports.cma.path import permit_peers
from kvferry.engine.wire import messages as wire

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

BLOCK_NBYTES = 256


def _prefill(pipe: Connection[Any, Any]) -> None:
    """The other process: one thread that answers each request with a copy and a message."""
    source = np.zeros(BLOCK_NBYTES, np.uint8)
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as requests,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(f"\0kvferry-floor-{os.getpid()}")
        listener.listen()
        pipe.send((requests.bind_to_random_port("tcp://127.0.0.1"), os.getpid()))
        arrivals = listener.accept()[0]
        pid, address = pipe.recv()
        while True:
            frame = requests.recv_multipart()[-1]
            if not frame:
                return
            request: Any = decode(frame)
            ours = np.array([[source.ctypes.data, BLOCK_NBYTES]])
            theirs = np.array([[address, BLOCK_NBYTES]])
            iovec.process_vm(pid, ours, theirs, BLOCK_NBYTES, write=True)
            arrivals.send(wire.encode(wire.Arrived(request.imm, BLOCK_NBYTES, 1)))


def measure_floor(count: int) -> list[float]:
    """Seconds of so many such handoffs, one after the other."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_prefill, args=(theirs,), daemon=True)
    process.start()
    block = np.zeros(BLOCK_NBYTES, np.uint8)
    waiting: dict[int, threading.Lock] = {}
    seconds = []
    permit_peers()
    with (
        zmq.Context() as sockets,
        sockets.socket(zmq.DEALER) as requests,
        socket.socket(socket.AF_UNIX) as arrivals,
    ):
        port, pid = ours.recv()
        arrivals.connect(f"\0kvferry-floor-{pid}")
        requests.connect(f"tcp://127.0.0.1:{port}")
        ours.send((os.getpid(), block.ctypes.data))
        reader = threading.Thread(target=_read, args=(arrivals, waiting), daemon=True)
        reader.start()
        for number in range(1, count + 1):
            began_s = time.perf_counter()
            there = waiting[number] = threading.Lock()
            there.acquire()
            handoff = HandoffId(f"r{number}", 1, number)
            table = pack_block_ids([number % 256])
            request = Request(1, handoff, "push", 1, BLOCK_NBYTES, 30.0, number, tables=(table,))
            requests.send(encode(request))
            there.acquire()
            seconds.append(time.perf_counter() - began_s)
        requests.send(b"")
        reader.join()
    process.join()
    return seconds


def _read(arrivals: socket.socket, waiting: dict[int, threading.Lock]) -> None:
    received = bytearray()
    while data := arrivals.recv(1 << 16):
        received += data
        for message in wire.decode_all(received):
            if isinstance(message, wire.Arrived):
                waiting.pop(message.imm).release()

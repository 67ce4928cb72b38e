"""A message of 1 GiB, and the most memory that its receiver ever had."""

from __future__ import annotations

import mmap
from typing import Any

import zmq

GIB = 1 << 30


def is_cut_off(sender: zmq.Socket[Any], timeout_s: float) -> bool:
    """Sends the message; returns whether the receiver hung up."""
    giant = mmap.mmap(-1, GIB)  # pages that nobody wrote: it takes no memory here either
    monitor = sender.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    sender.send(giant, copy=False)
    hung_up = bool(monitor.poll(int(timeout_s * 1000)))
    sender.disable_monitor()
    monitor.close(0)
    return hung_up


def peak_mib(pid: int) -> float:
    """The most resident memory that a process ever had."""
    with open(f"/proc/{pid}/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

"""Measures the control plane: handoffs between two agents, and a daemon with many agents."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import zmq

from kvferry.adapters.agent.agent import Agent
from kvferry.control.cluster.client import DaemonClient
from kvferry.control.cluster.messages import (
    Heartbeat,
    Load,
    Member,
    Place,
    Register,
    Registration,
    answers,
    requests,
)
from kvferry.control.handoff.timeline import read
from kvferry.control.placement.fleet import Fleet
from kvferry.control.placement.policy import place
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.tools.bench.control.floor import measure_floor
from kvferry.tools.bench.peers import Peer, close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.control.handoff.timeline import Timeline

LEASE_S = 3.0
NUM_BLOCKS = 256
WAIT_S = 30.0


class Spread(msgspec.Struct, frozen=True):
    """A sample of times, in microseconds."""

    count: int
    p50_us: float
    p99_us: float
    worst_us: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        p50, p99, worst = np.percentile(seconds, [50, 99, 100]) * 1e6
        return cls(len(seconds), float(p50), float(p99), float(worst))


class Handoffs(msgspec.Struct, frozen=True):
    """What handoffs of one block take between two processes.

    Attributes:
        first_byte: from the call of `receive` until prefill sends the first byte, by its agent's
            recorder (the same clock); of the last thousand. Prefill has taken in its offers by then.
        latency: from the call of `receive` to its end, all bytes there; one after the other.
        cpu_us: processor time of one of those, of both processes.
        round_trip: a ZeroMQ message of 150 bytes there and back between two bare processes.
        floor: the messages and the copy of a handoff, and nothing else; see `floor.py`.
        per_s: handoffs a second, many at a time.
        stolen: share of the processors' time that the hypervisor gave to others meanwhile.
    """

    first_byte: Spread
    latency: Spread
    cpu_us: float
    round_trip: Spread
    floor: Spread
    per_s: float
    stolen: float


def _new_agent(name: str, role: Any, num_blocks: int = NUM_BLOCKS, **options: Any) -> Agent:
    layers = [np.zeros((2, num_blocks, 4, 2, 16), np.uint8)]
    layout = KVLayout.from_tensors(layers, "plane block token head dim")
    return Agent(name=name, role=role, layout=layout, tensors=layers, **options)


class _Prefill:
    """The other process: offers one block a request, so many requests at a time as it is told."""

    def __init__(self) -> None:
        self._agent = _new_agent("prefill", "prefill")

    def address(self) -> str:
        return self._agent.address

    def cpu_s(self) -> float:
        return time.process_time()

    def trace(self, path: Path) -> None:
        self._agent.write_trace(path)

    def offer(self, first: int, count: int, settled: bool) -> Iterator[None]:
        """Answer when the requests are offered, then wait until they have ended."""
        agent = self._agent
        sent = [agent.send(f"r{n}", [n % NUM_BLOCKS]) for n in range(first, first + count)]
        if settled:  # else the first request waits for the last of the offers
            offered = threading.Event()
            agent._core.messaging.call_soon(offered.set)
            offered.wait(WAIT_S)
        yield
        for handoff in sent:
            handoff.wait(WAIT_S)

    def close(self) -> None:
        self._agent.close()


class _Echo:
    """The other end of a bare round trip."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)

    def port(self) -> int:
        return self._socket.bind_to_random_port("tcp://127.0.0.1")

    def run(self) -> None:
        """Send back what comes, until it is nothing."""
        while (parts := self._socket.recv_multipart())[-1]:
            self._socket.send_multipart(parts)

    def close(self) -> None:
        self._context.destroy(linger=0)


def _measure_round_trips(count: int) -> Spread:
    seconds = []
    with Peer(_Echo) as peer, zmq.Context() as sockets, sockets.socket(zmq.DEALER) as socket:
        socket.connect(f"tcp://127.0.0.1:{peer.call('port')}")
        peer.tell("run")
        for _ in range(count):
            began_s = time.perf_counter()
            socket.send(bytes(150))
            socket.recv()
            seconds.append(time.perf_counter() - began_s)
        socket.send(b"")
    return Spread.of(seconds[count // 10 :])


def measure_handoffs(latencies: int, burst: int, bursts: int) -> Handoffs:
    """Return one-block handoffs of two processes: one after the other, then `burst` at a time."""
    with Peer(_Prefill) as prefill, _new_agent("decode", "decode") as agent:

        def cpu_s() -> float:
            return time.process_time() + float(prefill.call("cpu_s"))

        agent.connect(prefill.call("address"))
        stolen_s, total_s = _stolen()
        round_trip = _measure_round_trips(latencies)
        floor = Spread.of(measure_floor(latencies)[latencies // 10 :])
        seconds = []
        asked_s: dict[str, float] = {}
        number = 0
        chunk = 100
        chunks = max(1, latencies // chunk)
        began_cpu_s = 0.0
        for turn in range(chunks + 1):  # the first one warms up
            if turn == 1:
                began_cpu_s = cpu_s()
            prefill.call("offer", number, chunk, True)
            for n in range(number, number + chunk):
                began_s = asked_s[f"r{n}"] = time.monotonic()
                agent.receive(f"r{n}", "prefill", [n % NUM_BLOCKS]).wait(WAIT_S)
                seconds.append(time.monotonic() - began_s)
            number += chunk
        cpu_us = (cpu_s() - began_cpu_s) / (chunks * chunk) * 1e6
        with TemporaryDirectory() as folder:
            trace = Path(folder, "prefill")
            prefill.call("trace", trace)
            first_byte = Spread.of(_until_first_byte(asked_s, read(trace)))
        rates = []
        for _ in range(bursts):
            prefill.call("offer", number, burst, False)
            began_s = time.perf_counter()
            handoffs = [
                agent.receive(f"r{n}", "prefill", [n % NUM_BLOCKS])
                for n in range(number, number + burst)
            ]
            for handoff in handoffs:
                handoff.wait(WAIT_S)
            rates.append(burst / (time.perf_counter() - began_s))
            number += burst
        stolen = _stolen()
        return Handoffs(
            first_byte=first_byte,
            latency=Spread.of(seconds[chunk:]),
            cpu_us=cpu_us,
            round_trip=round_trip,
            floor=floor,
            per_s=float(np.median(rates)),
            stolen=(stolen[0] - stolen_s) / max(1, stolen[1] - total_s),
        )


def _until_first_byte(asked_s: dict[str, float], prefill: list[Timeline]) -> list[float]:
    """Seconds from the call at decode until prefill's first byte sets out, as far as recorded."""
    return [dict(one.marks)["on wire"] / 1e9 - asked_s[one.handoff] for one in prefill]


def _stolen() -> tuple[int, int]:
    """Ticks of all processors that the hypervisor gave to others, and all ticks."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    return ticks[7], sum(ticks)


class DaemonProcess:
    """A daemon on free ports, whose CPU seconds and memory are read from /proc."""

    def __init__(self) -> None:
        self.address = self.publisher = ""
        self.start()

    def start(self) -> None:
        """Start it; again where it was before."""
        bind, publish = (a or "tcp://127.0.0.1:*" for a in (self.address, self.publisher))
        began_s = time.perf_counter()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvferry.control", "--log-level", "error"),
                *("--bind", bind, "--publish", publish),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        self.start_s = time.perf_counter() - began_s
        self.address, self.publisher = words[4].rstrip(","), words[7].rstrip(",")

    def cpu_s(self) -> float:
        """CPU seconds so far, of all its threads."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Resident memory."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate()


class Heartbeats(msgspec.Struct, frozen=True):
    """What a daemon needs for many agents."""

    agents: int
    seconds: float
    cores: float
    memory_mib: float
    lost: int
    answers: int


def measure_heartbeats(daemon: DaemonProcess, agents: int, seconds: float) -> Heartbeats:
    """Agents that each beat once a second, over a socket of their own, spread over the second."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, agents + 100)
    poller = zmq.Poller()
    sockets = []
    for number in range(agents):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(daemon.address)
        there = Registration(f"a{number}", "prefill", 1, "tcp://127.0.0.1:1", num_blocks=1000)
        socket.send(requests.encode(Register(1, 1, there, LEASE_S)))
        poller.register(socket, zmq.POLLIN)
        sockets.append(socket)
    generations = [answers.decode(socket.recv()).generation for socket in sockets]
    cpu_s, began_s = daemon.cpu_s(), time.perf_counter()
    heard = sent = 0
    while (now_s := time.perf_counter() - began_s) < seconds:
        while sent < now_s * agents:
            number = sent % agents
            beat = Heartbeat(2, f"a{number}", generations[number], Load(free_blocks=sent % 1000))
            sockets[number].send(requests.encode(beat))
            sent += 1
        for socket, _ in poller.poll(5):
            heard += answers.decode(socket.recv()).__class__.__name__ == "Beat"
    cores = (daemon.cpu_s() - cpu_s) / (time.perf_counter() - began_s)
    with DaemonClient(daemon.address) as client:
        left = sum(member.name.startswith("a") for member in client.look().members)
    context.destroy(linger=0)
    return Heartbeats(agents, seconds, cores, daemon.memory_mib(), agents - left, heard)


def measure_placement(agents: int, count: int) -> Spread:
    """Placing requests over agents of random loads, half of them prefill, on 8 hosts each."""
    rng = np.random.default_rng(1)
    fleet = Fleet()
    for number in range(agents):
        name = f"a{number}"
        role: Any = ("prefill", "decode")[number % 2]
        there = Registration(
            name, role, 1, "tcp://127.0.0.1:1", num_blocks=10_000, tokens_per_block=16
        )
        fleet.put(Member(there, number))
        fleet.load(name, Load(queued_tokens=int(rng.integers(10_000)), free_blocks=10_000))
    seconds = []
    for number in range(count):
        ask = Place(number, int(rng.integers(1, 8192)))
        began_s = time.perf_counter()
        decision = place(fleet, ask)
        seconds.append(time.perf_counter() - began_s)
        fleet.reserve(decision, ask.tokens)
    return Spread.of(seconds)


def measure_comebacks(daemon: DaemonProcess, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds from an agent's death until a peer is told; and from a daemon's start until its view
    of four agents is complete again."""
    deaths, returns = [], []
    with DaemonClient(daemon.address) as client:
        for _ in range(rounds):
            doomed = Peer(_Member, daemon.address, "doomed")
            with client.watch() as watch:
                _until(lambda: "doomed" in watch.view.members, watch.poll)
                doomed.process.kill()
                began_s = time.perf_counter()
                _until(lambda: "doomed" not in watch.view.members, watch.poll)
                deaths.append(time.perf_counter() - began_s)
            doomed.close()
    names = {f"m{number}" for number in range(4)}
    members = [Peer(_Member, daemon.address, name) for name in names]
    try:
        for _ in range(rounds):
            with DaemonClient(daemon.address) as client, client.watch() as watch:
                _until(lambda: names <= set(watch.view.members), watch.poll)
            daemon.kill()
            daemon.start()
            began_s = time.perf_counter()
            with DaemonClient(daemon.address) as client, client.watch() as watch:
                _until(lambda: names <= set(watch.view.members), watch.poll)
            returns.append(time.perf_counter() - began_s)
    finally:
        for member in members:
            member.process.kill()
        close_all(members)
    return deaths, returns


class _Member:
    """A process with an agent in it, until it is killed."""

    def __init__(self, daemon: str, name: str) -> None:
        # That a daemon which was killed does not know it, it would say, each time.
        logging.getLogger("kvferry.agent").setLevel(logging.ERROR)
        self._agent = _new_agent(name, "decode", 4, daemon=daemon, lease_s=LEASE_S)

    def close(self) -> None:
        self._agent.close()


def _until(condition: Callable[[], bool], poll: Callable[[float], object]) -> None:
    end_s = time.monotonic() + 60.0
    while not condition():
        poll(0.01)
        if time.monotonic() > end_s:
            raise TimeoutError("the daemon's view does not become what it should")

"""The daemon under what hurts: floods, giants, replays, readers that do not read, clocks that jump."""

from __future__ import annotations

import os
import random
import socket as sockets
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.cluster.messages import (
    CHANGES_TOPIC,
    Beat,
    Denied,
    Deregister,
    Done,
    Drain,
    Flip,
    Heartbeat,
    Load,
    Look,
    Place,
    Register,
    Registered,
    Registration,
    Restore,
    Show,
    Snapshot,
    answers,
    requests,
)
from kvferry.control.curve import new_pair
from kvferry.control.keys import Keys, write_keys
from tests.support.daemon_process import DaemonProcess
from tests.support.huge_frames import is_cut_off, peak_mib
from tests.support.requirements import FAKETIME, need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 30.0
MIB_OF_A_DAEMON = 60
PARTS = 50  # requests in one ZeroMQ message
WINDOW = 500  # frames on their way at once
DAY_S = 86_400


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess()
    yield process
    process.end()


@contextmanager
def dealer(address: str, **options: int) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        for name, value in options.items():
            socket.setsockopt(getattr(zmq, name), value)
        socket.connect(address)
        yield socket


def ask(client: DaemonClient, message: Any) -> Any:
    return client.ask(message, WAIT_S)


def there(name: str, life: int = 1, **fields: Any) -> Registration:
    return Registration(name, "prefill", life, "tcp://127.0.0.1:9", **fields)


def injured(frame: bytes, rng: random.Random) -> bytes:
    """Noise; or an honest request cut, doubled, or with a bit or some bytes changed."""
    kind = rng.randrange(6)
    at = rng.randrange(len(frame))
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return frame[:at]
    if kind == 2:
        return frame + frame[at:]
    if kind == 3:
        return frame[:at] + rng.randbytes(rng.randrange(1, 9)) + frame[at:]
    data = bytearray(frame)
    data[at] = rng.randrange(256) if kind == 4 else data[at] ^ 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(10_000, marks=pytest.mark.slow),
        pytest.param(100_000, marks=pytest.mark.soak),
    ],
)
def test_a_flood_of_injured_requests(daemon: DaemonProcess, frames: int) -> None:
    """Each is answered, and what the daemon knew before it knows afterwards."""
    rng = random.Random(3)
    honest = [
        requests.encode(message)
        for message in (
            Register(1, 1, there("other", num_blocks=7, transports=("tcp",)), 60.0),
            Heartbeat(2, "p0", 3, Load(queued_tokens=5, rates={"d0": 1e9})),
            Deregister(3, "p0", 4),
            Look(4),
            Place(5, 100, "m", {"p0": 10}, ("p1",)),
            Drain(6, "p9"),
            Flip(7, "p9", "decode"),
        )
    ]
    with DaemonClient(daemon.address) as client:
        registered = ask(client, Register(1, 1, there("p0"), 60.0))
        assert isinstance(registered, Registered)
        with dealer(daemon.address) as stranger:
            sent = heard = denied = 0
            while heard < frames:
                while sent < frames and sent - heard < WINDOW:
                    # An empty part in front would be an envelope's end, and not a request.
                    batch = [injured(rng.choice(honest), rng) or b"\0" for _ in range(PARTS)]
                    stranger.send_multipart(batch)
                    sent += PARTS
                answer = answers.decode(stranger.recv())
                denied += isinstance(answer, Denied)
                heard += 1
        assert denied > frames // 2
        beat = ask(client, Heartbeat(2, "p0", registered.generation))
        assert isinstance(beat, Beat)
        assert "p0" in {member.name for member in client.look(timeout_s=WAIT_S).members}
    print(f"peak memory {peak_mib(daemon.process.pid):.0f} MiB, {denied} denied")
    assert peak_mib(daemon.process.pid) < MIB_OF_A_DAEMON


def test_a_message_of_a_gibibyte_costs_its_connection_and_no_memory(daemon: DaemonProcess) -> None:
    with dealer(daemon.address) as sender:
        assert is_cut_off(sender, WAIT_S), "the daemon did not hang up"
        with DaemonClient(daemon.address) as client:
            client.look(timeout_s=WAIT_S)
    assert peak_mib(daemon.process.pid) < MIB_OF_A_DAEMON


def test_replayed_requests_change_nothing(daemon: DaemonProcess) -> None:
    """The very bytes of an agent's earlier life, sent again by somebody else."""
    with dealer(daemon.address) as agent, dealer(daemon.address) as replayer:

        def say(socket: zmq.Socket[bytes], frame: bytes) -> Any:
            socket.send(frame)
            return answers.decode(socket.recv())

        tape = [requests.encode(Register(1, 1, there("p0", life=1), 60.0))]
        first = say(agent, tape[0])
        for message in (
            Heartbeat(2, "p0", first.generation),
            Deregister(3, "p0", first.generation),
        ):
            tape.append(requests.encode(message))
        assert isinstance(say(agent, tape[1]), Beat)
        second = say(agent, requests.encode(Register(4, 1, there("p0", life=2), 60.0)))
        assert second.generation > first.generation
        denials = [say(replayer, frame) for frame in tape]
        assert all(isinstance(denial, Denied) for denial in denials)
        assert [denial.reason for denial in denials] == ["superseded", "generation", "generation"]
        alive = say(agent, requests.encode(Heartbeat(5, "p0", second.generation)))
        assert alive == Beat(5, "serving")


def test_a_replayed_conversation_of_a_key_holder_gets_nobody_in(tmp_path: Path) -> None:
    """Every byte that an admitted client sent, sent again: CURVE makes each connection its own."""
    for name in ("daemon", "tool"):
        write_keys(tmp_path / f"{name}.key", *new_pair())
    daemon = DaemonProcess("--keys", str(tmp_path / "daemon.key"))
    keys = Keys.load(tmp_path / "tool.key")
    try:
        daemon_key = Keys.load(tmp_path / "daemon.key").public.hex()
        host, port = daemon.address[len("tcp://") :].split(":")
        tape = bytearray()
        with sockets.create_server(("127.0.0.1", 0)) as server:
            relay = threading.Thread(target=_relay, args=(server, (host, int(port)), tape))
            relay.start()
            address = f"tcp://127.0.0.1:{server.getsockname()[1]}#{daemon_key}"
            with DaemonClient(address, keys) as client:
                ask(client, Register(1, 1, there("p0", public_key=keys.public), 60.0))
                assert len(client.look(timeout_s=WAIT_S).members) == 1
            relay.join(WAIT_S)
            assert not relay.is_alive()
        with DaemonClient(f"{daemon.address}#{daemon_key}", keys) as client:
            generation = client.look(timeout_s=WAIT_S).members[0].generation
            ask(client, Deregister(9, "p0", generation))
            with sockets.create_connection((host, int(port)), WAIT_S) as replayer:
                replayer.sendall(tape)
                replayer.shutdown(sockets.SHUT_WR)
                while replayer.recv(1 << 16):  # until the daemon hangs up
                    pass
            assert client.look(timeout_s=WAIT_S).members == ()
    finally:
        daemon.end()


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[tuple[str, Keys, Keys]]:
    """A daemon's address, and two keys that it allows."""
    for name in ("daemon", "first", "second"):
        write_keys(tmp_path / f"{name}.key", *new_pair())
    process = DaemonProcess("--keys", str(tmp_path / "daemon.key"))
    daemon_key = Keys.load(tmp_path / "daemon.key").public.hex()
    yield (
        f"{process.address}#{daemon_key}",
        Keys.load(tmp_path / "first.key"),
        Keys.load(tmp_path / "second.key"),
    )
    process.end()


def test_a_picture_that_is_kept_answers_each_request_by_its_number(daemon: DaemonProcess) -> None:
    with dealer(daemon.address) as socket:
        for name in ("p0", "p1"):
            socket.send(requests.encode(Register(1, 1, there(name), 60.0)))
            assert isinstance(answers.decode(socket.recv()), Registered)
            for number in (0, 127, 128, 70_000, 2**40):
                for loads in (False, True):
                    socket.send(requests.encode(Look(number, loads)))
                    snapshot = answers.decode(socket.recv())
                    assert isinstance(snapshot, Snapshot)
                    assert snapshot.request == number
                    assert snapshot.members[-1].name == name


def test_a_key_takes_no_name_of_another_that_lives(keyed: tuple[str, Keys, Keys]) -> None:
    address, first, second = keyed
    with DaemonClient(address, first) as owner, DaemonClient(address, second) as other:
        mine = ask(owner, Register(1, 1, there("p0", life=1, public_key=first.public), 60.0))
        denied = ask(other, Register(1, 1, there("p0", life=2, public_key=second.public), 60.0))
        assert isinstance(denied, Denied)
        assert denied.reason == "key"
        assert isinstance(ask(owner, Heartbeat(2, "p0", mine.generation)), Beat)
        restarted = ask(owner, Register(3, 1, there("p0", life=3, public_key=first.public), 60.0))
        assert restarted.generation > mine.generation
        assert isinstance(ask(owner, Deregister(4, "p0", restarted.generation)), Done)
        taken = ask(other, Register(2, 1, there("p0", life=2, public_key=second.public), 60.0))
        assert isinstance(taken, Registered)  # the name is free


def test_a_key_that_is_struck_off_is_heard_no_more(keyed: tuple[str, Keys, Keys]) -> None:
    """Over the connection that it has: its heartbeats renew no lease."""
    address, first, second = keyed
    with DaemonClient(address, first) as revoked, DaemonClient(address, second) as other:
        mine = ask(revoked, Register(1, 1, there("p0", public_key=first.public), 0.5))
        assert isinstance(mine, Registered)
        path = Path(first.allowed)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if first.public.hex() not in line))
        for message in (Heartbeat(2, "p0", mine.generation), Look(3), Drain(4, "p0")):
            denied = ask(revoked, message)
            assert isinstance(denied, Denied)
            assert denied.reason == "key"
        with other.watch() as watch:
            while "p0" in watch.view.members:
                watch.poll(WAIT_S)


def test_a_key_does_what_its_role_allows_to_the_names_it_has(tmp_path: Path) -> None:
    write_keys(tmp_path / "daemon.key", *new_pair())
    for role in ("agent", "router", "operator"):
        write_keys(tmp_path / f"{role}.key", *new_pair(), role=role, names="d-*")
    daemon = DaemonProcess("--keys", str(tmp_path / "daemon.key"))
    address = f"{daemon.address}#{Keys.load(tmp_path / 'daemon.key').public.hex()}"
    requests_of = {
        "agent": {"Register", "Heartbeat", "Deregister", "Look"},
        "router": {"Look", "Place"},
        "operator": {"Look", "Place", "Show", "Drain", "Restore", "Flip"},
    }
    try:
        for role, may in requests_of.items():
            keys = Keys.load(tmp_path / f"{role}.key")
            with DaemonClient(address, keys) as client:
                for name in ("d-0", "p-0"):
                    registration = there(name, public_key=keys.public)
                    for message in (
                        Register(1, 1, registration, 60.0),
                        Heartbeat(2, name, 1),
                        Deregister(3, name, 1),
                        Look(4),
                        Place(5, 100),
                        Show(6),
                        Drain(7, name),
                        Restore(8, name),
                        Flip(9, name, "prefill"),
                    ):
                        named = isinstance(message, Register) or hasattr(message, "name")
                        kind = type(message).__name__
                        answer = ask(client, message)
                        objects = isinstance(answer, Denied) and "allow-list" in answer.detail
                        allowed = kind in may and (name == "d-0" or not named)
                        assert objects is not allowed, (role, name, kind, answer)
    finally:
        daemon.end()


def _relay(server: sockets.socket, to: tuple[str, int], tape: bytearray) -> None:
    """Carries one connection, and keeps what its client says."""
    near, _ = server.accept()
    far = sockets.create_connection(to)

    def carry(source: sockets.socket, sink: sockets.socket, keep: bytearray | None) -> None:
        while data := source.recv(1 << 16):
            if keep is not None:
                keep += data
            sink.sendall(data)
        sink.shutdown(sockets.SHUT_WR)

    with near, far:
        back = threading.Thread(target=carry, args=(far, near, None), daemon=True)
        back.start()
        carry(near, far, tape)
        back.join(WAIT_S)


@pytest.mark.slow
def test_a_subscriber_that_does_not_read_costs_no_memory(daemon: DaemonProcess) -> None:
    """Others see everything; the daemon drops what the slow one does not take."""
    with (
        zmq.Context() as context,
        context.socket(zmq.SUB) as slow,
        DaemonClient(daemon.address) as client,
        client.watch() as watch,
        dealer(daemon.address) as agents,
    ):
        slow.setsockopt(zmq.LINGER, 0)
        slow.setsockopt(zmq.RCVHWM, 1)
        slow.setsockopt(zmq.RCVBUF, 4096)
        slow.subscribe(b"")
        monitor = slow.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        slow.connect(daemon.publisher)
        assert monitor.poll(int(WAIT_S * 1000))
        slow.disable_monitor()
        monitor.close(0)
        padding = "x" * 256
        published, rounds, names = 0, 0, 100
        while published < 40 << 20:  # 40 MiB: more than the daemon may ever have beside itself
            rounds += 1
            tail = str(rounds)
            for name in range(names):
                registration = there(
                    f"a{name}",
                    model=padding[len(tail) :] + tail,
                    layout_digest=padding,
                    transports=(padding,) * 16,
                )
                agents.send(requests.encode(Register(1, 1, registration, 60.0)))
            for _ in range(names):
                assert isinstance(answers.decode(agents.recv()), Registered)
            published += names * len(msgspec.msgpack.encode(registration))
            watch.poll(0.0)
        while {m.registration.model[-len(tail) :] for m in watch.view.members.values()} != {tail}:
            watch.poll(WAIT_S)
        assert len(watch.view.members) == names
        topic, _ = slow.recv_multipart()  # it was connected all the time
        assert topic[:1] in (CHANGES_TOPIC, b"l")
    print(
        f"peak memory {peak_mib(daemon.process.pid):.0f} MiB after {published >> 20} MiB published"
    )
    assert peak_mib(daemon.process.pid) < MIB_OF_A_DAEMON + 20


class Clock:
    """A wall clock of its own for some processes: `step` sets it, from one call to the next."""

    def __init__(self, library: str, file: Path) -> None:
        self._file = file
        self.step(0)
        self.environment = {
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def step(self, seconds: int) -> None:
        """So many seconds from the true time."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)

    def read(self) -> float:
        """What time a new process believes it is."""
        found = subprocess.run(
            [sys.executable, "-c", "import time; print(time.time())"],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(found.stdout)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """For every process that the test starts."""
    library = need(FAKETIME)
    made = Clock(library, tmp_path / "clock")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.mark.slow
def test_steps_of_the_clock_move_no_lease(clock: Clock, daemon_of: Callable[[], Any]) -> None:
    daemon = daemon_of()
    with DaemonClient(daemon.address) as client, client.watch() as watch:
        kept = ask(client, Register(1, 1, there("kept"), 60.0))
        last, number = kept.generation, 2
        for step in (DAY_S, -DAY_S, 0, 365 * DAY_S):
            clock.step(step)
            # Leases end while the wall clock stands elsewhere, and begin: only the short ones end.
            short = ask(client, Register(number, 1, there("short"), 0.2))
            assert short.generation > last
            while "short" in {member.name for member in client.look(timeout_s=WAIT_S).members}:
                watch.poll(WAIT_S)
            beat = ask(client, Heartbeat(number + 1, "kept", kept.generation))
            assert beat == Beat(number + 1, "serving")
            last, number = short.generation, number + 2
        before = clock.read()
        clock.step(-DAY_S)
        assert clock.read() < before - DAY_S / 2  # the steps are real
        daemon.kill()
        daemon.start()  # a day, or a year, before its earlier life
        again = ask(client, Register(number, 1, there("short", life=2), 60.0, previous=last))
        assert again.generation > last
        assert isinstance(ask(client, Drain(number + 1, "short")), Done)


@pytest.fixture
def daemon_of() -> Iterator[Callable[[], Any]]:
    """Starts a daemon when the test has made its surroundings."""
    started: list[DaemonProcess] = []

    def start() -> DaemonProcess:
        started.append(DaemonProcess())
        return started[-1]

    yield start
    for process in started:
        process.end()

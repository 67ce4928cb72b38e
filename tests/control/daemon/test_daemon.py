"""The daemon as a process: requests, watchers, settings, signals, and frames from anybody."""

from __future__ import annotations

import os
import random
import socket as sockets
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from kvferry.control.cluster.client import DaemonClient, publisher_endpoint
from kvferry.control.cluster.messages import (
    MAX_REQUEST_NBYTES,
    Denied,
    Heartbeat,
    Look,
    Register,
    Registered,
    Registration,
    answers,
    requests,
)
from kvferry.control.daemon.daemon import ASLEEP_S, Daemon
from kvferry.control.daemon.settings import Settings, load_keys, read_settings
from kvferry.control.errors import (
    ConfigError,
    DaemonDenied,
    DaemonTimeout,
    InsecureAddress,
    PlacementError,
)
from tests import ROOT
from tests.support.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WAIT_S = 30.0


@pytest.fixture(scope="module")
def shared() -> Iterator[DaemonProcess]:
    process = DaemonProcess()
    yield process
    process.end()


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess()
    yield process
    process.end()


@pytest.fixture
def client(shared: DaemonProcess) -> Iterator[DaemonClient]:
    with DaemonClient(shared.address) as asker:
        yield asker


def register(client: DaemonClient, name: str, role: str = "prefill", **fields: Any) -> Any:
    lease_s = fields.pop("lease_s", 60.0)
    there = Registration(name, role, 1, "tcp://127.0.0.1:9", **fields)  # type: ignore[arg-type]
    return client.ask(Register(1, 1, there, lease_s), WAIT_S)


def test_members_are_seen_placed_drained_and_flipped(client: DaemonClient) -> None:
    assert isinstance(register(client, "p0"), Registered)
    with pytest.raises(PlacementError, match="no decode agent is serving"):
        client.place(100)
    register(client, "d0", "decode", num_blocks=10, tokens_per_block=16)
    placed = client.place(100)
    assert (placed.prefill, placed.decode) == ("p0", "d0")
    assert "p0: queue" in placed.reason
    with pytest.raises(PlacementError, match="room for 1000 tokens"):
        client.place(1000)
    client.drain("p0")
    with pytest.raises(PlacementError, match="no prefill agent is serving"):
        client.place(100)
    client.restore("p0")
    client.place(10)
    client.flip("d0", "prefill")
    members = {member.name: member for member in client.look().members}
    assert members["d0"].state == "draining"
    assert members["d0"].wanted_role == "prefill"
    with pytest.raises(DaemonDenied, match="no agent 'nobody' is registered"):
        client.drain("nobody")
    with pytest.raises(PlacementError, match="no placement policy 'best'"):
        client.place(100, policy="best")


def test_watchers_hear_of_changes(client: DaemonClient) -> None:
    with client.watch() as watch:
        register(client, "w0", lease_s=0.2)
        seen: set[bool] = set()
        while seen != {True, False}:  # it comes, and its lease ends
            watch.poll(WAIT_S)
            seen.add("w0" in watch.view.members)


def test_a_watcher_that_missed_something_notices(client: DaemonClient) -> None:
    with client.watch() as watch:
        register(client, "m0")
        while "m0" not in watch.view.members:
            watch.poll(WAIT_S)
        del watch.view.members["m0"]
        watch.view.sequence -= 1  # as if its coming had been lost
        while "m0" not in watch.view.members:
            watch.poll(WAIT_S)


def test_a_daemon_does_not_take_work_for_sleep() -> None:
    """What it forgives is at most what it did not spend on a processor."""
    local = Settings(bind="tcp://127.0.0.1:*", publish="tcp://127.0.0.1:*")
    began_s, worked_s = time.monotonic(), time.thread_time()
    daemon = Daemon(local, None)
    forgiven: list[float] = []
    daemon.membership.forgive = forgiven.append  # type: ignore[method-assign, assignment]
    try:
        daemon._now_s(0.0)
        spent_s = time.thread_time()
        while time.thread_time() < spent_s + 2 * ASLEEP_S:
            pass
        daemon._now_s(0.0)
    finally:
        daemon.close()
    away_s = time.monotonic() - began_s - (time.thread_time() - worked_s)
    assert sum(forgiven) <= away_s + 1e-3  # the two clocks' grain


def test_a_daemon_that_slept_loses_nobody(daemon: DaemonProcess) -> None:
    with DaemonClient(daemon.address) as client:
        generation = register(client, "p0", lease_s=1.0).generation
        daemon.freeze()
        with pytest.raises(DaemonTimeout):
            client.look(timeout_s=2.0)
        daemon.thaw()
        answer = client.ask(Heartbeat(99, "p0", generation), WAIT_S)
        assert not isinstance(answer, Denied)


def test_sigterm_drains_and_says_so(daemon: DaemonProcess) -> None:
    status, words = daemon.terminate()
    assert status == 0
    assert "drained and stopped" in words


def test_it_starts_fast_and_stays_small(shared: DaemonProcess) -> None:
    script = (
        "import sys, time; began = time.perf_counter(); import kvferry.control.daemon.daemon;"
        "print(time.perf_counter() - began, *sys.modules)"
    )
    _, *modules = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    ).stdout.split()
    assert {"torch", "numpy", "kvferry.engine"}.isdisjoint(modules)
    with open(f"/proc/{shared.process.pid}/status") as file:
        (resident,) = (line for line in file if line.startswith("VmRSS"))
    assert int(resident.split()[1]) < 60 * 1024


class TestFramesFromAnybody:
    @pytest.fixture
    def stranger(self, shared: DaemonProcess) -> Iterator[zmq.Socket[bytes]]:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
            socket.connect(shared.address)
            yield socket

    def test_a_flood_of_noise(self, stranger: zmq.Socket[bytes], client: DaemonClient) -> None:
        rng = random.Random(1)
        good = requests.encode(Look(1))
        for _ in range(2000):
            frame = bytearray(good * rng.randrange(1, 4))
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
            stranger.send(bytes(frame) if rng.random() < 0.5 else rng.randbytes(rng.randrange(99)))
            answers.decode(stranger.recv())
        client.look()

    def test_a_message_that_is_too_large_costs_the_connection(
        self, stranger: zmq.Socket[bytes], client: DaemonClient
    ) -> None:
        stranger.send(bytes(MAX_REQUEST_NBYTES + 1))
        stranger.send_multipart([b"", b"two", b"three"])  # and one of too many parts
        client.look()

    def test_parts_of_one_message_are_a_request_each(self, stranger: zmq.Socket[bytes]) -> None:
        stranger.send_multipart([requests.encode(Look(number)) for number in (7, 8)])
        assert [answers.decode(stranger.recv()).request for _ in range(2)] == [7, 8]

    def test_bytes_that_are_no_zeromq(self, shared: DaemonProcess, client: DaemonClient) -> None:
        host, port = shared.address[len("tcp://") :].split(":")
        with sockets.create_connection((host, int(port))) as raw:
            raw.sendall(random.Random(2).randbytes(10_000))
        client.look()

    def test_a_rep_asker_is_served(self, shared: DaemonProcess) -> None:
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
            socket.connect(shared.address)
            socket.send(requests.encode(Look(5)))
            assert answers.decode(socket.recv()).request == 5


class TestSettings:
    def test_flags_win_over_the_environment_over_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "daemon.toml"
        file.write_text('bind = "tcp://127.0.0.1:1"\npublish = "tcp://127.0.0.1:2"\n')
        environment = {
            "KVFERRY_DAEMON_CONFIG": str(file),
            "KVFERRY_DAEMON_PUBLISH": "tcp://127.0.0.1:3",
            "KVFERRY_DAEMON_LOG_LEVEL": "debug",
        }
        settings = read_settings(["--log-level", "error"], environment)
        assert settings.bind == "tcp://127.0.0.1:1"
        assert settings.publish == "tcp://127.0.0.1:3"
        assert settings.log_level == "error"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("bnid = 'x'", "sets 'bnid', which is no setting: use bind"),
            ("bind = 7", "sets bind to 7: it is a text"),
            ("bind =", "is no TOML"),
        ],
    )
    def test_what_is_wrong_with_a_file_is_said(self, tmp_path: Path, text: str, words: str) -> None:
        file = tmp_path / "daemon.toml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=words) as caught:
            read_settings(["--config", str(file)], {})
        assert str(file) in str(caught.value)

    def test_without_keys_only_this_machine(self) -> None:
        for flags in (["--bind", "tcp://0.0.0.0:1"], ["--publish", "tcp://*:2"]):
            with pytest.raises(InsecureAddress, match="kvferry keys new"):
                load_keys(read_settings(flags, {}))

    def test_an_address_in_use_is_named(self, shared: DaemonProcess) -> None:
        found = subprocess.run(
            [sys.executable, "-m", "kvferry.control", "--bind", shared.address],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
        assert found.returncode == 2
        assert f"cannot listen on {shared.address}" in found.stderr


def test_a_daemon_on_every_address_is_followed_where_it_was_asked() -> None:
    assert publisher_endpoint("tcp://a.b:1", "tcp://*:2") == "tcp://a.b:2"
    assert publisher_endpoint("tcp://a.b:1", "tcp://c:2") == "tcp://c:2"

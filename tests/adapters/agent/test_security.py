"""CURVE and one-time tokens: who is not admitted gets no message through and no link open."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from typer.testing import CliRunner

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.cluster.messages import Changes, Register, Registration, Tick, answers
from kvferry.control.curve import new_pair, protect_client
from kvferry.control.errors import (
    ConfigError,
    DaemonTimeout,
    HelloTimeout,
    InsecureAddress,
)
from kvferry.control.keys import AllowList, Keys, Permit, is_local, split_address, write_keys
from kvferry.engine.errors import TransportUnavailable
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.tools.keys import app as keys_app
from tests import ROOT
from tests.support.agent_process import WAIT_S
from tests.support.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.agents import Local

SRC, DST = [9, 2, 11, 40, 3], [1, 0, 7, 30, 12]


@pytest.fixture
def transport() -> str:
    return "tcp"


@pytest.fixture
def new_keys(tmp_path: Path) -> Callable[[str], Keys]:
    """Key pairs that allow each other."""

    def make(name: str) -> Keys:
        write_keys(tmp_path / f"{name}.key", *new_pair())
        return Keys.load(tmp_path / f"{name}.key")

    return make


@pytest.fixture
def strange_keys(tmp_path: Path) -> Keys:
    """A key pair that nobody allows."""
    write_keys(tmp_path / "elsewhere" / "stranger.key", *new_pair())
    return Keys.load(tmp_path / "elsewhere" / "stranger.key")


@pytest.fixture
def daemon(tmp_path: Path, new_keys: Callable[[str], Keys]) -> Iterator[DaemonProcess]:
    keys = new_keys("daemon")
    process = DaemonProcess("--keys", str(tmp_path / "daemon.key"))
    process.key = keys.public.hex()
    yield process
    process.end()


def hand_over(prefill: Local, decode: Local) -> None:
    prefill.cache.fill(SRC, 1)
    prefill.agent.send("r", SRC)
    decode.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    assert decode.cache.holds(DST, 1)


def test_agents_with_keys_meet_through_a_daemon_with_keys(
    daemon: DaemonProcess, new_keys: Callable[[str], Keys], new_agent: Callable[..., Local]
) -> None:
    def make(name: str, role: str) -> Local:
        options = {"keys": new_keys(name), "daemon": f"{daemon.address}#{daemon.key}"}
        return new_agent(name, role, options=options)

    prefill, decode = make("prefill-0", "prefill"), make("decode-0", "decode")
    member = decode.agent.wait_for_member("prefill-0", WAIT_S)
    assert member.registration.public_key.hex() in member.registration.address
    hand_over(prefill, decode)


def test_a_key_that_is_not_allowed_gets_no_answer(
    daemon: DaemonProcess, new_keys: Callable[[str], Keys], strange_keys: Keys
) -> None:
    address = f"{daemon.address}#{daemon.key}"
    with (
        DaemonClient(address, strange_keys) as stranger,
        pytest.raises(DaemonTimeout, match="allow-list"),
    ):
        stranger.look(timeout_s=0.5)
    with DaemonClient(address, new_keys("tool")) as client:
        client.look()  # the allow-list is read again


def test_a_stranger_hears_no_publication(
    daemon: DaemonProcess, new_keys: Callable[[str], Keys], strange_keys: Keys
) -> None:
    """Whoever is allowed hears changes and ticks by then, and these three nothing."""
    server, tool = bytes.fromhex(daemon.key), new_keys("tool")
    with zmq.Context() as context:

        def follow(keys: Keys | None, server: bytes) -> zmq.Socket[bytes]:
            socket: zmq.Socket[bytes] = context.socket(zmq.SUB)
            socket.setsockopt(zmq.LINGER, 0)
            protect_client(socket, keys, server)
            socket.subscribe(b"")
            socket.connect(daemon.publisher)
            return socket

        strangers = [
            follow(strange_keys, server),
            follow(None, b""),
            follow(tool, new_pair()[0]),  # it takes another for the daemon
        ]
        friend = follow(tool, server)
        with DaemonClient(f"{daemon.address}#{daemon.key}", tool) as client:
            there = Registration("p", "prefill", 1, "tcp://127.0.0.1:9", public_key=tool.public)

            def hear(what: type) -> None:
                while True:
                    assert friend.poll(int(WAIT_S * 1000)), "the friend hears nothing"
                    if type(answers.decode(friend.recv_multipart()[1])) is what:
                        return

            hear(Tick)  # it has joined, and misses no change
            client.ask(Register(1, 1, there, 60.0))
            hear(Changes)
        assert [stranger.poll(0) for stranger in strangers] == [0, 0, 0]
        for socket in (friend, *strangers):
            socket.close()


def test_without_a_key_or_with_the_wrong_one_of_the_daemon_there_is_no_answer(
    daemon: DaemonProcess, new_keys: Callable[[str], Keys]
) -> None:
    with DaemonClient(daemon.address) as plain, pytest.raises(DaemonTimeout):
        plain.look(timeout_s=0.5)
    wrong = new_pair()[0].hex()
    with (
        DaemonClient(f"{daemon.address}#{wrong}", new_keys("tool")) as deceived,
        pytest.raises(DaemonTimeout),
    ):
        deceived.look(timeout_s=0.5)


def test_a_stranger_cannot_meet_an_agent(
    new_keys: Callable[[str], Keys], strange_keys: Keys, new_agent: Callable[..., Local]
) -> None:
    prefill = new_agent("prefill-0", "prefill", options={"keys": new_keys("prefill-0")})
    stranger = new_agent("decode-9", "decode", options={"keys": strange_keys})
    with pytest.raises(HelloTimeout):
        stranger.agent.connect(prefill.agent.address, timeout_s=0.5)
    plain = new_agent("decode-8", "decode")
    with pytest.raises(ConfigError, match="asks for keys"):
        plain.agent.connect(prefill.agent.address)
    endpoint, _ = split_address(prefill.agent.address)
    with pytest.raises(HelloTimeout):
        plain.agent.connect(endpoint, timeout_s=0.5)
    decode = new_agent("decode-0", "decode", options={"keys": new_keys("decode-0")})
    decode.agent.connect(prefill.agent.address)
    hand_over(prefill, decode)


def test_an_agents_engine_takes_no_link_without_a_token(new_agent: Callable[..., Local]) -> None:
    prefill = new_agent("prefill-0", "prefill")
    with (
        TransferEngine(name="thief", transports=("tcp",)) as thief,
        pytest.raises(TransportUnavailable, match="one-time token only"),
    ):
        thief.connect(prefill.agent.engine.address)


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://10.0.0.1:5"])
def test_without_keys_an_agent_stays_on_its_machine(
    new_agent: Callable[..., Local], bind: str
) -> None:
    with pytest.raises(InsecureAddress, match="kvferry keys new"):
        new_agent("prefill-0", "prefill", options={"bind": bind})


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("ipc:///tmp/x", True),
        ("127.0.0.9", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://*:1", False),
        ("tcp://example.org:1", False),
        ("tcp://eth0:1", False),
        ("", False),
    ],
)
def test_which_addresses_are_of_this_machine(endpoint: str, local: bool) -> None:
    assert is_local(endpoint) is local


class TestKeyFiles:
    def test_the_command_makes_them(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "kvferry.tools.cli", "keys", "new", "decode-0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment}
        made = subprocess.run([*command, "--folder", str(tmp_path)], check=True, **options)
        keys = Keys.load(tmp_path / "decode-0.key")
        assert keys.public.hex() in made.stdout
        assert keys.secret.hex() not in made.stdout + repr(keys)
        assert (tmp_path / "decode-0.key").stat().st_mode & 0o777 == 0o600
        assert AllowList(keys.allowed).permit(keys.public) == Permit("decode-0")
        again = subprocess.run([*command, "--folder", str(tmp_path)], check=False, **options)
        assert again.returncode == 2
        assert "never overwritten" in again.stderr

    def test_a_file_that_others_can_read_is_refused(self, tmp_path: Path) -> None:
        write_keys(tmp_path / "x.key", *new_pair())
        (tmp_path / "x.key").chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            Keys.load(tmp_path / "x.key")

    @pytest.mark.parametrize("text", ["", "public = 5", "public = 'zz'\nsecret = 'aa'", "x ="])
    def test_a_file_that_holds_no_key_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "x.key").write_text(text)
        with pytest.raises(ConfigError, match=r"x\.key"):
            Keys.load(tmp_path / "x.key")

    def test_a_list_that_is_gone_or_full_of_notes_allows_nobody(self, tmp_path: Path) -> None:
        key = new_pair()[0]
        path = tmp_path / "allowed_keys"
        path.write_text(f"# people\nnot hex\n{key.hex()[:-2]} short\n")
        allowed = AllowList(str(path))
        assert allowed.permit(key) is None
        path.write_text(f"{key.hex()}  a tool # since May\n")
        assert allowed.permit(key) == Permit("a tool")
        path.unlink()
        assert allowed.permit(key) is None

    def test_options_of_a_line_stand_before_its_label(self, tmp_path: Path) -> None:
        public, secret = new_pair()
        write_keys(tmp_path / "d.key", public, secret, role="agent", names="decode-*")
        permit = AllowList(str(tmp_path / "allowed_keys")).permit(public)
        assert permit == Permit("d", "agent", "decode-*")
        assert permit.covers("decode-7/0")
        assert not permit.covers("prefill-decode-7")

    @pytest.mark.parametrize("options", ["role=admin", "role=", "names= role=agent"])
    def test_a_line_with_options_that_are_none_lets_nobody_in(
        self, tmp_path: Path, options: str
    ) -> None:
        key = new_pair()[0]
        path = tmp_path / "allowed_keys"
        path.write_text(f"{key.hex()} {options} a tool\n")
        assert AllowList(str(path)).permit(key) is None

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["../evil"], "no name for a key"),
            (["two words"], "no name for a key"),
            (["x", "--role", "admin"], "agent, router, operator"),
            (["x", "--names", "a b"], "blank"),
        ],
    )
    def test_the_command_writes_nothing_elsewhere_and_no_line_that_means_another(
        self, tmp_path: Path, arguments: list[str], said: str
    ) -> None:
        folder = tmp_path / "keys"
        made = CliRunner().invoke(keys_app, ["new", *arguments, "--folder", str(folder)])
        assert made.exit_code == 2
        assert said in " ".join(made.output.split())
        assert list(tmp_path.iterdir()) == []

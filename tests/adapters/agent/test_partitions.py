"""Agents on two hosts whose network breaks: both ways, or one way only. Needs root.

The other host is a network namespace and a process namespace, at the end of a veth pair. One way is
broken by a wrong hardware address for the other end: frames that go there vanish in silence.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.curve import new_pair
from kvferry.control.errors import ControlError
from kvferry.control.keys import Keys, write_keys
from tests.support.agent_process import WAIT_S
from tests.support.agents import Remote
from tests.support.daemon_process import DaemonProcess
from tests.support.requirements import lack, need_network_namespaces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.agents import Local

# A network of its own for each process that tests: two of them may run at once.
HERE, THERE = (f"10.214.{os.getpid() % 250}.{host}" for host in (1, 2))
NOBODY = "02:00:00:00:00:99"
SRC, DST = [9, 2, 11, 40, 3], [1, 0, 7, 30, 12]
LEASE_S = 3.0


class Cable:
    """A veth pair between this host and another."""

    def __init__(self) -> None:
        self.host = f"kvferry-p{os.getpid()}"
        self.near, self.far = f"kp{os.getpid()}", f"kq{os.getpid()}"
        self.launcher = [
            *("ip", "netns", "exec", self.host),
            *("unshare", "--pid", "--fork", "--kill-child"),
        ]

    def lay(self) -> None:
        self._ip("netns", "add", self.host)
        self._ip("link", "add", self.near, "type", "veth", "peer", self.far, "netns", self.host)
        for where, device, address in ((), self.near, HERE), (self._there, self.far, THERE):
            self._ip(*where, "addr", "add", f"{address}/24", "dev", device)
            self._ip(*where, "link", "set", device, "up")
        self._ip(*self._there, "link", "set", "lo", "up")

    def cut(self, way: str) -> None:
        """Nothing gets through any more: `both` ways, from `here` or from `there`."""
        if way != "there":
            self._lead_astray((), self.near, THERE)
        if way != "here":
            self._lead_astray(self._there, self.far, HERE)

    def mend(self) -> None:
        for where, device, address in ((), self.near, THERE), (self._there, self.far, HERE):
            self._ip(*where, "neigh", "flush", "to", address, "dev", device, "nud", "permanent")

    def remove(self) -> None:
        for command in (["link", "del", self.near], ["netns", "del", self.host]):
            subprocess.run(["ip", *command], check=False, capture_output=True)

    @property
    def _there(self) -> tuple[str, str]:
        return ("-n", self.host)

    def _lead_astray(self, where: tuple[str, ...], device: str, address: str) -> None:
        wrong = ("lladdr", NOBODY, "dev", device, "nud", "permanent")
        self._ip(*where, "neigh", "replace", address, *wrong)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    need_network_namespaces()
    cable = Cable()
    try:
        cable.lay()
    except subprocess.CalledProcessError as error:
        cable.remove()
        lack(f"no network namespaces here: {error.stderr.strip()}")
    yield cable
    cable.remove()


@pytest.fixture
def transport() -> str:
    return "tcp"


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Keys]:
    """Everybody's; addresses beyond one machine need them."""
    names = ("daemon", "decode-0", "prefill-0", "tool")
    for name in names:
        write_keys(tmp_path / f"{name}.key", *new_pair())
    return {name: Keys.load(tmp_path / f"{name}.key") for name in names}


@pytest.fixture
def daemon(cable: Cable, keys: dict[str, Keys], tmp_path: Path) -> Iterator[DaemonProcess]:
    options = ("--keys", str(tmp_path / "daemon.key"))
    at = f"tcp://{HERE}:*"
    process = DaemonProcess(*options, "--bind", at, "--publish", at)
    process.key = keys["daemon"].public.hex()
    yield process
    process.end()


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("both", marks=pytest.mark.slow),
        pytest.param("here", marks=pytest.mark.soak),
        pytest.param("there", marks=pytest.mark.soak),
    ],
)
def test_a_partition_ends_what_is_under_way_and_heals(
    cable: Cable,
    daemon: DaemonProcess,
    keys: dict[str, Keys],
    new_agent: Callable[..., Local],
    way: str,
) -> None:
    address = f"{daemon.address}#{daemon.key}"
    common: dict[str, Any] = {"daemon": address, "lease_s": LEASE_S}
    options = common | {"keys": keys["decode-0"], "bind": f"tcp://{HERE}:*"}
    decode = new_agent("decode-0", "decode", options=options)
    prefill = Remote(cable.launcher)
    try:
        prefill.begin(
            name="prefill-0",
            role="prefill",
            transport="tcp",
            keys=keys["prefill-0"],
            bind=f"tcp://{THERE}:*",
            **common,
        )
        first = decode.agent.wait_for_member("prefill-0", WAIT_S)
        prefill.call("fill", SRC, 1)

        def hand_over(request: str) -> None:
            sending = prefill.call("send", request, SRC)
            decode.agent.receive(request, "prefill-0", DST).wait(WAIT_S)
            prefill.call("wait", sending)
            assert decode.cache.holds(DST, 1)

        hand_over("before")
        cable.cut(way)
        theirs = prefill.call("send", "during", SRC)  # the test's pipe needs no network
        ours = decode.agent.receive("during", "prefill-0", [20, 21, 22, 23, 24], timeout_s=3.0)
        with pytest.raises(ControlError):
            ours.wait(WAIT_S)
        ours.blocks_free.wait(WAIT_S)
        prefill.call("cancel", theirs)
        prefill.call("wait_for_blocks", theirs)
        registrar = decode.agent._registrar
        assert registrar is not None
        if way != "here":  # nothing of it reaches the daemon: its lease ends
            assert registrar.wait(lambda: "prefill-0" not in decode.agent.members, WAIT_S)
        cable.mend()
        if way != "here":
            again = decode.agent.wait_for_member("prefill-0", WAIT_S)
            assert again.generation > first.generation
            assert again.registration.life == first.registration.life
        prefill.call("wait_for_member", "decode-0")
        hand_over("after")
        with DaemonClient(address, keys["tool"]) as client:
            assert {m.name for m in client.look(timeout_s=WAIT_S).members} == {
                "decode-0",
                "prefill-0",
            }
    finally:
        prefill.end()

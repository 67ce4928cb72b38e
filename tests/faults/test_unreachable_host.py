"""A peer on another host: a network namespace with a process namespace, at the end of a veth pair."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import PeerLost, TransportUnavailable
from kvferry.engine.transfer_engine import TransferEngine
from tests.support.requirements import lack, need_network_namespaces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OUR_ADDRESS, ITS_ADDRESS = "10.213.77.1", "10.213.77.2"
MIB = 1 << 20


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def host() -> Iterator[tuple[list[str], Callable[[str], None]]]:
    """How to start a process on the other host, and what cuts (`down`) or mends (`up`) its cable."""
    need_network_namespaces()
    name = f"kvferry-{os.getpid()}"
    near, far = f"kn{os.getpid()}", f"kf{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        lack(f"no network namespaces here: {error.stderr.strip()}")
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _ip("addr", "add", f"{OUR_ADDRESS}/24", "dev", near)
        _ip("link", "set", near, "up")
        _ip("-n", name, "addr", "add", f"{ITS_ADDRESS}/24", "dev", far)
        _ip("-n", name, "link", "set", far, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        launcher = ["ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--kill-child"]
        yield launcher, lambda state: _ip("link", "set", near, state)
    finally:
        subprocess.run(["ip", "link", "del", near], check=False, capture_output=True)
        _ip("netns", "del", name)


def test_a_host_that_cannot_be_reached_is_lost_and_may_come_back(
    host: tuple[list[str], Callable[[str], None]], start_peer: Callable[..., Any]
) -> None:
    launcher, cable = host
    peer = start_peer(launcher=launcher, name="far", host=ITS_ADDRESS)
    with TransferEngine(host=OUR_ADDRESS, name="near") as engine:
        pool = np.full(MIB, 7, np.uint8)
        region = engine.register(pool)
        theirs = peer.call("pool", MIB, 0)
        link = engine.connect(peer.address)
        assert link.transport == "tcp"
        assert engine.expect(engine.new_imm(), nbytes=0, links=(link,)).wait() == 0
        link.write(region, 0, theirs, 0, MIB).wait(10)
        assert (peer.contents(theirs) == 7).all()

        hopeless = engine.expect(engine.new_imm(), nbytes=1, links=(link,))
        cable("down")
        with pytest.raises(PeerLost, match=r"silent .* unreachable") as lost:
            hopeless.wait(20)
        assert not lost.value.process_gone
        with pytest.raises(PeerLost):
            link.write(region, 0, theirs, 0, MIB)
        link.quiesced.wait(10)

        cable("up")
        again = engine.connect(peer.address)
        pool[:] = 9
        again.write(region, 0, theirs, 0, MIB).wait(10)
        assert (peer.contents(theirs) == 9).all()


def test_cma_is_refused_to_another_host_by_name(
    host: tuple[list[str], Callable[[str], None]], start_peer: Callable[..., Any]
) -> None:
    launcher, _ = host
    peer = start_peer(launcher=launcher, name="far", host=ITS_ADDRESS)
    with (
        TransferEngine(host=OUR_ADDRESS) as engine,
        pytest.raises(TransportUnavailable, match="another host"),
    ):
        engine.connect(peer.address, transport="cma")

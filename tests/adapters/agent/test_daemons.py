"""Agents and two daemons that share an etcd: whichever dies, agents stay members and hand over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.cluster.client import DaemonClient
from tests.support.agent_process import WAIT_S
from tests.support.daemon_process import DaemonProcess
from tests.support.etcd_process import EtcdProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.agents import Local, Remote

SRC, DST = [9, 2, 11, 40, 3], [1, 0, 7, 30, 12]
LEASE_S = 7.0  # kept by etcd for 15 s: agents look for another daemon after 3

pytestmark = pytest.mark.slow


@pytest.fixture
def transport() -> str:
    return "tcp"


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    process = EtcdProcess(tmp_path)
    yield process
    process.end()


@pytest.fixture
def daemons(etcd: EtcdProcess) -> Iterator[list[DaemonProcess]]:
    pair = [DaemonProcess("--store", etcd.url) for _ in range(2)]
    yield pair
    for process in pair:
        process.end()


def test_agents_outlive_the_daemons_they_were_registered_with(
    etcd: EtcdProcess, daemons: list[DaemonProcess], new_agent: Callable[..., Local]
) -> None:
    both = ",".join(daemon.address for daemon in daemons)
    options: dict[str, Any] = {"daemon": both, "lease_s": LEASE_S}
    prefill = new_agent("prefill-0", "prefill", options=options)
    decode = new_agent("decode-0", "decode", options=options)
    decode.agent.wait_for_member("prefill-0", WAIT_S)
    prefill.agent.wait_for_member("decode-0", WAIT_S)
    enrolments = [agent.agent._registrar for agent in (prefill, decode)]
    generations = [
        registrar._presence.generation for registrar in enrolments if registrar is not None
    ]
    heard: list[str] = []

    def hand_over(request: str) -> None:
        prefill.cache.fill(SRC, len(heard))
        sending = prefill.agent.send(request, SRC)
        decode.agent.receive(request, "prefill-0", DST).wait(WAIT_S)
        sending.wait(WAIT_S)
        assert decode.cache.holds(DST, len(heard))
        heard.append(request)

    hand_over("before")
    daemons[0].kill()
    hand_over("without the first daemon")
    with DaemonClient(both) as client, client.watch() as watch:
        # They have come to the second daemon when a drain asked for there is heard of.
        client.drain("decode-0")
        registrar = decode.agent._registrar
        assert registrar is not None
        assert registrar.wait(lambda: decode.agent.draining, WAIT_S)
        client.restore("decode-0")
        assert registrar.wait(lambda: not decode.agent.draining, WAIT_S)
        assert {member.name for member in client.look().members} == {"prefill-0", "decode-0"}
        etcd.kill()
        hand_over("without a store")
        etcd.start()
        daemons[0].start()
        watch.poll(0.0)
    with DaemonClient(daemons[0].address) as client:
        found = {member.name: member for member in client.look(timeout_s=WAIT_S).members}
    assert [found[n].generation for n in ("prefill-0", "decode-0")] == generations
    hand_over("at last")


def test_a_killed_agent_is_gone_for_agents_of_another_daemon(
    daemons: list[DaemonProcess],
    new_agent: Callable[..., Local],
    start_agent: Callable[..., Remote],
) -> None:
    decode = new_agent("decode-0", "decode", options={"daemon": daemons[1].address})
    remote = start_agent("prefill-0", "prefill", daemon=daemons[0].address, lease_s=0.5)
    decode.agent.wait_for_member("prefill-0", WAIT_S)
    remote.kill()
    registrar = decode.agent._registrar
    assert registrar is not None
    assert registrar.wait(lambda: "prefill-0" not in decode.agent.members, WAIT_S)

"""/metrics, /healthz and /readyz of agents and of the daemon, and the dashboard that reads them."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.errors import ConfigError, HandoffTimeout
from tests import ROOT
from tests.support.agent_process import WAIT_S
from tests.support.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.transfer_engine import TransferEngine
    from tests.support.agents import Local

SRC, DST = [9, 2, 11, 40, 3], [1, 0, 7, 30, 12]
HTTP = {"http": "127.0.0.1:0"}


@pytest.fixture
def transport() -> str:
    return "tcp"


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess("--http", "127.0.0.1:0")
    yield process
    process.end()


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(address: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """All samples, by name and the values of their labels in the order of the labels' names."""
    status, text = get(address, "/metrics")
    assert status == 200
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_an_agent_counts_what_it_hands_over(new_agent: Callable[..., Local]) -> None:
    prefill = new_agent("prefill-0", "prefill", options=HTTP)
    decode = new_agent("decode-0", "decode", options=HTTP)
    decode.agent.connect(prefill.agent.address)
    sending = prefill.agent.send("r", SRC)
    nbytes = decode.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    sending.wait(WAIT_S)
    with pytest.raises(HandoffTimeout):
        decode.agent.receive("never", "prefill-0", DST, timeout_s=0.05).wait(WAIT_S)
    here, there = samples(decode.agent.http_address), samples(prefill.agent.http_address)
    assert here["kvferry_transfer_bytes_total", ("in", "direct", "tcp")] == nbytes
    assert there["kvferry_transfer_bytes_total", ("out", "direct", "tcp")] == nbytes
    assert here["kvferry_handoff_seconds_count", ("decode",)] == 1
    assert here["kvferry_errors_total", ("HandoffTimeout",)] == 1
    assert here["kvferry_links", ("tcp",)] == 1
    assert there["kvferry_handoffs", ()] in (0, 1)  # the one that is being cancelled


@pytest.mark.parametrize("transport", ["tcp", "cma"])
@pytest.mark.parametrize("mode", ["push", "pull"])
def test_bytes_that_were_staged_and_what_staging_takes(
    new_agent: Callable[..., Local],
    staging_engine: Callable[[str], TransferEngine],
    transport: str,
    mode: str,
) -> None:
    prefill, decode = (
        new_agent(f"{role}-0", role, options=HTTP | {"engine": staging_engine(role)})
        for role in ("prefill", "decode")
    )
    decode.agent.connect(prefill.agent.address)
    before = samples(decode.agent.http_address)["kvferry_staging_bytes", ()]
    assert before == 0
    prefill.cache.fill(SRC, 1)
    sending = prefill.agent.send("r", SRC)
    nbytes = decode.agent.receive("r", "prefill-0", DST, mode=mode).wait(WAIT_S)  # type: ignore[arg-type]
    sending.wait(WAIT_S)
    assert decode.cache.holds(DST, 1)
    here, there = samples(decode.agent.http_address), samples(prefill.agent.http_address)
    path = "staged" if mode == "push" else "served"
    assert here["kvferry_transfer_bytes_total", ("in", "staged", transport)] == nbytes
    assert there["kvferry_transfer_bytes_total", ("out", path, transport)] == nbytes
    holders = [prefill, decode] if transport == "tcp" else [prefill]  # whoever has the bytes
    for local in holders:
        assert samples(local.agent.http_address)["kvferry_staging_bytes", ()] >= nbytes
    for local in holders:
        local.agent.engine.close()
        assert not local.agent.engine.staging_nbytes


def test_health_of_an_agent(new_agent: Callable[..., Local], daemon: DaemonProcess) -> None:
    local = new_agent("a", "prefill", options=HTTP | {"daemon": daemon.address, "lease_s": 0.6})
    address = local.agent.http_address
    registrar = local.agent._registrar
    assert registrar is not None
    assert registrar.wait(lambda: registrar.standing.present, WAIT_S)
    assert get(address, "/healthz") == (200, "ok\n")
    assert get(address, "/readyz") == (200, "ok\n")
    with DaemonClient(daemon.address) as client:
        client.drain("a")
    assert registrar.wait(lambda: registrar.draining, WAIT_S)
    assert get(address, "/readyz") == (503, "draining\n")
    assert get(address, "/nothing")[0] == 404
    alone = new_agent("b", "prefill", options=HTTP | {"daemon": "tcp://127.0.0.1:1"})
    status, words = get(alone.agent.http_address, "/readyz")
    assert status == 503
    assert words.startswith("not registered")


def test_the_daemon_tells_of_its_members(
    new_agent: Callable[..., Local], daemon: DaemonProcess
) -> None:
    local = new_agent("a", "prefill", options={"daemon": daemon.address, "lease_s": 0.6})
    local.agent.wait_for_member("a", WAIT_S)
    assert get(daemon.http, "/healthz") == (200, "ok\n")
    assert get(daemon.http, "/readyz") == (200, "ok\n")
    while ("kvferry_members", ("prefill", "serving")) not in (seen := samples(daemon.http)):
        pass
    assert seen["kvferry_member_free_blocks", ("a",)] == 64
    assert seen["kvferry_daemon_requests_total", ()] > 0


def test_the_page_s_figures_are_those_of_the_handoffs(
    new_agent: Callable[..., Local], daemon: DaemonProcess
) -> None:
    """Two agents tell with their heartbeats what they did; the daemon adds it up."""
    options = {"daemon": daemon.address, "lease_s": 0.6}
    prefill = new_agent("prefill-0", "prefill", options=options)
    decode = new_agent("decode-0", "decode", options=options)
    decode.agent.wait_for_member("prefill-0", WAIT_S)
    sending = prefill.agent.send("r", SRC)
    decode.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    sending.wait(WAIT_S)
    waits = decode.agent.receive("never", "prefill-0", DST)
    with pytest.raises(HandoffTimeout):
        decode.agent.receive("late", "prefill-0", DST, timeout_s=0.05).wait(WAIT_S)

    def state() -> Any:
        return json.loads(get(daemon.http, "/api/state")[1])

    while not (seen := state())["links"]:
        pass
    assert [(x["source"], x["target"], x["transport"]) for x in seen["links"]] == [
        ("prefill-0", "decode-0", "tcp")
    ]
    while "HandoffTimeout" not in (seen := state())["errors"]:
        pass
    failure = next(x for x in seen["failures"] if x["agent"] == "decode-0")
    assert (failure["handoff"], failure["peer"]) == ("late", "prefill-0")
    while not (seen := state())["live"]:
        pass
    assert [(x["handoff"], x["decode"]) for x in seen["live"]] == [("never", "decode-0")]
    while not any(point[4] for point in state()["points"]):
        pass
    assert {agent["name"] for agent in seen["agents"]} == {"prefill-0", "decode-0"}
    waits.cancel()


def test_the_dashboard_asks_for_metrics_that_there_are(
    new_agent: Callable[..., Local], daemon: DaemonProcess
) -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"kvferry_\w+", target["expr"])
    }
    local = new_agent("a", "prefill", options=HTTP)
    text = get(local.agent.http_address, "/metrics")[1] + get(daemon.http, "/metrics")[1]
    families = {family.name for family in text_string_to_metric_families(text)}
    for name in asked:
        assert re.sub(r"_(bucket|total)$", "", name) in families


def test_an_address_that_cannot_be_is_named(new_agent: Callable[..., Local]) -> None:
    for address in ("nowhere", "127.0.0.1:99999", "127.0.0.1:x"):
        with pytest.raises(ConfigError, match=re.escape(address)):
            new_agent("a", "prefill", options={"http": address})

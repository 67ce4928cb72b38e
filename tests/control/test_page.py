"""The daemon's page, in a real browser, with agents that beat as agents do.

Screenshots of each test are left in `artifacts/page/`.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from kvferry.control.cluster.messages import (
    SECONDS_BOUNDS,
    Activity,
    Beat,
    Drain,
    Failure,
    Heartbeat,
    LinkActivity,
    LiveHandoff,
    Load,
    Register,
    Registered,
    Registration,
    Topology,
    answers,
    requests,
)
from kvferry.control.http import http_host
from tests import browser
from tests.daemon_process import ROOT, DaemonProcess
from tests.needs import CHROMIUM, need

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvferry.control.handoff.messages import Role

SHOTS = ROOT / "artifacts" / "page"
UP = "document.querySelector('#status').dataset.state === 'up'"
LEASE_S = 60.0  # no test is to lose an agent because the machine is busy
WAIT_S = 30.0


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    with browser.Browser(need(CHROMIUM)) as made:
        yield made


@pytest.fixture
def page(chromium: browser.Browser) -> Iterator[browser.Browser]:
    chromium.console.clear()
    chromium.scheme("light")
    chromium.size(1440, 900)
    yield chromium
    chromium.open("about:blank")


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess("--http", "127.0.0.1:0")
    yield process
    process.end()


class Crowd:
    """Agents of which only the heartbeats are there."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        self._socket.connect(daemon.address)
        self._generations: dict[str, int] = {}

    def register(self, name: str, role: Role, host: str = "node-0") -> None:
        there = Registration(
            name,
            role,
            len(self._generations) + 1,
            "tcp://127.0.0.1:1",
            num_blocks=1000,
            topology=Topology(host=host),
        )
        answer = self.ask(Register(1, 1, there, LEASE_S))
        assert isinstance(answer, Registered)
        self._generations[name] = answer.generation

    def beat(self, name: str, activity: Activity | None = None, **load: Any) -> None:
        load.setdefault("free_blocks", 400)
        beat = Heartbeat(
            1, name, self._generations[name], Load(**load), activity or Activity(age_s=0.001)
        )
        assert isinstance(self.ask(beat), Beat)

    def ask(self, ask: Any) -> Any:
        self._socket.send(requests.encode(ask))
        return answers.decode(self._socket.recv())

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def crowd(daemon: DaemonProcess) -> Iterator[Crowd]:
    crowd = Crowd(daemon)
    yield crowd
    crowd.close()


def busy(peer: str, handoffs: int = 10, **more: Any) -> Activity:
    """What a decode agent tells that has taken handoffs of some 10 ms."""
    seconds = [0] * (len(SECONDS_BOUNDS) + 1)
    seconds[12] = handoffs
    return Activity(
        age_s=0.001,
        nbytes=handoffs << 20,
        seconds=tuple(seconds),
        links=(LinkActivity(peer, "tcp", 2.5e9),),
        **more,
    )


def num_agents(count: int) -> str:
    return f"document.querySelectorAll('#map [data-agent]').length === {count}"


def get(address: str, path: str, **headers: str) -> tuple[int, str, Any]:
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def test_a_cluster_without_agents(page: browser.Browser, daemon: DaemonProcess) -> None:
    page.open(f"http://{daemon.http}/")
    page.until(UP)
    page.until("document.querySelector('#map svg').textContent.includes('No agents')")
    page.until("document.querySelector('#live').textContent.includes('No handoff is under way')")
    page.until("document.querySelector('#failures').textContent.includes('No handoff has failed')")
    page.screenshot(SHOTS / "none.png")
    assert page.console == []


def test_two_agents_as_they_work(
    page: browser.Browser, daemon: DaemonProcess, crowd: Crowd
) -> None:
    crowd.register("prefill-0", "prefill")
    crowd.register("decode-0", "decode", "node-1")
    page.open(f"http://{daemon.http}/")
    page.until(num_agents(2))
    crowd.beat(
        "decode-0",
        busy(
            "prefill-0",
            errors={"HandoffTimeout": 2},
            live=(LiveHandoff("request-77", "decode", "prefill-0", 5 << 20, 1.5),),
            failures=(Failure("request-12", "HandoffTimeout", "prefill-0", 3.0),),
        ),
        handoffs=1,
        rates={"prefill-0": 3e9},
    )
    page.until("document.querySelector('#map .link.flows')")
    page.until("document.querySelector('#map .rate').textContent === '2.50 GB/s'")
    page.until("document.querySelector('#live td').textContent === 'request-77'")
    page.until("document.querySelector('#live').textContent.includes('5.00 MiB')")
    page.until("document.querySelector('#failures td').textContent === 'request-12'")
    page.until("document.querySelector('#failures .counts b').textContent === '2'")
    # The step that they belong to has ended, and was drawn.
    page.until("document.querySelector('[data-tile=\"latency p50\"] b').textContent.includes('ms')")
    page.until("document.querySelector('#latency .series.s3')")
    page.until("document.querySelector('#throughput .series.s1')")
    page.move_to("[data-agent='decode-0']")
    page.until("!document.querySelector('#tip').hidden")
    tip = page.ask("document.querySelector('#tip').textContent")
    assert "node-1" in tip
    assert "400 of 1,000" in tip
    page.screenshot(SHOTS / "two-light.png")
    assert isinstance(crowd.ask(Drain(2, "prefill-0")).request, int)
    page.until("document.querySelector('[data-agent=prefill-0]').classList.contains('draining')")
    page.scheme("dark")
    page.screenshot(SHOTS / "two-dark.png")
    assert page.console == []


def test_light_dark_and_as_the_system_says(page: browser.Browser, daemon: DaemonProcess) -> None:
    def background() -> Any:
        return page.ask("getComputedStyle(document.body).backgroundColor")

    page.open(f"http://{daemon.http}/")
    page.until(UP)
    page.ask("localStorage.clear()")
    page.open(f"http://{daemon.http}/")
    light = background()
    page.scheme("dark")
    dark = background()
    assert light != dark
    for chosen, seen in (("light", light), ("dark", dark), ("system", dark)):
        page.ask("document.querySelector('#theme').click()")
        assert page.ask("document.querySelector('#theme').textContent") == f"theme: {chosen}"
        assert background() == seen


def test_names_are_text_whatever_they_hold(
    page: browser.Browser, daemon: DaemonProcess, crowd: Crowd
) -> None:
    name = "<img src=x onerror=window.hit=1>"
    crowd.register(name, "decode", "<script>window.hit=2</script>")
    live = LiveHandoff("<b onclick=window.hit=3>r</b>", "decode", "'\"><svg onload=window.hit=4>")
    failure = Failure("&lt;i&gt;", "<u>E</u>", "</td>")
    crowd.beat(name, Activity(age_s=0.001, live=(live,), failures=(failure,), errors={"<u>E": 1}))
    page.open(f"http://{daemon.http}/")
    page.until(num_agents(1))
    page.until(
        "document.querySelector('#live td')?.textContent === '<b onclick=window.hit=3>r</b>'"
    )
    page.until("document.querySelector('#failures td')?.textContent === '&lt;i&gt;'")
    page.move_to("#map [data-agent]")
    page.until("!document.querySelector('#tip').hidden")
    assert page.ask("document.querySelector('#tip b').textContent") == name
    assert (
        page.ask("document.querySelectorAll('main img, main b b, main u, main script').length") == 0
    )
    assert page.ask("window.hit") is None
    assert page.console == []


def test_the_page_outlives_the_daemon(
    page: browser.Browser, daemon: DaemonProcess, crowd: Crowd
) -> None:
    crowd.register("prefill-0", "prefill")
    crowd.register("decode-0", "decode")
    page.open(f"http://{daemon.http}/")
    page.until(num_agents(2))
    crowd.beat("decode-0", busy("prefill-0"))
    page.until("document.querySelector('#latency .series.s3')")
    daemon.kill()
    page.until("document.querySelector('#status').dataset.state === 'down'")
    page.until("document.querySelector('#trouble').textContent.includes('has not answered since')")
    assert page.ask(num_agents(2))  # what was known last
    page.screenshot(SHOTS / "away.png")
    daemon.arguments = ["--http", daemon.http]
    daemon.start()
    page.until(UP)
    assert page.ask("document.querySelector('#trouble').hidden")
    page.until(num_agents(0))  # nobody has told the new daemon yet
    page.until("document.querySelector('#latency .series.s3')")  # what was drawn before stays
    again = Crowd(daemon)
    again.register("decode-0", "decode")
    page.until(num_agents(1))
    again.close()


@pytest.mark.slow
def test_two_thousand_agents(page: browser.Browser, daemon: DaemonProcess, crowd: Crowd) -> None:
    for number in range(1000):
        for role in ("prefill", "decode"):
            crowd.register(f"{role}-{number}", role, f"{role}-host-{number // 8}")
    for number in range(1000):
        crowd.beat(f"decode-{number}", busy(f"prefill-{number * 7 % 1000}"))
    page.open(f"http://{daemon.http}/")
    page.until(num_agents(2000))
    page.until("document.querySelectorAll('#map .link').length === 600")
    page.until("document.querySelector('#map-note').textContent.includes('600 of 1,000')")
    inside = page.ask(
        "(() => { const m = document.querySelector('#map svg').getBoundingClientRect();"
        "return [...document.querySelectorAll('#map [data-agent]')].every((g) => {"
        "const b = g.getBoundingClientRect();"
        "return b.left >= m.left - 1 && b.right <= m.right + 1 && b.bottom <= m.bottom + 1; }); })()"
    )
    assert inside
    page.screenshot(SHOTS / "many-light.png")
    page.size(900, 1400)
    page.until(num_agents(2000))
    page.screenshot(SHOTS / "many-narrow.png")


def test_it_needs_nothing_from_elsewhere(page: browser.Browser, daemon: DaemonProcess) -> None:
    page.open(f"http://{daemon.http}/")
    page.until(UP)
    asked = page.ask("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(asked) > 5
    assert all(name.startswith(f"http://{daemon.http}/") for name in asked)
    _, _, headers = get(daemon.http, "/")
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")


def test_the_state_tells_no_addresses_and_no_keys(daemon: DaemonProcess, crowd: Crowd) -> None:
    crowd.register("prefill-0", "prefill")
    while not (state := json.loads(get(daemon.http, "/api/state")[1]))["agents"]:
        pass
    assert set(state["agents"][0]) == {
        *("name", "role", "state", "wanted_role", "host", "zone", "model", "transports"),
        *("generation", "num_blocks", "free_blocks", "queued_tokens", "handoffs"),
        "inflight_nbytes",
    }
    assert not state["secured"]


def test_only_this_machine_s_names_reach_a_server_of_this_machine(daemon: DaemonProcess) -> None:
    """A page from elsewhere whose name was made to mean 127.0.0.1 learns nothing."""
    port = daemon.http.rpartition(":")[2]
    for host, status in (
        (f"127.0.0.1:{port}", 200),
        (f"localhost:{port}", 200),
        (f"[::1]:{port}", 200),
        ("rebound.example", 403),
        (f"127.0.0.1.example:{port}", 403),
    ):
        assert get(daemon.http, "/api/state", Host=host)[0] == status
        assert get(daemon.http, "/metrics", Host=host)[0] == status


def test_an_address_without_a_host_is_of_this_machine() -> None:
    assert http_host("9717") == http_host(":9717") == "127.0.0.1"
    assert http_host("0.0.0.0:9717") == "0.0.0.0"
    assert http_host("[::1]:9717") == "::1"
    process = DaemonProcess("--http", ":0")
    try:
        assert process.http.startswith("127.0.0.1:")
    finally:
        process.end()

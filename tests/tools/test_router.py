"""`kvferry router` before servers that speak the API and fail in every way; with a real daemon, too."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from aiohttp import web
from typer.testing import CliRunner

from kvferry.control.cluster.messages import Register, Registration, answers, requests
from kvferry.tools.cli import app
from kvferry.tools.router import bodies, health
from kvferry.tools.router.backends import DaemonBackends, FixedBackends
from kvferry.tools.router.server import Router
from tests import ROOT
from tests.support.daemon_process import DaemonProcess
from tests.tools.api_server import ApiServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.tools.router.backends import Backends

    Serve = Callable[..., ApiServer]
    StartRouter = Callable[..., "RouterThread"]

WAIT_S = 30.0  # reached only when something hangs
COMPLETION = {"model": "tiny", "prompt": "over the water " * 8, "max_tokens": 5}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


class RouterUser:
    """A client of the router at `port`."""

    port: int

    @contextmanager
    def ask(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body else None
            connection.request(method, path, raw, {"Authorization": "Bearer key"})
            yield connection.getresponse()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, str]:
        with self.ask("GET", path) as response:
            return response.status, response.read().decode()

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        with self.ask("POST", path, body) as response:
            return response.status, json.load(response)

    def complete(self, **change: Any) -> str:
        status, answer = self.post("/v1/completions", COMPLETION | change)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def stream(self, path: str, body: Any) -> list[Any]:
        """The events of an answer, parsed; the last is "[DONE]" if it was said."""
        with self.ask("POST", path, body | {"stream": True}) as response:
            assert response.status == 200
            assert response.headers["Content-Type"].startswith("text/event-stream")
            texts = response.read().decode().split("\n\n")
        assert texts.pop() == ""
        data = [text.removeprefix("data: ") for text in texts]
        return [each if each == "[DONE]" else json.loads(each) for each in data]


class RouterThread(RouterUser):
    """The router on an event loop of its own."""

    def __init__(self, backends: Backends, *, together: bool = True) -> None:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._ended = asyncio.Event()
        router = Router(backends, attempts=3, timeout_s=WAIT_S, together=together)

        async def serve() -> None:
            runner = web.AppRunner(router.app, handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.port = runner.addresses[0][1]
            started.set()
            await self._ended.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serve(),))
        self._thread.start()
        assert started.wait(WAIT_S)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()


class RouterProcess(RouterUser):
    """`kvferry router` on a free port."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvferry.tools.cli", "router", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"},
        )
        assert self.process.stdout is not None
        watchdog = threading.Timer(WAIT_S, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        self.port = int(line.rpartition(":")[2]) if "listening" in line else 0

    def end(self) -> str:
        """SIGTERM; what it said."""
        self.process.terminate()
        try:
            return self.process.communicate(timeout=WAIT_S)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise


@pytest.fixture
def serve() -> Iterator[Callable[..., ApiServer]]:
    """Starts API servers."""
    servers: list[ApiServer] = []

    def start(name: str, role: str, port: int = 0) -> ApiServer:
        servers.append(ApiServer(name, role, port))
        return servers[-1]

    yield start
    for server in servers:
        if server._thread.is_alive():
            server.close()


@pytest.fixture
def start_router() -> Iterator[Callable[..., RouterThread]]:
    """Starts routers before these servers, or with a daemon."""
    routers: list[RouterThread] = []

    def start(*servers: ApiServer, daemon: str = "", **options: Any) -> RouterThread:
        named = {
            role: [each.url for each in servers if each.role == role]
            for role in ("prefill", "decode")
        }
        backends = (
            DaemonBackends(daemon) if daemon else FixedBackends(named["prefill"], named["decode"])
        )
        routers.append(RouterThread(backends, **options))
        return routers[-1]

    yield start
    for router in routers:
        router.end()


def text_of(events: list[Any]) -> str:
    """What a stream says."""
    choices = [each["choices"][0] for each in events if each != "[DONE]" and "choices" in each]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prefill_computes_and_decode_answers(
    serve: Serve, start_router: StartRouter, path: str
) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    body = CHAT if "chat" in path else COMPLETION
    asked = body | {"temperature": 0, "min_tokens": 2, "stream_options": {"include_usage": True}}
    events = router.stream(path, asked)
    assert text_of(events) == "d with KV of engine-of-p "
    assert events[-1] == "[DONE]"
    (first,) = prefill.bodies
    assert first["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}
    assert first.get("max_completion_tokens" if "chat" in path else "max_tokens") == 1
    assert first["stream"] is False
    assert not {"stream_options", "min_tokens"} & first.keys()
    assert first["temperature"] == 0
    (second,) = decode.bodies
    params = second.pop("kv_transfer_params")
    assert params["remote_request_id"] == "p-1"
    assert second == asked | {"stream": True}
    names = [server.headers[0]["X-Request-Id"] for server in (prefill, decode)]
    assert names[0] == names[1] != ""
    assert decode.headers[0]["Authorization"] == "Bearer key"


def test_both_are_called_at_once_when_prefills_address_is_known(
    serve: Serve, start_router: StartRouter
) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    for _ in range(3):
        assert router.complete() == "d with KV of engine-of-p"
    names = [body["kv_transfer_params"].get("transfer_id") for body in prefill.bodies]
    assert names[0] is None
    assert None not in names[1:]
    assert len(set(names)) == 3
    second = decode.bodies[1]["kv_transfer_params"]
    assert second["transfer_id"] == names[1]
    assert (second["remote_host"], second["remote_port"]) == ("127.0.0.1", 7000)
    metrics = router.get("/metrics")[1]
    assert 'kvferry_router_attempts_total{way="both at once"} 2.0' in metrics
    assert 'kvferry_router_requests_total{status="200"} 3.0' in metrics


def test_prefill_first_can_be_asked_for(serve: Serve, start_router: StartRouter) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode, together=False)
    for _ in range(3):
        router.complete()
    assert all("transfer_id" not in body["kv_transfer_params"] for body in prefill.bodies)


@pytest.mark.parametrize("fate", ["drop", "500", "dead"])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_another_prefill_takes_over(
    serve: Serve, start_router: StartRouter, fate: str, known: bool, stream: bool
) -> None:
    first, second = serve("p1", "prefill"), serve("p2", "prefill")
    decode = serve("d", "decode")
    router = start_router(first, second, decode)
    if known:  # both are called at once from here on
        router.complete()
        router.complete()
        decode.hanging.clear()
        first.after = decode.hanging  # or decode is never asked
    if fate == "dead":
        first.close()
    else:
        first.plan.put(fate)
    if stream:
        events = router.stream("/v1/completions", COMPLETION)
        assert events[-1] == "[DONE]"
        text = text_of(events).strip()
    else:
        text = router.complete()
    assert text == "d with KV of engine-of-p2"
    if known and fate != "dead":
        assert decode.gone_away.wait(WAIT_S), "the first attempt at decode goes on"
    if fate != "dead":  # who is gone may be seen to be before it is asked
        assert 'role="prefill"' in router.get("/metrics")[1]


@pytest.mark.parametrize("fate", ["drop", "500"])
def test_another_decode_takes_over(serve: Serve, start_router: StartRouter, fate: str) -> None:
    prefill = serve("p", "prefill")
    first, second = serve("d1", "decode"), serve("d2", "decode")
    router = start_router(prefill, first, second)
    first.plan.put(fate)
    assert router.complete() == "d2 with KV of engine-of-p"


@pytest.mark.parametrize(
    ("path", "fate"),
    [
        ("/v1/completions", "error event"),
        ("/v1/chat/completions", "open then error"),
    ],
)
def test_a_stream_that_fails_before_its_first_token_is_repeated(
    serve: Serve, start_router: StartRouter, path: str, fate: str
) -> None:
    """A load that failed: vLLM says so in a stream that has begun. The prefill server may be why."""
    first, second = serve("p1", "prefill"), serve("p2", "prefill")
    decode = serve("d", "decode")
    router = start_router(first, second, decode)
    decode.plan.put(fate)
    events = router.stream(path, CHAT if "chat" in path else COMPLETION)
    assert text_of(events) == "d with KV of engine-of-p2 "
    assert not any("error" in each for each in events if each != "[DONE]")


def test_a_stream_that_breaks_after_a_token_ends_with_an_error(
    serve: Serve, start_router: StartRouter
) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    decode.plan.put("break")
    *tokens, error, done = router.stream("/v1/completions", COMPLETION)
    assert text_of(tokens) == "d "
    assert decode.url in error["error"]["message"]
    assert done == "[DONE]"
    assert len(prefill.bodies) == 1, "tokens cannot be taken back"


def test_tokens_come_as_they_are_made(serve: Serve, start_router: StartRouter) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    decode.plan.put("pause")
    with router.ask("POST", "/v1/completions", COMPLETION | {"stream": True}) as response:
        first = response.read1(4096)
        assert b'"d "' in first
        assert decode.hanging.wait(WAIT_S)
        decode.released.set()
        assert response.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("known", [False, True])
def test_a_client_that_goes_away_ends_the_request_at_both(
    serve: Serve, start_router: StartRouter, known: bool
) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    if known:
        router.complete()
    decode.hanging.clear()
    prefill.plan.put("hang")
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=WAIT_S)
    connection.request("POST", "/v1/completions", json.dumps(COMPLETION).encode())
    assert prefill.hanging.wait(WAIT_S)
    if known:
        assert decode.hanging.wait(WAIT_S)
    connection.close()
    assert prefill.gone_away.wait(WAIT_S)
    if known:
        assert decode.gone_away.wait(WAIT_S)


def test_a_client_that_goes_away_ends_a_stream(serve: Serve, start_router: StartRouter) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    decode.plan.put("endless")
    with router.ask("POST", "/v1/completions", COMPLETION | {"stream": True}) as response:
        assert response.read1(4096)
    assert decode.gone_away.wait(WAIT_S)


def test_a_wrong_request_is_answered_by_who_found_it_wrong(
    serve: Serve, start_router: StartRouter
) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    prefill.plan.put("400")
    status, answer = router.post("/v1/completions", COMPLETION)
    assert (status, answer["error"]["message"]) == (400, "p says no")
    assert not decode.bodies
    for raw, word in ((b"{", "no JSON"), (b"[1]", "must be a JSON object, not list")):
        status, answer = router.post("/v1/completions", raw)
        assert status == 400
        assert word in answer["error"]["message"]


def test_a_server_without_the_connector_is_named(serve: Serve) -> None:
    """By the command itself, which ends when it is told to."""
    decode = serve("d", "decode")
    plain = serve("plain", "plain")  # it answers prefill's requests as any vLLM does
    router = RouterProcess("--prefill", plain.url, "--decode", decode.url)
    try:
        status, answer = router.post("/v1/completions", COMPLETION)
    finally:
        words = router.end()
    assert status == 502
    assert router.process.returncode == 0
    assert "WARNING kvferry.router: request" in words
    assert f"{plain.url}: its answer has no kv_transfer_params" in answer["error"]["message"]
    assert "--kv-transfer-config" in answer["error"]["message"]


@pytest.mark.parametrize(
    "change",
    [{"n": 2}, {"use_beam_search": True}, {"prompt": ["a", "b"]}, {"prompt_logprobs": 1}],
)
def test_what_cannot_be_split_is_computed_by_decode(
    serve: Serve, start_router: StartRouter, change: dict[str, Any]
) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    assert router.complete(**change) == "d computed all"
    assert not prefill.bodies


def test_it_is_ready_while_there_is_one_of_each(serve: Serve, start_router: StartRouter) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    until(lambda: router.get("/readyz") == (200, "ok\n"), "it is not ready")
    assert json.loads(router.get("/v1/models")[1])["data"] == [{"id": "tiny"}]
    prefill.close()
    status, answer = router.post("/v1/completions", COMPLETION)
    assert status == 502
    assert prefill.url in answer["error"]["message"]
    status, text = router.get("/health")
    assert status == 503
    assert text.splitlines()[0] == "no prefill server is up"
    assert text.splitlines()[1].startswith(f"prefill {prefill.url}: ")
    assert router.get("/healthz")[0] == 200
    status, answer = router.post("/v1/completions", COMPLETION)
    assert status == 503
    assert answer["error"]["message"] == "none of 1 prefill servers answers"
    serve("p", "prefill", prefill.port)
    until(lambda: router.get("/readyz")[0] == 200, "it is not found to be back")
    assert router.complete() == "d with KV of engine-of-p"


def until(condition: Callable[[], bool], why: str) -> None:
    """Waits for what another process does."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, why
        time.sleep(0.02)


# What clients may not say, and what they are told


@pytest.mark.parametrize("change", [{}, {"n": 2}])
def test_clients_do_not_say_where_kv_comes_from(
    serve: Serve, start_router: StartRouter, change: dict[str, Any]
) -> None:
    """However the request goes, and in whichever way vLLM would take it."""
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode)
    forged = {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_port": 1}
    router.complete(
        kv_transfer_params=forged,
        vllm_xargs={"kv_transfer_params": "x", "other": 1},
        **change,
    )
    for body in prefill.bodies + decode.bodies:
        assert body.get("kv_transfer_params", {}).get("remote_host") != "10.0.0.1"
        assert body["vllm_xargs"] == {"other": 1}
    raw = json.dumps(COMPLETION | {"n": 2}).encode()[:-1]
    twice = raw + b', "kv_transfer_params": {"a": 1}, "kv_transfer_params": {"b": 2}}'
    assert router.post("/v1/completions", twice)[0] == 200
    assert "kv_transfer_params" not in decode.bodies[-1]


def test_a_body_that_is_nested_too_deeply_is_refused(
    serve: Serve, start_router: StartRouter
) -> None:
    router = start_router(serve("p", "prefill"), serve("d", "decode"))
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    status, answer = router.post("/v1/completions", deep)
    assert status == 400
    assert answer["error"]["message"] == "the body is nested too deeply"
    assert router.complete() == "d with KV of engine-of-p"


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_those_that_prefill_had(
    serve: Serve, start_router: StartRouter, together: bool, stream: bool
) -> None:
    """What decode loaded is in no cache of its own, though it says so."""
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode, together=together)
    router.complete()
    prefill.cached_tokens, decode.cached_tokens = 16, 31
    if stream:
        usages = [
            each["usage"]
            for each in router.stream("/v1/completions", COMPLETION)
            if each != "[DONE]" and "usage" in each
        ]
    else:
        usages = [router.post("/v1/completions", COMPLETION)[1]["usage"]]
    assert usages == [{"prompt_tokens": 32, "prompt_tokens_details": {"cached_tokens": 16}}]
    whole = router.post("/v1/completions", COMPLETION | {"n": 2})[1]["usage"]
    assert whole["prompt_tokens_details"] == {"cached_tokens": 31}, "decode computed it all"


def test_what_decode_refuses_gives_prefills_blocks_back(
    serve: Serve, start_router: StartRouter
) -> None:
    """By a request for the same KV that prefill found right, of one token."""
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(prefill, decode, together=False)
    decode.plan.put("400")
    bad = COMPLETION | {"stream_options": "bad", "max_tokens": -1}
    status, answer = router.post("/v1/completions", bad)
    assert (status, answer["error"]["message"]) == (400, "d says no")
    until(lambda: len(decode.bodies) == 2, "nobody asks for the KV")
    assert decode.bodies[1]["kv_transfer_params"]["remote_request_id"] == "p-1"
    assert decode.bodies[1]["max_tokens"] == 1
    assert "stream_options" not in decode.bodies[1]


# Servers that are not well


def test_it_is_ready_when_servers_say_that_they_are(
    serve: Serve, start_router: StartRouter
) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    prefill.health = 503
    router = start_router(prefill, decode)
    until(lambda: "/health says 503" in router.get("/health")[1], "it does not ask")
    assert router.get("/health")[0] == 503
    prefill.health = 200
    until(lambda: router.get("/health")[0] == 200, "it does not ask again")
    decode.close()
    until(lambda: "no decode server is up" in router.get("/health")[1], "it does not notice")


def test_a_server_that_fails_is_left_alone(serve: Serve, start_router: StartRouter) -> None:
    """Though it says that it is well; and it is asked all the same when nobody else is left."""
    first, second, decode = serve("p1", "prefill"), serve("p2", "prefill"), serve("d", "decode")
    router = start_router(first, second, decode, together=False)
    for _ in range(3):
        first.plan.put("500")
    for _ in range(6):
        assert router.complete() == "d with KV of engine-of-p2"
    asked = len(first.bodies)
    assert asked == 3
    for _ in range(4):
        assert router.complete() == "d with KV of engine-of-p2"
    assert len(first.bodies) == asked
    second.close()
    assert router.complete() == "d with KV of engine-of-p1"


@pytest.mark.parametrize("known", [False, True])
def test_an_attempt_ends_when_its_server_falls_silent(
    serve: Serve, start_router: StartRouter, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setattr(health, "PROBE_S", 0.2)
    monkeypatch.setattr(health, "LOOK_S", 0.05)
    first, second, decode = serve("p1", "prefill"), serve("p2", "prefill"), serve("d", "decode")
    router = start_router(first, second, decode)
    if known:
        router.complete()
        router.complete()
    until(lambda: router.get("/health")[0] == 200, "it is not ready")
    first.plan.put("hang")
    first.health = None
    for _ in range(2):
        assert router.complete() == "d with KV of engine-of-p2"
    assert first.bodies
    first.health = 200


def test_decodes_failure_does_not_wait_for_a_prefill_that_hangs(
    serve: Serve, start_router: StartRouter
) -> None:
    """Its `/health` answers, as a front end's does whose engine stands still."""
    first, second, decode = serve("p1", "prefill"), serve("p2", "prefill"), serve("d", "decode")
    router = start_router(first, second, decode)
    router.complete()
    router.complete()
    first.plan.put("hang")
    decode.plan.put("500")
    assert router.complete() == "d with KV of engine-of-p2"
    assert first.gone_away.wait(WAIT_S), "the first attempt at prefill goes on"


@pytest.mark.parametrize("ids", [["a_dp0", "a_dp1"], ["a", "b"]])
def test_servers_of_several_engines_are_asked_first(
    serve: Serve, start_router: StartRouter, ids: list[str]
) -> None:
    """Whose name decode would need is known when prefill has answered. Where names do not tell it, the
    first that comes back does."""
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    prefill.engine_ids = ids
    router = start_router(prefill, decode)
    router.complete()
    if ids[0] == "a":

        def asked_first() -> bool:
            router.complete()
            return "transfer_id" not in decode.bodies[-1]["kv_transfer_params"]

        until(asked_first, "the engines behind the server are not told apart")
    known = len(decode.bodies) - 1
    for _ in range(5):
        router.complete()
    assert all("transfer_id" not in body["kv_transfer_params"] for body in decode.bodies[known:])


# With the daemon


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess()
    yield process
    process.end()


def enrol(daemon: DaemonProcess, server: ApiServer, model: str = "tiny") -> None:
    """Registers a server, as its connector does; for as long as a test takes."""
    there = Registration(
        f"{server.engine_id}/0",
        server.role,  # type: ignore[arg-type]
        1,
        "tcp://127.0.0.1:9",
        model=model,
        service=server.url,
    )
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(daemon.address)
        socket.send(requests.encode(Register(1, 1, there, 3000.0)))
        assert socket.poll(int(WAIT_S * 1000))
        answers.decode(socket.recv())


def test_the_daemon_places_and_is_not_needed_for_long(
    serve: Serve, daemon: DaemonProcess, start_router: StartRouter
) -> None:
    prefill, decode = serve("p", "prefill"), serve("d", "decode")
    router = start_router(daemon=daemon.address)
    status, answer = router.post("/v1/completions", COMPLETION)
    assert status == 503
    assert "no prefill agent of model 'tiny' is serving" in answer["error"]["message"]
    for server in (prefill, decode):
        enrol(daemon, server)
    assert router.complete() == "d with KV of engine-of-p"
    status, answer = router.post("/v1/completions", COMPLETION | {"model": "another"})
    assert status == 503
    assert "'another'" in answer["error"]["message"]
    until(lambda: router.get("/readyz")[0] == 200, "the router does not see them")
    assert router.complete(model=None) == "d with KV of engine-of-p", "there is only one model"
    daemon.kill()
    assert router.complete() == "d with KV of engine-of-p"


def test_a_prefill_server_that_the_daemon_still_counts_on_is_passed_over(
    serve: Serve, daemon: DaemonProcess, start_router: StartRouter
) -> None:
    first, second, decode = serve("p1", "prefill"), serve("p2", "prefill"), serve("d", "decode")
    for server in (first, second, decode):
        enrol(daemon, server)
    router = start_router(daemon=daemon.address)
    first.close()
    for _ in range(4):
        assert router.complete() == "d with KV of engine-of-p2"


def test_adapters_and_aliases_are_found_by_what_servers_say(
    serve: Serve, daemon: DaemonProcess, start_router: StartRouter
) -> None:
    prefill, decode, plain = serve("p", "prefill"), serve("d", "decode"), serve("d2", "decode")
    prefill.models = decode.models = ["tiny", "tiny-lora"]
    for server in (prefill, decode, plain):
        enrol(daemon, server)
    router = start_router(daemon=daemon.address)
    until(lambda: router.post("/v1/completions", COMPLETION | {"model": "tiny-lora"})[0] == 200, "")
    for _ in range(4):
        assert router.complete(model="tiny-lora") == "d with KV of engine-of-p"
    status, answer = router.post("/v1/completions", COMPLETION | {"model": "other-lora"})
    assert status == 503
    assert "other-lora" in answer["error"]["message"]


def test_the_daemon_is_not_asked_while_it_is_away(
    daemon: DaemonProcess, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for server in (serve("p", "prefill"), serve("d", "decode")):
        enrol(daemon, server)
    backends = DaemonBackends(daemon.address)
    try:
        daemon.kill()
        first = backends.place("tiny", 1, [], ())
        asked: list[object] = []
        monkeypatch.setattr(backends._client, "place", lambda *given, **_: asked.append(given))
        for _ in range(20):
            assert backends.place("tiny", 1, [], ()) == first
        assert not asked
    finally:
        backends.close()


def test_servers_that_have_left_take_no_room_among_those_to_avoid(
    daemon: DaemonProcess, serve: Serve
) -> None:
    first, second, decode = serve("p1", "prefill"), serve("p2", "prefill"), serve("d", "decode")
    for server in (first, second, decode):
        enrol(daemon, server)
    backends = DaemonBackends(daemon.address)
    try:
        left = [f"left-{number}" for number in range(400)]
        for _ in range(4):
            placed = backends.place("tiny", 1, [*left, f"{first.engine_id}/0"], ())
            assert placed.prefill.name == f"{second.engine_id}/0"
    finally:
        backends.close()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--prefill", "http://127.0.0.1:1"), "give both --prefill and --decode"),
        (("--prefill", "here:1", "--decode", "http://b:1"), "'here:1' is no URL"),
        (("--daemon", "tcp://127.0.0.1:1"), "did not answer"),
        (("--daemon", "nowhere"), "nowhere"),
    ],
)
def test_a_wrong_setting_is_named(arguments: tuple[str, ...], word: str) -> None:
    result = CliRunner().invoke(app, ["router", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert word in " ".join(result.output.replace("│", " ").split())


# What it understands of the API


def test_prompts_are_about_so_long() -> None:
    assert bodies.estimate_tokens({"prompt": "abcd" * 10}) == 10
    assert bodies.estimate_tokens({"prompt": [5, 6, 7]}) == 3
    assert bodies.estimate_tokens({"prompt": [[5, 6], [7]]}) == 3
    assert bodies.estimate_tokens(CHAT) >= 1


def test_events_are_whole_whatever_parts_they_come_in() -> None:
    stream = b'data: {"a": 1}\n\ndata: [DONE]\r\n\r\n'
    for cut in range(len(stream)):
        events, rest = bodies.split_events(stream[:cut])
        more, rest = bodies.split_events(rest + stream[cut:])
        assert (events + more, rest) == ([b'data: {"a": 1}\n\n', b"data: [DONE]\n\n"], b"")

"""The router's HTTP server: the OpenAI API in front, pairs of vLLM servers behind."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kvferry.control.errors import ControlError

from . import bodies
from .health import Health
from .metrics import RouterMetrics
from .relay import AWAY, LARGE_NBYTES, Refused, Relay, ServerFailed

if TYPE_CHECKING:
    from .backends import Backend, Backends, Pair
    from .bodies import Ask, Body
    from .relay import Answer

CONNECT_S = 5.0
MAX_BODY_NBYTES = 64 << 20
PASSED_ON = ("Authorization", "Traceparent", "Tracestate", "X-Data-Parallel-Rank")

log = logging.getLogger("kvferry.router")


class Router:
    """An application of aiohttp: `router.app`.

    Args:
        backends: closed with the application.
        attempts: how many pairs a request may be tried on.
        timeout_s: how long a server may be silent.
        together: see `Relay`.
    """

    def __init__(
        self, backends: Backends, *, attempts: int, timeout_s: float, together: bool
    ) -> None:
        self._backends = backends
        self._attempts = attempts
        self._timeout_s = timeout_s
        self._together = together
        self._metrics = RouterMetrics(self._num_up)
        # The daemon's client blocks, and is for one thread.
        self._placing = ThreadPoolExecutor(1, "kvferry-router-place")
        self.app = web.Application(client_max_size=MAX_BODY_NBYTES)
        self.app.add_routes(
            [
                web.post("/v1/completions", self._generate),
                web.post("/v1/chat/completions", self._generate),
                web.get("/v1/models", self._models),
                web.get("/health", self._ready),
                web.get("/healthz", self._alive),
                web.get("/readyz", self._ready),
                web.get("/metrics", self._figures),
            ]
        )
        self.app.on_startup.append(self._start)
        self.app.on_cleanup.append(self._stop)

    async def _start(self, _: web.Application) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_S, sock_read=self._timeout_s
            ),
        )
        self._health = Health(self._session, self._known, self._forget)
        self._relay = Relay(self._session, self._metrics, self._health, together=self._together)

    def _forget(self, backend: Backend) -> None:
        self._relay.forget(backend)

    async def _stop(self, _: web.Application) -> None:
        await self._relay.close()
        await self._health.close()
        await self._session.close()
        await asyncio.get_running_loop().run_in_executor(self._placing, self._backends.close)
        self._placing.shutdown()

    # Requests

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        started_s = time.monotonic()
        status = 499
        self._metrics.in_flight.inc()
        try:
            response = await self._answer(request, started_s)
            status = response.status
            return response
        finally:
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(str(status)).inc()

    async def _answer(self, request: web.Request, started_s: float) -> web.StreamResponse:
        name = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        headers = _passed_on(request) | {"X-Request-Id": name}
        try:
            raw = await request.read()
            large = len(raw) >= LARGE_NBYTES
            body = (
                await asyncio.to_thread(bodies.read_body, raw) if large else bodies.read_body(raw)
            )
        except (bodies.BadRequest, web.RequestPayloadError) as error:
            return _error(str(error), "invalid_request_error", 400)
        try:
            answer = await self._try_pairs(bodies.Ask(request.path, body, headers, len(raw)))
        except Refused as refused:
            return web.Response(status=refused.status, body=refused.body, content_type=refused.kind)
        except ControlError as error:
            return _error(error.message, "service_unavailable", 503)
        except ServerFailed as error:
            return _error(f"{error} ({self._attempts} attempts)", "server_error", 502)
        self._metrics.first_byte.observe(time.monotonic() - started_s)
        response = web.StreamResponse(
            status=answer.status, headers={"Content-Type": answer.kind, "X-Request-Id": name}
        )
        try:
            await response.prepare(request)
            async for chunk in answer.chunks:
                await response.write(chunk)
            await response.write_eof()
        finally:
            answer.close()
        return response

    async def _try_pairs(self, ask: Ask) -> Answer:
        """Decode's answer, by whichever pair.

        Raises:
            ServerFailed: of the last attempt. ControlError: there is no pair. Refused.
        """
        failed: ServerFailed | None = None
        tried: tuple[set[str], set[str]] = set(), set()
        for _ in range(self._attempts):
            try:
                pair = await self._place(ask.body, tried)
            except ControlError as error:
                if failed is not None:
                    raise failed from error
                raise
            try:
                return await self._relay.begin(pair, ask)
            except ServerFailed as error:
                failed = error
                tried[0].add(pair.prefill.name)
                if error.role == "decode":  # or its prefill, whose KV it could not load
                    tried[1].add(pair.decode.name)
                log.warning("request %s: %s", ask.headers["X-Request-Id"], error)
        assert failed is not None
        raise failed

    async def _place(self, body: Body, tried: tuple[set[str], set[str]]) -> Pair:
        """Return a pair of servers that were not tried and failed no request lately, or of as few
        that were or did as can be.

        Raises:
            ControlError: nobody is there.
        """
        prefills, decodes = tried
        tokens, model = bodies.estimate_tokens(body), str(body.get("model") or "")
        loop = asyncio.get_running_loop()
        resting = {*self._health.resting()}
        choices = [prefills | decodes | resting, prefills | decodes, prefills, decodes, set()]
        serving = self._health.serving(model) if model else set()
        for number, avoided in enumerate(choices):
            if avoided in choices[:number]:
                continue
            exclude = [*avoided, *self._health.down()]
            try:
                return await loop.run_in_executor(
                    self._placing, self._backends.place, model, tokens, exclude, serving
                )
            except ControlError as error:
                nobody = error
        raise nobody

    def _known(self) -> set[Backend]:
        return {each for backends in self._backends.known().values() for each in backends}

    def _num_up(self, role: str) -> int:
        return sum(not self._health.why_down(each) for each in self._backends.known()[role])

    # Pages

    async def _models(self, request: web.Request) -> web.Response:
        """As the first decode server that answers says."""
        headers = _passed_on(request)
        for backend in self._backends.known()["decode"]:
            if backend.name in self._health.down():
                continue
            try:
                async with self._session.get(f"{backend.url}/v1/models", headers=headers) as answer:
                    raw = await answer.read()
                    return web.Response(
                        status=answer.status, body=raw, content_type=answer.content_type
                    )
            except AWAY:
                self._health.failed(backend, gone=True)
        return _error("no decode server answers", "service_unavailable", 503)

    async def _alive(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        missing = [role for role in ("prefill", "decode") if not self._num_up(role)]
        if not missing:
            return web.Response(text="ok\n")
        lines = [f"no {' and no '.join(missing)} server is up"]
        for role in missing:
            for each in self._backends.known()[role]:
                lines.append(f"{role} {each.url}: {self._health.why_down(each)}")
        return web.Response(status=503, text="\n".join(lines) + "\n")

    async def _figures(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._metrics.registry),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )


def _passed_on(request: web.Request) -> dict[str, str]:
    return {key: request.headers[key] for key in PASSED_ON if key in request.headers}


def _error(message: str, kind: str, status: int) -> web.Response:
    return web.Response(
        status=status,
        body=bodies.error_body(message, kind, status),
        content_type="application/json",
    )

"""One request on its way through two servers, and again through others when one of them fails.

A client hears of a failure only when nobody is left to try, or when it has tokens already: those
cannot be taken back, so the stream then ends with an error event.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp

from . import bodies

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from .backends import Backend, Pair
    from .bodies import Ask, Body
    from .metrics import RouterMetrics

MAX_HELD_NBYTES = 64 << 10  # of a stream that has opened but has no token yet
SERVER_FAULTS = 500  # statuses from here on may be different at another server

# What a server that is not there, or falls silent, is known by.
AWAY = (aiohttp.ClientError, asyncio.TimeoutError)

log = logging.getLogger("kvferry.router")


class ServerFailed(Exception):
    """A server did not do its part; another may.

    Attributes:
        role, backend: which.
        gone: whether it did not answer at all.
    """

    def __init__(self, role: str, backend: Backend, why: str, *, gone: bool = False) -> None:
        super().__init__(f"{role} server {backend.url}: {why}")
        self.role = role
        self.backend = backend
        self.gone = gone


class Refused(Exception):
    """A server says that the request itself is wrong: its answer is the client's."""

    def __init__(self, status: int, kind: str, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.kind = kind
        self.body = body


class Answer(NamedTuple):
    """Decode's answer.

    Close it, which may be done again: a stream that is left open goes on at decode, and a generator
    that is left alone ends when the garbage collector finds it.

    Attributes:
        status, kind: as decode gave them.
        chunks: begins with the first token, or is the whole body.
        close: ends the request at decode, if it has not ended.
    """

    status: int
    kind: str
    chunks: AsyncIterator[bytes]
    close: Callable[[], None]


class Relay:
    """Sends requests to pairs of servers. For one event loop.

    Args:
        session: without a base URL; every request takes a new connection, so that none is lost to a
            server that closes an idle one just then.
        together: call both servers at once as soon as prefill's address is known.
    """

    def __init__(
        self, session: aiohttp.ClientSession, metrics: RouterMetrics, *, together: bool
    ) -> None:
        self._session = session
        self._metrics = metrics
        self._together = together
        self._addresses: dict[str, Body] = {}

    def forget(self, backend: Backend) -> None:
        """A server went away; whoever comes in its place has another address."""
        self._addresses.pop(backend.name, None)

    async def begin(self, pair: Pair, ask: Ask) -> Answer:
        """Return one attempt, up to decode's first token.

        Raises:
            ServerFailed: try another. Refused: nobody would do better.
        """
        why = bodies.one_engine_only(ask.body)
        if why:
            log.info("decode computes the prompt of a request: %s", why)
            self._metrics.ways.labels("decode alone").inc()
            return await self._decode(pair.decode, ask)
        address = self._addresses.get(pair.prefill.name) if self._together else None
        if address:
            self._metrics.ways.labels("both at once").inc()
            return await self._both(pair, ask, address)
        self._metrics.ways.labels("prefill first").inc()
        params = await self._prefill(pair.prefill, ask.with_params(bodies.TO_PREFILL))
        return await self._decode(pair.decode, ask.with_params(params))

    async def _both(self, pair: Pair, ask: Ask, address: Body) -> Answer:
        """Decode has its blocks while prefill computes, which streams each layer into them."""
        name = {"transfer_id": f"router-{uuid.uuid4().hex}"}
        to_prefill = ask.with_params(bodies.TO_PREFILL | name)
        to_decode = ask.with_params(bodies.TO_DECODE | address | name)
        prefill = asyncio.ensure_future(self._prefill(pair.prefill, to_prefill))
        decode = asyncio.ensure_future(self._decode(pair.decode, to_decode))
        taken = False
        try:
            await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
            if prefill.done():
                await prefill  # decode waits for nothing any more if this failed
            try:
                answer = await decode
            except ServerFailed as error:
                if not error.gone:  # what it lacks may be what prefill did not send
                    await prefill
                raise
            taken = True
            return answer
        finally:
            for task in (prefill, decode):
                if not task.done():
                    task.cancel()
            _, found = await asyncio.gather(prefill, decode, return_exceptions=True)
            if isinstance(found, Answer) and not taken:
                found.close()

    async def _prefill(self, backend: Backend, ask: Ask) -> Body:
        """Return what prefill says of where the KV is."""
        started_s = time.monotonic()
        short = bodies.for_prefill(ask.body)
        try:
            async with self._post(backend, ask._replace(body=short)) as answer:
                raw = await answer.read()
                self._check("prefill", backend, answer, raw)
        except AWAY as error:
            raise self._gone("prefill", backend, error) from error
        self._metrics.prefill.observe(time.monotonic() - started_s)
        try:
            found = json.loads(raw).get("kv_transfer_params")
        except (ValueError, AttributeError):
            found = None
        if not isinstance(found, dict):
            why = "its answer has no kv_transfer_params: start it with --kv-transfer-config"
            raise ServerFailed("prefill", backend, why)
        self._addresses[backend.name] = bodies.address_in(found)
        return found

    async def _decode(self, backend: Backend, ask: Ask) -> Answer:
        """Decode's answer, once it has a token."""
        try:
            answer = await self._post(backend, ask)
        except AWAY as error:
            raise self._gone("decode", backend, error) from error
        try:
            if not ask.body.get("stream") or answer.status != 200:
                raw = await answer.read()
                self._check("decode", backend, answer, raw)
                return Answer(answer.status, answer.content_type, _once(raw), answer.close)
            first, rest = await self._first_token(backend, answer)
        except AWAY as error:
            answer.close()
            raise self._gone("decode", backend, error) from error
        except BaseException:
            answer.close()
            raise
        events = self._events(backend, answer, first, rest)
        return Answer(answer.status, answer.content_type, events, answer.close)

    def _post(self, backend: Backend, ask: Ask) -> Any:
        return self._session.post(backend.url + ask.path, json=ask.body, headers=ask.headers)

    async def _first_token(
        self, backend: Backend, answer: aiohttp.ClientResponse
    ) -> tuple[list[bytes], bytes]:
        """Return the events up to the first that is no mere opening, and what has come of the
        next."""
        held: list[bytes] = []
        rest = b""
        while sum(map(len, held)) + len(rest) < MAX_HELD_NBYTES:
            part = await answer.content.readany()
            if not part:
                raise self._gone("decode", backend, ConnectionError("the stream ended at once"))
            events, rest = bodies.split_events(rest + part)
            held += events
            for each in events:
                why = bodies.error_in(each)
                if why:
                    raise self._failed("decode", backend, why)
            if any(not bodies.opens_only(each) for each in events):
                break
        return held, rest

    async def _events(
        self, backend: Backend, answer: aiohttp.ClientResponse, first: list[bytes], rest: bytes
    ) -> AsyncIterator[bytes]:
        """Return the stream as it comes; an error event if it breaks."""
        ended = False
        try:
            yield b"".join(first)
            ended = bodies.DONE in first
            while part := await answer.content.readany():
                events, rest = bodies.split_events(rest + part)
                ended = ended or bodies.DONE in events
                if events:
                    yield b"".join(events)
            error: Exception = ConnectionError("the stream ended before its end")
        except AWAY as broken:
            error = broken
        if not ended:
            failed = self._gone("decode", backend, error)
            log.warning("a stream broke: %s", failed)
            yield bodies.event(bodies.error_body(str(failed), "server_error", 502))
            yield bodies.DONE

    def _check(
        self, role: str, backend: Backend, answer: aiohttp.ClientResponse, raw: bytes
    ) -> None:
        if answer.status >= SERVER_FAULTS:
            text = bodies.error_in(b"data: " + raw) or raw[:200].decode(errors="replace")
            raise self._failed(role, backend, f"HTTP {answer.status}: {text}")
        if answer.status != 200:
            raise Refused(answer.status, answer.content_type, raw)

    def _gone(self, role: str, backend: Backend, error: Exception) -> ServerFailed:
        self.forget(backend)
        self._metrics.failures.labels(role, backend.name).inc()
        return ServerFailed(role, backend, str(error) or type(error).__name__, gone=True)

    def _failed(self, role: str, backend: Backend, why: str) -> ServerFailed:
        self._metrics.failures.labels(role, backend.name).inc()
        return ServerFailed(role, backend, why)


async def _once(raw: bytes) -> AsyncIterator[bytes]:
    yield raw

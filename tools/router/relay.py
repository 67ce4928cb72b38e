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
from .health import ServerDown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from .backends import Backend, Pair
    from .bodies import Ask, Body
    from .health import Health
    from .metrics import RouterMetrics

MAX_HELD_NBYTES = 64 << 10  # of a stream that has opened but has no token yet
SERVER_FAULTS = 500  # statuses from here on may be different at another server

LARGE_NBYTES = 1 << 20  # of a body that is written by another thread than the event loop's
LAST_WORD_S = 1.0  # for what prefill has to say when decode is done, or has failed

# What a server that is not there, or falls silent, is known by.
AWAY = (aiohttp.ClientError, asyncio.TimeoutError, ServerDown)

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


class Prefilled(NamedTuple):
    """What prefill answered.

    Attributes:
        params: where the KV is.
        cached_tokens: how many of the prompt's it had; None if it does not say.
    """

    params: Body
    cached_tokens: int | None


class Relay:
    """Sends requests to pairs of servers. For one event loop.

    Args:
        session: without a base URL; every request takes a new connection, so that none is lost to a
            server that closes an idle one just then.
        health: is told of what fails, and ends attempts at servers that go down.
        together: call both servers at once as soon as prefill's address is known.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        metrics: RouterMetrics,
        health: Health,
        *,
        together: bool,
    ) -> None:
        self._session = session
        self._metrics = metrics
        self._health = health
        self._together = together
        self._addresses: dict[str, Body] = {}
        self._former: dict[str, set[str]] = {}  # engines that a server had before, by its name
        self._beside: set[asyncio.Task[Any]] = set()

    def forget(self, backend: Backend) -> None:
        """A server went away; whoever comes in its place has another address."""
        self._addresses.pop(backend.name, None)
        self._former.pop(backend.name, None)

    async def close(self) -> None:
        """End what it does beside requests."""
        for task in self._beside:
            task.cancel()
        await asyncio.gather(*self._beside, return_exceptions=True)

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
        found = await self._prefill(pair.prefill, ask.with_params(bodies.TO_PREFILL))

        async def cached_tokens() -> int | None:
            return found.cached_tokens

        try:
            return await self._decode(pair.decode, ask.with_params(found.params), cached_tokens)
        except Refused:
            # Decode's scheduler never heard of it: prefill would keep the blocks for a lease.
            self._release(pair.decode, ask.with_params(found.params))
            raise

    async def _both(self, pair: Pair, ask: Ask, address: Body) -> Answer:
        """Decode has its blocks while prefill computes, which streams each layer into them."""
        name = {"transfer_id": f"router-{uuid.uuid4().hex}"}
        to_prefill = ask.with_params(bodies.TO_PREFILL | name)
        to_decode = ask.with_params(bodies.TO_DECODE | address | name)
        prefill = asyncio.ensure_future(self._prefill(pair.prefill, to_prefill))

        async def cached_tokens() -> int | None:
            await asyncio.wait({prefill}, timeout=LAST_WORD_S)
            well = prefill.done() and not prefill.cancelled() and prefill.exception() is None
            return prefill.result().cached_tokens if well else None

        decode = asyncio.ensure_future(self._decode(pair.decode, to_decode, cached_tokens))
        taken = False
        try:
            await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
            if prefill.done():
                await prefill  # decode waits for nothing any more if this failed
            try:
                answer = await decode
            except ServerFailed as error:
                if not error.gone:  # what it lacks may be what prefill did not send
                    await asyncio.wait({prefill}, timeout=LAST_WORD_S)
                    if prefill.done():
                        await prefill
                raise
            taken = True

            def close() -> None:
                answer.close()
                # What prefill still has to say is where the next request finds it.
                asyncio.get_running_loop().call_later(LAST_WORD_S, prefill.cancel)

            self._keep(prefill)
            return answer._replace(close=close)
        finally:
            if not taken:
                for task in (prefill, decode):
                    task.cancel()
                _, found = await asyncio.gather(prefill, decode, return_exceptions=True)
                if isinstance(found, Answer):
                    found.close()

    async def _prefill(self, backend: Backend, ask: Ask) -> Prefilled:
        started_s = time.monotonic()
        try:
            raw = await self._health.unless_down(backend, self._prefill_body(backend, ask))
        except AWAY as error:
            raise self._gone("prefill", backend, error) from error
        self._metrics.prefill.observe(time.monotonic() - started_s)
        try:
            found = json.loads(raw).get("kv_transfer_params")
        except (ValueError, AttributeError):
            found = None
        if not isinstance(found, dict):
            why = "its answer has no kv_transfer_params: start it with --kv-transfer-config"
            raise self._failed("prefill", backend, why)
        self._health.succeeded(backend)
        self._remember(backend, found)
        return Prefilled(found, bodies.cached_tokens(raw))

    async def _prefill_body(self, backend: Backend, ask: Ask) -> bytes:
        short = ask._replace(body=bodies.for_prefill(ask.body))
        async with await self._post(backend, short) as answer:
            raw: bytes = await answer.read()
            self._check("prefill", backend, answer, raw)
            return raw

    def _remember(self, backend: Backend, params: Body) -> None:
        """Keep the address of a server's engine, unless there are several behind it by turns."""
        address = bodies.address_in(params)
        latest = str(self._addresses.get(backend.name, {}).get("remote_engine_id", ""))
        engine_id = str(params.get("remote_engine_id"))
        former = self._former.setdefault(backend.name, set())
        if latest and latest != engine_id:
            former.add(latest)
        if engine_id in former:  # a restart brings none of them back
            address = {}
        self._addresses[backend.name] = address

    def _release(self, decode: Backend, ask: Ask) -> None:
        """Have decode load what prefill holds, by the request that prefill found right, and drop it."""

        async def load() -> None:
            answer = await self._decode(decode, ask._replace(body=bodies.for_prefill(ask.body)))
            answer.close()

        self._keep(asyncio.ensure_future(load()))

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """Keep a task that goes on beside its request."""
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        task.add_done_callback(_look_at)

    async def _decode(
        self,
        backend: Backend,
        ask: Ask,
        cached_tokens: Callable[[], Awaitable[int | None]] | None = None,
    ) -> Answer:
        """Decode's answer, once it has a token.

        Args:
            cached_tokens: what its answer is to say of that; its own if None.
        """
        try:
            answer, begun = await self._health.unless_down(backend, self._begun(backend, ask))
        except AWAY as error:
            raise self._gone("decode", backend, error) from error
        self._health.succeeded(backend)
        if isinstance(begun, bytes):
            if cached_tokens is not None and b'"cached_tokens"' in begun:
                begun = bodies.with_cached_tokens(begun, await cached_tokens())
            return Answer(answer.status, answer.content_type, _once(begun), answer.close)
        first, rest = begun
        events = self._events(backend, answer, first, rest, cached_tokens)
        forget = self._health.close_if_down(backend, answer)

        def close() -> None:
            forget()
            answer.close()

        return Answer(answer.status, answer.content_type, events, close)

    async def _begun(
        self, backend: Backend, ask: Ask
    ) -> tuple[aiohttp.ClientResponse, bytes | tuple[list[bytes], bytes]]:
        """Return decode's answer, and its whole body or the beginning of its stream."""
        answer = await self._post(backend, ask)
        try:
            if not ask.body.get("stream") or answer.status != 200:
                raw = await answer.read()
                self._check("decode", backend, answer, raw)
                return answer, raw
            return answer, await self._first_token(backend, answer)
        except BaseException:
            answer.close()
            raise

    async def _post(self, backend: Backend, ask: Ask) -> Any:
        """Send a request; what it returns is closed by whoever asked."""
        large = ask.nbytes >= LARGE_NBYTES
        raw = await asyncio.to_thread(bodies.encode, ask.body) if large else bodies.encode(ask.body)
        headers = ask.headers | {"Content-Type": "application/json"}
        return await self._session.post(backend.url + ask.path, data=raw, headers=headers)

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
        self,
        backend: Backend,
        answer: aiohttp.ClientResponse,
        first: list[bytes],
        rest: bytes,
        cached_tokens: Callable[[], Awaitable[int | None]] | None,
    ) -> AsyncIterator[bytes]:
        """Return the stream as it comes; an error event if it breaks."""

        async def joined(events: list[bytes]) -> bytes:
            data = b"".join(events)
            if cached_tokens is None or b'"cached_tokens"' not in data:
                return data
            count = await cached_tokens()
            return b"".join(bodies.with_cached_tokens(each, count) for each in events)

        ended = False
        try:
            yield await joined(first)
            ended = bodies.DONE in first
            while part := await answer.content.readany():
                events, rest = bodies.split_events(rest + part)
                ended = ended or bodies.DONE in events
                if events:
                    yield await joined(events)
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
        silent = isinstance(error, aiohttp.SocketTimeoutError)
        self._health.failed(backend, gone=not silent, silent=silent)
        self._metrics.failures.labels(role, backend.name).inc()
        return ServerFailed(role, backend, str(error) or type(error).__name__, gone=True)

    def _failed(self, role: str, backend: Backend, why: str) -> ServerFailed:
        self._health.failed(backend)
        self._metrics.failures.labels(role, backend.name).inc()
        return ServerFailed(role, backend, why)


async def _once(raw: bytes) -> AsyncIterator[bytes]:
    yield raw


def _look_at(task: asyncio.Task[Any]) -> None:
    """Take what a task failed with, of which nobody else hears."""
    if not task.cancelled() and task.exception() is not None:
        log.info("beside a request: %s", task.exception())

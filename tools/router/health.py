"""Which servers answer: asked of all of them in the background, and learnt from requests that fail."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from typing import Any

    from .backends import Backend

LOOK_S = 1.0  # between looks at a server
PROBE_S = 5.0  # for its answer
SILENCES = 2  # probes without an answer after which a server is down: one may be lost under load
FAILURES = 3  # failed requests in a row after which a server is left alone for a while
REST_S = 5.0  # the first time; twice as long each time after that
LONGEST_REST_S = 60.0

log = logging.getLogger("kvferry.router")


class ServerDown(Exception):
    """A server stopped answering while it was being waited for; says how."""


class _State:
    """What is known of one server.

    Attributes:
        why: why it is down; "" if it is up, None if nobody has asked it yet.
        silences: probes in a row that it has not answered.
        failures: requests in a row that it has failed.
        rests_until_s: until when it is left alone for that.
        down: set while it is down.
        waiting: attempts that end if it goes down: it is looked at until they are over.
        models: what it serves, adapters and aliases included, as it says itself.
    """

    def __init__(self) -> None:
        self.why: str | None = None
        self.silences = 0
        self.failures = 0
        self.rests_until_s = 0.0
        self.down = asyncio.Event()
        self.waiting = 0
        self.models: frozenset[str] = frozenset()


class Health:
    """The state of all servers. For one event loop.

    Args:
        session: without a base URL.
        known: the servers that there are, of all roles.
        went_away: called with a server that has gone down.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        known: Callable[[], Iterable[Backend]],
        went_away: Callable[[Backend], None],
    ) -> None:
        self._session = session
        self._known = known
        self._went_away = went_away
        self._states: dict[Backend, _State] = {}
        self._looks: dict[Backend, asyncio.Task[None]] = {}
        self._watching = asyncio.ensure_future(self._watch())

    async def close(self) -> None:
        tasks = [self._watching, *self._looks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def why_down(self, backend: Backend) -> str:
        """Return why a server does not count as up; "" if it does."""
        why = self._state(backend).why
        return "not asked yet" if why is None else why

    def down(self) -> list[str]:
        """Return the names of servers that do not answer. Who was not asked yet is tried."""
        return [backend.name for backend, state in self._states.items() if state.why]

    def resting(self) -> list[str]:
        """Return the names of servers that answer, but failed the last requests."""
        now_s = time.monotonic()
        return [
            backend.name for backend, state in self._states.items() if state.rests_until_s > now_s
        ]

    def serving(self, model: str) -> set[str]:
        """Return the names of servers that say they serve a model, an adapter or an alias."""
        return {backend.name for backend, state in self._states.items() if model in state.models}

    def succeeded(self, backend: Backend) -> None:
        """A request got from a server what it wanted."""
        self._state(backend).failures = 0

    def failed(self, backend: Backend, *, gone: bool = False, silent: bool = False) -> None:
        """A request failed at a server.

        Args:
            gone: nobody answered, so it is down until it is found to be back.
            silent: it answered nothing for as long as it may be silent, which is enough to rest it.
        """
        state = self._state(backend)
        if gone:
            self._set(backend, state, "it does not answer")
            return
        state.failures += FAILURES if silent else 1
        if state.failures >= FAILURES:
            rests = state.failures // FAILURES
            rest_s = min(LONGEST_REST_S, REST_S * 2.0 ** min(rests - 1, 10))
            state.rests_until_s = time.monotonic() + rest_s

    async def unless_down(self, backend: Backend, work: Coroutine[Any, Any, Any]) -> Any:
        """Return what `work` does, unless the server goes down meanwhile.

        Raises:
            ServerDown: it did; `work` is cancelled.
        """
        state = self._state(backend)
        task, down = asyncio.ensure_future(work), asyncio.ensure_future(state.down.wait())
        state.waiting += 1
        try:
            await asyncio.wait({task, down}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ServerDown(state.why or "it went down")
            return await task
        finally:
            state.waiting -= 1
            for each in (task, down):
                each.cancel()
            await asyncio.gather(task, down, return_exceptions=True)

    def close_if_down(
        self, backend: Backend, answer: aiohttp.ClientResponse
    ) -> Callable[[], object]:
        """Have an answer that is being read end if its server goes down; return what takes that
        back."""

        async def close() -> None:
            await self._state(backend).down.wait()
            answer.close()

        return asyncio.ensure_future(close()).cancel

    def _state(self, backend: Backend) -> _State:
        return self._states.setdefault(backend, _State())

    async def _watch(self) -> None:
        """Have every server looked at that there is, and forget those that there are no more."""
        while True:
            known = {*self._known()} | {
                each for each, state in self._states.items() if state.waiting
            }
            for gone in self._states.keys() - known:
                del self._states[gone]
            for gone in self._looks.keys() - known:
                self._looks.pop(gone).cancel()
            for new in known - self._looks.keys():
                self._looks[new] = asyncio.ensure_future(self._look_at(new))
            await asyncio.sleep(LOOK_S)

    async def _look_at(self, backend: Backend) -> None:
        while True:
            why, silent = await self._ask(backend)
            state = self._state(backend)
            state.silences = state.silences + 1 if silent else 0
            if not silent or state.silences >= SILENCES or state.why is None:
                self._set(backend, state, why)
            if not why and not state.models:
                state.models = await self._ask_models(backend)
            await asyncio.sleep(LOOK_S)

    async def _ask(self, backend: Backend) -> tuple[str, bool]:
        """Return why a server is not well, or "", and whether it said nothing in time."""
        timeout = aiohttp.ClientTimeout(total=PROBE_S)
        try:
            async with self._session.get(f"{backend.url}/health", timeout=timeout) as answer:
                return ("" if answer.status == 200 else f"/health says {answer.status}"), False
        except asyncio.TimeoutError:
            return f"/health did not answer in {PROBE_S:g} s", True
        except (aiohttp.ClientError, OSError) as error:
            return str(error) or type(error).__name__, False

    async def _ask_models(self, backend: Backend) -> frozenset[str]:
        timeout = aiohttp.ClientTimeout(total=PROBE_S)
        try:
            async with self._session.get(f"{backend.url}/v1/models", timeout=timeout) as answer:
                found = await answer.json(content_type=None)
            return frozenset(str(each["id"]) for each in found["data"])
        except (
            aiohttp.ClientError,
            OSError,
            asyncio.TimeoutError,
            ValueError,
            TypeError,
            KeyError,
        ):
            return frozenset()  # it needs a key, or is no vLLM: then names are the daemon's alone

    def _set(self, backend: Backend, state: _State, why: str) -> None:
        if why and not state.why:
            state.down.set()
            state.models = frozenset()
            log.warning("%s is down: %s", backend.url, why)
            self._went_away(backend)
        elif not why and state.why:
            log.info("%s answers again", backend.url)
        if not why:
            state.down.clear()
        state.why = why

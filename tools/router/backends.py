"""The vLLM servers behind the router: who they are, which are down, and which two take a request.

They come from the command line, or from the daemon, where a server's connector says its address.
"""

from __future__ import annotations

import itertools
import logging
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.errors import DaemonError, DaemonTimeout, PlacementError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kvferry.control.cluster.messages import Member, Snapshot
    from kvferry.control.keys import Keys

DAEMON_S = 0.5  # for an answer of the daemon, which takes 1 ms; then the last picture is used
MAX_EXCLUDED = 256  # as many as a `Place` may have
LOOK_S = 1.0  # how old the picture of the cluster may become

log = logging.getLogger("kvferry.router")


class Backend(NamedTuple):
    """A vLLM server: its name, and where it serves HTTP, as `http://host:port`."""

    name: str
    url: str


class Pair(NamedTuple):
    """The two servers that take a request."""

    prefill: Backend
    decode: Backend


class Backends(Protocol):
    """Where servers come from. `place` and `close` may block, and come from any one thread."""

    def known(self) -> dict[str, list[Backend]]:
        """Return all servers, by role: `prefill` and `decode`. A server may have both."""

    def place(
        self, model: str, tokens: int, exclude: Sequence[str], serving: Collection[str]
    ) -> Pair:
        """Return the pair for a request.

        Args:
            exclude: names of servers, those first that matter most.
            serving: names of servers that say themselves that they serve the model: it may be an
                adapter, or an alias.

        Raises:
            PlacementError: none is left; says what is missing.
        """

    def close(self) -> None:
        """Let go of what it holds."""


class FixedBackends:
    """Servers from the command line, taken in turn. Their URLs are their names."""

    def __init__(self, prefills: Sequence[str], decodes: Sequence[str]) -> None:
        self._prefills = [Backend(url, url.rstrip("/")) for url in prefills]
        self._decodes = [Backend(url, url.rstrip("/")) for url in decodes]
        self._turns = itertools.count()

    def known(self) -> dict[str, list[Backend]]:
        return {"prefill": self._prefills, "decode": self._decodes}

    def place(
        self, model: str, tokens: int, exclude: Sequence[str], serving: Collection[str]
    ) -> Pair:
        return _take_turns(
            self.known(), exclude, next(self._turns), "none of {count} {role} servers answers"
        )

    def close(self) -> None:
        """Nothing is held."""


class DaemonBackends:
    """Servers that the daemon knows. It places; while it is away, the last that were seen are used.

    Args:
        address, keys: of the daemon; see `DaemonClient`.
        policy: of placement; the daemon's own if "".

    Raises:
        ConfigError: the address is none. DaemonTimeout: nobody answers there.
    """

    def __init__(self, address: str, keys: Keys | None = None, policy: str = "") -> None:
        self._policy = policy
        self._client = DaemonClient(address, keys)
        self._members: dict[str, Member] = {}
        self._turns = itertools.count()
        self._away = self._told = False
        self._ended = threading.Event()
        try:
            self._take(self._client.look(loads=False))
        except DaemonTimeout:
            self._client.close()
            raise
        self._watcher = threading.Thread(
            target=self._follow, args=(address, keys), name="kvferry-router-watch", daemon=True
        )
        self._watcher.start()

    def known(self) -> dict[str, list[Backend]]:
        return {
            role: [_backend(member) for member in self._serving() if member.role != other]
            for role, other in (("prefill", "decode"), ("decode", "prefill"))
        }

    def models(self) -> list[str]:
        """Return what the servers serve."""
        return sorted({m.registration.model for m in self._serving()})

    def place(
        self, model: str, tokens: int, exclude: Sequence[str], serving: Collection[str]
    ) -> Pair:
        members = self._members
        base = self._base_model(model, serving)
        others = [] if base == model else [name for name in members if name not in serving]
        if self._away:  # asking would cost each request the daemon's patience
            return self._place_alone(base, {*exclude, *others})
        # Agents of other programs have no HTTP address.
        strangers = [m.name for m in members.values() if not m.registration.service]
        avoided = [
            name for name in dict.fromkeys((*exclude, *others, *strangers)) if name in members
        ]
        try:
            placed = self._client.place(
                tokens,
                model=base or self._only_model(),
                exclude=tuple(avoided[:MAX_EXCLUDED]),
                policy=self._policy,
                timeout_s=DAEMON_S,
            )
            if not {placed.prefill, placed.decode} <= members.keys():  # it came just now
                self._take(self._client.look(loads=False, timeout_s=DAEMON_S))
        except DaemonTimeout:
            self._away = True  # until the watcher hears from it
            return self._place_alone(base, {*exclude, *others})
        members, pair = self._members, []
        for name in (placed.prefill, placed.decode):
            if name not in members or not members[name].registration.service:
                raise PlacementError(
                    f"{name} says no address of its HTTP server: set `service` in its "
                    "kv_connector_extra_config",
                    operation="place",
                )
            pair.append(_backend(members[name]))
        return Pair(*pair)

    def _base_model(self, model: str, serving: Collection[str]) -> str:
        """Return the model that agents are registered with, for an adapter or an alias of it."""
        if model in self.models():
            return model
        members = self._members  # the watcher puts another picture in its place
        bases = {members[name].registration.model for name in members.keys() & serving}
        return bases.pop() if len(bases) == 1 else model

    def _place_alone(self, model: str, exclude: Collection[str]) -> Pair:
        others = [n for n, m in self._members.items() if model not in ("", m.registration.model)]
        nobody = "the daemon does not answer, and no {role} server is left of the last known"
        return _take_turns(self.known(), {*exclude, *others}, next(self._turns), nobody)

    def _only_model(self) -> str:
        models = self.models()
        if len(models) > 1:
            raise PlacementError(
                f"the request names no model, and there are {', '.join(models)}", operation="place"
            )
        return models[0] if models else ""

    def _serving(self) -> list[Member]:
        return [
            member
            for member in self._members.values()
            if member.registration.service and member.state == "serving"
        ]

    def _follow(self, address: str, keys: Keys | None) -> None:
        """On a thread of its own, with a client of its own: keeps the picture fresh."""
        with DaemonClient(address, keys) as client:
            while not self._ended.wait(LOOK_S):
                try:
                    picture = client.look(loads=False, timeout_s=DAEMON_S)
                except DaemonError as error:
                    if not self._told:
                        log.warning("placing by the last picture of the cluster: %s", error)
                    self._away = self._told = True
                    continue
                self._away = self._told = False
                self._take(picture)

    def _take(self, picture: Snapshot) -> None:
        self._members = {member.name: member for member in picture.members}

    def close(self) -> None:
        self._ended.set()
        self._watcher.join()
        self._client.close()


def _take_turns(
    known: dict[str, list[Backend]], exclude: Collection[str], turn: int, nobody: str
) -> Pair:
    """Of each role the one whose turn it is.

    Raises:
        PlacementError: in the words of `nobody`.
    """
    found = []
    for role, backends in known.items():
        left = [backend for backend in backends if backend.name not in exclude]
        if not left:
            raise PlacementError(nobody.format(count=len(backends), role=role), operation="place")
        found.append(left[turn % len(left)])
    return Pair(*found)


def _backend(member: Member) -> Backend:
    return Backend(member.name, member.registration.service.rstrip("/"))

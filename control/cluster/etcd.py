"""Members in etcd: leases are etcd's, changes are its watches, a change is one transaction.

    NAME/floor           number that all generations of this cluster are above; written once
    NAME/members/AGENT   a `Record`, on a lease of the daemon that hears this agent
    NAME/daemons/ID      a `Peer`, on a lease of that daemon

A daemon keeps one lease for each length that its agents ask for, not one for each agent: what etcd
has to do for keeping alive does not grow with the agents. When a daemon dies, its leases end, and
with them the agents that have not gone to another daemon by then.

Two threads: one asks, one watches. What they find goes into one queue, which the daemon empties.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import requests
from etcd3gw import Etcd3Client, Lease
from etcd3gw.exceptions import Etcd3Exception

from .membership import Proposal, Record
from .store import Away, Back, Failed, Peer, PeerSeen, Picture, Seen, Settled, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .store import StoreAddress, StoreEvent

KEEP_ALIVE_S = 0.5
# What a daemon vouches for outlives it by as long; etcd takes whole seconds, of which 2 are its
# least, and looks every 0.5 s which leases have ended: 3 s took 3.1 to 3.6 s.
LEASES_S = (3, 6, 15, 60)
ANSWER_S = 1.0  # etcd answered after 2 ms, the 99th of 100 after 39
WATCH_QUIET_S = 2.0  # after which a watch begins anew, where it was: a dead one looks like that too
RETRY_S = 0.1
# What asking a server that is away, wrong or broken ends in.
TROUBLE = (Etcd3Exception, requests.RequestException, OSError, ValueError, KeyError, TypeError)

_records = msgspec.msgpack.Decoder(Record)
_peers = msgspec.msgpack.Decoder(Peer)
_encoder = msgspec.msgpack.Encoder()

log = logging.getLogger("kvferry.daemon")


class EtcdStore(Store):
    """A cluster's members in etcd; see `Store` for what its methods promise."""

    def __init__(self, address: StoreAddress) -> None:
        self._address = address
        self._prefix = f"{address.cluster}/"
        last = _base64(self._prefix[:-1] + "0")  # "0" comes after "/"
        self._everything = {"key": _base64(self._prefix), "range_end": last}
        self._turn = 0  # which of the servers is asked
        self._leases: dict[int, Lease] = {}
        self._asked: queue.SimpleQueue[tuple[int, Proposal]] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[StoreEvent] = queue.SimpleQueue()
        self._floor = 0
        self._away = ""
        self._stopping = False
        self._wake: Callable[[], None] = lambda: None
        self._me = Peer(0, "")
        self._threads: list[threading.Thread] = []

    def start(self, me: Peer, wake: Callable[[], None]) -> None:
        self._me, self._wake = me, wake
        for target in (self._ask, self._watch):
            self._threads.append(threading.Thread(target=target, name="kvferry-etcd", daemon=True))
            self._threads[-1].start()

    def propose(self, ticket: int, proposal: Proposal) -> None:
        self._asked.put((ticket, proposal))

    def events(self) -> list[StoreEvent]:
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._told.get_nowait())
        return found

    def close(self) -> None:
        self._stopping = True

    def _tell(self, event: StoreEvent) -> None:
        self._told.put(event)
        self._wake()

    def _client(self, read_timeout_s: float) -> Etcd3Client:
        address = self._address
        host, port = address.endpoints[self._turn % len(address.endpoints)]
        session = requests.Session()
        session.trust_env = False  # proxies are for the web
        if address.ca:
            session.verify = address.ca
            session.cert = (address.cert, address.key) if address.cert else None
        protocol = "https" if address.ca else "http"
        client = Etcd3Client(host, port, protocol, timeout=ANSWER_S, session=session)
        client.api_path  # noqa: B018 - asks for it, which fails here if the server is away
        client.timeout = read_timeout_s
        return client

    # The thread that asks

    def _ask(self) -> None:
        client: Etcd3Client | None = None
        due_s = 0.0
        while not self._stopping:
            try:
                if client is None:
                    client = self._client(ANSWER_S)
                    self._floor = self._find_floor(client)
                    due_s = 0.0
                if time.monotonic() >= due_s:
                    due_s = time.monotonic() + KEEP_ALIVE_S
                    self._keep_alive(client)
                    if self._away:
                        self._away = ""
                        self._tell(Back())
                with contextlib.suppress(queue.Empty):
                    wait_s = max(0.0, due_s - time.monotonic())
                    self._commit(client, *self._asked.get(timeout=wait_s))
            except TROUBLE as error:
                client = None
                self._trouble(error)
                self._turn += 1
                time.sleep(RETRY_S)

    def _trouble(self, error: Exception) -> None:
        """Say once that the store is away, and fail what was asked of it."""
        reason = self._reason(error)
        if not self._away:
            log.warning("%s", reason)
            self._tell(Away(reason))
        self._away = reason
        with contextlib.suppress(queue.Empty):
            while True:
                self._tell(Failed(self._asked.get_nowait()[0], reason))

    def _reason(self, error: Exception) -> str:
        host, port = self._address.endpoints[self._turn % len(self._address.endpoints)]
        return f"the store etcd://{host}:{port} does not answer: {_words(error)}"

    def _find_floor(self, client: Etcd3Client) -> int:
        """Return what all generations are above: written by whichever daemon came first."""
        # Microseconds: an etcd that lost everything starts anew far above what it gave before.
        client.create(f"{self._prefix}floor", str(time.time_ns() // 1000))
        return int(client.get(f"{self._prefix}floor")[0])

    def _keep_alive(self, client: Etcd3Client) -> None:
        for ttl, lease in list(self._leases.items()):
            if lease.refresh() < 0:  # it ended: etcd, or this process, was away for too long
                del self._leases[ttl]
        if LEASES_S[0] not in self._leases:
            lease = self._lease(client, LEASES_S[0])
            me = f"{self._prefix}daemons/{self._me.daemon}"
            client.put(me, _encoder.encode(self._me), lease=lease)

    def _lease(self, client: Etcd3Client, seconds: float) -> Lease:
        """Return the shortest lease that is not shorter."""
        ttl = next(ttl for ttl in LEASES_S if ttl >= seconds or ttl == LEASES_S[-1])
        if ttl not in self._leases:
            self._leases[ttl] = client.lease(ttl)
        lease = self._leases[ttl]
        return Lease(lease.id, client)

    def _commit(self, client: Etcd3Client, ticket: int, proposal: Proposal) -> None:
        """One transaction: the change, if nothing has come before it."""
        try:
            key = _base64(f"{self._prefix}members/{proposal.name}")
            unchanged = {"key": key, "target": "MOD", "result": "EQUAL"}
            change: dict[str, Any] = {"request_delete_range": {"key": key}}
            if proposal.record is not None:
                put = {"key": key, "value": _base64(_encoder.encode(proposal.record))}
                lease = self._lease(client, proposal.record.lease_s)
                change = {"request_put": put | {"lease": lease.id}}
            answer = client.transaction(
                {
                    "compare": [unchanged | {"mod_revision": proposal.revision}],
                    "success": [change],
                    "failure": [],
                }
            )
            held = answer.get("succeeded", False)
            self._tell(Settled(ticket, int(answer["header"]["revision"]) if held else 0))
        except TROUBLE as error:
            self._tell(Failed(ticket, self._reason(error)))
            if "lease not found" not in _words(error):
                raise
            self._leases.clear()  # they ended, and a new one is made for whoever asks again

    # The thread that watches

    def _watch(self) -> None:
        revision = 0
        while not self._stopping:
            try:
                client = self._client(WATCH_QUIET_S)
                if not self._floor:
                    self._floor = self._find_floor(client)
                if not revision:
                    revision = self._look(client)
                for event in self._follow(client, revision):
                    revision = event.revision
                    self._tell(event)
            except requests.ConnectionError as error:
                if "timed out" not in str(error):  # a quiet watch ends like that
                    revision = 0
                    time.sleep(RETRY_S)
            except requests.Timeout:
                pass
            except TROUBLE:
                revision = 0  # the other thread says that the store is away
                time.sleep(RETRY_S)
            else:
                revision = 0

    def _look(self, client: Etcd3Client) -> int:
        """Tell all that is there; return the revision at which that was so."""
        # In a transaction, because the library's own `get` keeps the revision to itself.
        answer = client.transaction(
            {"compare": [], "success": [{"request_range": self._everything}], "failure": []}
        )
        revision = int(answer["header"]["revision"])
        records: dict[str, tuple[Record, int]] = {}
        peers: dict[int, Peer] = {}
        for found in answer["responses"][0]["response_range"].get("kvs", []):
            event = self._event(found, gone=False)
            if isinstance(event, Seen) and event.record is not None:
                records[event.name] = (event.record, event.revision)
            elif isinstance(event, PeerSeen) and event.peer is not None:
                peers[event.daemon] = event.peer
        self._tell(Picture(revision, self._floor, records, peers))
        return revision

    def _follow(self, client: Etcd3Client, revision: int) -> Iterator[Seen | PeerSeen]:
        """Return what happens after `revision`. Raises when the watch ends.

        The library's `watch` is not used: when its connection breaks, its thread ends without a
        word and its iterator waits for ever.
        """
        ask = {"create_request": self._everything | {"start_revision": revision + 1}}
        with client.session.post(
            client.get_url("/watch"), json=ask, stream=True, timeout=(ANSWER_S, WATCH_QUIET_S)
        ) as response:
            for line in response.iter_lines(chunk_size=1 << 16):
                if not line:
                    continue
                result = json.loads(line)["result"]
                if result.get("canceled"):  # the revision is not kept any more, say
                    return
                for found in result.get("events", ()):
                    event = self._event(found["kv"], gone=found.get("type") == "DELETE")
                    if event is not None:
                        yield event

    def _event(self, found: Any, *, gone: bool) -> Seen | PeerSeen | None:
        key = base64.b64decode(found["key"]).decode()[len(self._prefix) :]
        kind, _, name = key.partition("/")
        value, revision = base64.b64decode(found.get("value", "")), int(found["mod_revision"])
        try:
            if kind == "members":
                return Seen(revision, name, None if gone else _record(value, name))
            if kind == "daemons":
                return PeerSeen(revision, int(name), None if gone else _peers.decode(value))
        except (msgspec.MsgspecError, ValueError) as error:
            log.warning("the store has what is no record, at %s: %s", key, error)
        return None


def _record(value: bytes, name: str) -> Record:
    """Return the record of a name.

    Raises:
        ValueError: it is none, or another name's.
    """
    record = _records.decode(value)
    if record.member.name != name:
        raise ValueError(f"it names {record.member.name!r}")
    return record


def _base64(data: str | bytes) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def _words(error: Exception) -> str:
    """Return what an error of the client library says; some keep it apart from `str`."""
    return str(getattr(error, "detail_text", None) or error or type(error).__name__)[:300]

"""Engines meet: what a handshake accepts, what it refuses by name, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from kvferry.engine.connect import handshake
from kvferry.engine.connect.handshake import Hello, Introduction
from kvferry.engine.connect.listener import MAX_HANDSHAKES, MAX_HANDSHAKES_OF_A_SOURCE
from kvferry.engine.errors import (
    DeadlineExceeded,
    EngineError,
    LinkClosed,
    NotRegistered,
    PeerLost,
    ProtocolError,
    TransportUnavailable,
)
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.wire import messages as wire
from kvferry.engine.wire.identity import EngineAddress, Identity
from kvferry.engine.wire.messages import LINK_VERSION
from tests.support.leaks import LeakCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Peer


@pytest.fixture
def server() -> Iterator[TransferEngine]:
    with TransferEngine(name="server") as engine:
        yield engine


def dial(address: EngineAddress, transport: str) -> socket.socket:
    """A bare connection to an engine's listener."""
    if transport == "tcp":
        return socket.create_connection((address.tcp_host, address.tcp_port), 15.0)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(15.0)
    sock.connect(f"\0{address.unix_name}")
    return sock


def hello_to(server: TransferEngine, **changes: object) -> Hello:
    return msgspec.structs.replace(Hello(LINK_VERSION, server.engine_id, bytes(32)), **changes)


def introduction(over: str, **changes: object) -> Introduction:
    me = Identity("impostor", "impostor", handshake.host_id(), os.getpid())
    return msgspec.structs.replace(Introduction(me, over, "x", -1, 1), **changes)


def greet(server: TransferEngine, over: str, address: EngineAddress, **changes: object) -> None:
    """Shakes hands by hand; raises what the handshake raises."""
    with dial(server.address, over) as sock:
        handshake.connect(sock, address, introduction(over, **changes), lambda _: "")


def answer_to(server: TransferEngine, over: str, hello: msgspec.Struct) -> bytes:
    """All that an engine says to somebody who says this and no more."""
    with dial(server.address, over) as sock:
        handshake._send(sock, hello)
        sock.shutdown(socket.SHUT_WR)
        data = bytearray()
        while part := sock.recv(1 << 16):
            data += part
    return bytes(data[4:])


def test_every_transport_is_tried_in_order(engine: TransferEngine, peer: Peer) -> None:
    link = engine.connect(peer.address.encode())
    assert link.transport == engine.transports[0]
    assert (link.peer.name, link.peer.pid) == ("peer", peer.process.pid)
    assert link.peer.engine_id == peer.engine_id
    link.close()


def test_the_next_transport_is_taken_where_the_first_fails(
    engine: TransferEngine, peer: Peer
) -> None:
    elsewhere = msgspec.structs.replace(peer.address, unix_name="kvferry-nobody")
    link = engine.connect(elsewhere)
    assert link.transport == "tcp"
    link.close()


def test_an_address_survives_its_encoding(server: TransferEngine) -> None:
    assert EngineAddress.decode(server.address.encode()) == server.address
    for junk in (b"", b"\xc1", server.address.encode()[:-1], b"\x80"):
        with pytest.raises(ProtocolError, match="not an engine address"):
            EngineAddress.decode(junk)
    tall = msgspec.structs.replace(server.address, tcp_port=70_000)
    with pytest.raises(ProtocolError, match="tcp_port"):
        EngineAddress.decode(tall.encode())


def test_a_wrong_secret_is_refused_at_either_end(server: TransferEngine, transport: str) -> None:
    wrong = msgspec.structs.replace(server.address, secret=bytes(32))
    with (
        TransferEngine(name="client") as client,
        pytest.raises(ProtocolError, match="does not know its own secret"),
    ):
        client.connect(wrong, transport=transport)
    # A client that does not check the server's proof gets no further either.
    with dial(server.address, transport) as sock:
        handshake._send(sock, hello_to(server))
        deadline_s = time.monotonic() + 15.0
        handshake._receive(sock, handshake.Challenge, "", deadline_s)
        handshake._send(sock, handshake.Proof(bytes(32), b"not even looked at"))
        answer = handshake._receive(sock, handshake.Welcome, "", deadline_s)
        assert "the proof is wrong" in answer.refused
        assert sock.recv(1) == b""
    assert server.links == ()


def test_the_address_of_a_restarted_engine_is_refused_by_name(
    server: TransferEngine, engine: TransferEngine, transport: str
) -> None:
    """The old engine's id and secret, and a new engine that listens where the old one did."""
    with TransferEngine(name="server") as before:
        old = before.address
    stale = msgspec.structs.replace(
        old, tcp_port=server.address.tcp_port, unix_name=server.address.unix_name
    )
    with pytest.raises(TransportUnavailable, match="restarted since its address was published"):
        engine.connect(stale, transport=transport)
    with pytest.raises(TransportUnavailable, match="refused"):
        engine.connect(old, transport=transport)
    region = server.register(np.zeros(10, np.uint8))
    link = engine.connect(server.address, transport=transport)
    mine = engine.register(np.zeros(10, np.uint8))
    ghost = msgspec.structs.replace(region.descriptor, engine_id=old.engine_id)
    with pytest.raises(NotRegistered, match="one that has restarted: fetch its descriptor again"):
        link.write(mine, 0, ghost, 0, 1)
    mine.deregister()
    link.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": LINK_VERSION + 1}, f"link protocol {LINK_VERSION + 1} is not {LINK_VERSION}"),
        ({"server_engine_id": "somebody else"}, "was restarted"),
        ({"token_id": bytes(16)}, "this token is used"),
    ],
)
def test_a_hello_that_cannot_be_served_is_answered_in_words(
    server: TransferEngine, transport: str, changes: dict[str, object], words: str
) -> None:
    answer = answer_to(server, transport, hello_to(server, **changes))
    assert words in msgspec.msgpack.decode(answer, type=handshake.Challenge).refused
    assert server.links == ()


def test_a_hello_of_another_version_may_look_different(
    server: TransferEngine, transport: str
) -> None:
    class Later(msgspec.Struct):
        version: int = LINK_VERSION + 1
        colour: str = "blue"

    answer = answer_to(server, transport, Later())
    assert "install equal versions" in msgspec.msgpack.decode(answer)["refused"]


@pytest.mark.parametrize("served", [True, False])
def test_a_stranger_learns_nothing_of_the_engine(
    server: TransferEngine, transport: str, served: bool
) -> None:
    """Whether its hello is one that is served or refused."""
    names = (server.engine_id, server.name, server._core.identity.host_id, server.address.unix_name)
    secrets = [name.encode() for name in names]
    secrets += [server.address.secret, server._listener._probe.word]
    hello = hello_to(server) if served else hello_to(server, server_engine_id="who is there?")
    answer = answer_to(server, transport, hello)
    for secret in secrets:
        assert secret not in answer
    fields = msgspec.msgpack.decode(answer)
    assert fields.keys() == {"refused", "nonce", "proof"}
    assert [len(fields["nonce"]), len(fields["proof"])] == [32, 32 * served]
    again = msgspec.msgpack.decode(answer_to(server, transport, hello))
    assert not served or again["nonce"] != fields["nonce"]


def test_a_client_says_nothing_of_itself_before_the_other_has_proven_itself(
    engine: TransferEngine,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = msgspec.structs.replace(
            engine.address, tcp_port=listener.getsockname()[1], unix_name=""
        )
        heard = bytearray()

        def listen() -> None:
            sock, _ = listener.accept()
            with sock:
                handshake._receive(sock, Hello, "", time.monotonic() + 15.0)
                handshake._send(sock, handshake.Challenge("", bytes(32), bytes(32)))
                while part := sock.recv(1 << 16):
                    heard.extend(part)

        thread = threading.Thread(target=listen)
        thread.start()
        with (
            TransferEngine(name="client") as client,
            pytest.raises(ProtocolError, match="does not know its own secret"),
        ):
            client.connect(address, transport="tcp")
        thread.join()
        assert heard == b""


def test_an_introduction_is_covered_by_its_proof(server: TransferEngine, transport: str) -> None:
    """Who sits on the way cannot make one client of another."""
    nonce = bytes(32)
    with dial(server.address, transport) as sock:
        handshake._send(sock, hello_to(server, nonce=nonce))
        deadline_s = time.monotonic() + 15.0
        challenge = handshake._receive(sock, handshake.Challenge, "", deadline_s)
        said = [
            msgspec.msgpack.encode(introduction(transport, link_id=link))
            for link in ("mine", "his")
        ]
        secret = server.address.secret
        proof = handshake._proof(secret, b"client", nonce, challenge.nonce, said[0])
        handshake._send(sock, handshake.Proof(proof, said[1]))
        answer = handshake._receive(sock, handshake.Welcome, "", deadline_s)
        assert "the proof is wrong" in answer.refused
        assert answer.identity is None


@pytest.mark.parametrize("sources", [1, 6])
def test_strangers_do_not_keep_others_out(
    server: TransferEngine, engine: TransferEngine, sources: int
) -> None:
    """Idle connections, from one address or from more than all places are for."""
    there = (server.address.tcp_host, server.address.tcp_port)
    with contextlib.ExitStack() as idle:
        for number in range(300):
            here = (f"127.0.0.{2 + number % sources}", 0) if sources > 1 else None
            idle.enter_context(socket.create_connection(there, 15.0, here))
        for _ in range(100):
            idle.enter_context(dial(server.address, "cma"))
        for transport in ("tcp", "cma"):
            link = engine.connect(server.address, transport=transport, timeout_s=15.0)
            link.signal(0).wait(15.0)
            link.close()
        held = [len(strangers._socks) for strangers in server._listener._strangers.values()]
        assert max(held) <= MAX_HANDSHAKES


def test_a_client_that_has_proven_itself_takes_no_strangers_place(server: TransferEngine) -> None:
    with contextlib.ExitStack() as links:
        first = links.enter_context(dial(server.address, "tcp"))
        half = introduction("tcp", link_id="half", num_rails=2)
        handshake.connect(first, server.address, half, lambda _: "")
        for _ in range(MAX_HANDSHAKES_OF_A_SOURCE + 10):
            links.enter_context(dial(server.address, "tcp"))
        second = links.enter_context(dial(server.address, "tcp"))
        rail = introduction("tcp", link_id="half", num_rails=2, rail=0)
        handshake.connect(second, server.address, rail, lambda _: "")


def test_a_process_of_another_user_is_refused_by_name(
    server: TransferEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of abstract sockets are in /proc/net/unix, and they have no permissions."""
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: 1)  # as if this process's were another's
    else:  # root may do everything
        monkeypatch.setattr(handshake, "_peer", lambda sock: (os.getpid(), 65534))
    with dial(server.address, "cma") as sock:
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    challenge = msgspec.msgpack.decode(answer[4:], type=handshake.Challenge)
    assert "takes no local links of user" in challenge.refused
    assert server._listener._strangers["unix"]._socks == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rail": 0}, "rail 0 belongs to no link"),
        ({"rail": -1, "num_rails": 0}, "a link of 0 rails"),
        ({"rail": -1, "num_rails": 65}, "a link of 65 rails"),
        ({"transport": "cma"}, "'cma' is not offered here"),
        ({"transport": "carrier-pigeon"}, "'carrier-pigeon' is not offered here"),
    ],
)
def test_rails_that_belong_nowhere_are_refused(
    server: TransferEngine, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(TransportUnavailable, match=words):
        greet(server, "tcp", server.address, **changes)
    assert server.links == ()


def test_a_cma_client_must_be_the_process_that_it_says(server: TransferEngine) -> None:
    word = np.arange(2, dtype=np.uint64)
    honest = {"probe": word.ctypes.data, "probe_word": word.tobytes()}
    me = introduction("cma").identity
    for lie in (
        {**honest, "probe_word": bytes(16)},
        {**honest, "probe": 8},
        {**honest, "probe": 2**63 - 1},
        {**honest, "identity": msgspec.structs.replace(me, pid=os.getppid())},
    ):
        with pytest.raises(TransportUnavailable, match=r"cannot reach|not the process"):
            greet(server, "cma", server.address, **lie)
    assert server.links == ()
    with dial(server.address, "cma") as sock:
        handshake.connect(
            sock,
            server.address,
            introduction("cma", **honest),
            lambda _: "",
        )
        link = server.accept_link("impostor", timeout_s=15.0)
        sock.sendall(wire.encode(wire.Bye("")))
        assert link.quiesced.wait(15.0) == 0


def test_a_listener_that_is_no_engine_is_told_apart(engine: TransferEngine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = msgspec.structs.replace(
            engine.address, tcp_port=listener.getsockname()[1], unix_name=""
        )

        def answer(junk: bytes) -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(junk)
                with contextlib.suppress(OSError):  # the client may have hung up at the junk
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(1 << 16):
                        pass

        for junk, error in (
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
            (b"\x01\x00\x00\x00\xc1", ProtocolError),
            (b"\x00\x00\x00\x00", ProtocolError),
            (b"", PeerLost),
            (b"\x10\x00\x00\x00half", PeerLost),
        ):
            thread = threading.Thread(target=answer, args=(junk,))
            thread.start()
            with pytest.raises(error):
                engine.connect(address, transport="tcp")
            thread.join()


def test_a_handshake_ends_at_its_deadline_however_slowly_bytes_drip(
    engine: TransferEngine,
) -> None:
    """A silent end is one thing; one that sends a byte whenever the patience is nearly over is
    another: the whole handshake has one deadline."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0.3)
    stop = threading.Event()

    def drip() -> None:
        theirs.sendall(b"\xff\x00\x00\x00")
        while not stop.wait(0.05):
            theirs.sendall(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    with ours, theirs:
        with pytest.raises(PeerLost, match="did not answer in time"):
            handshake.connect(ours, engine.address, introduction("tcp"), lambda _: "")
        stop.set()
        thread.join()


def test_accepting_waits_until_the_link_is_there(
    server: TransferEngine, engine: TransferEngine, transport: str
) -> None:
    with pytest.raises(DeadlineExceeded, match=r"no link from engine .* came in 0\.01 s"):
        server.accept_link(engine.engine_id, timeout_s=0.01)
    threads = threading.active_count()
    accepted: list[object] = []
    waiter = threading.Thread(
        target=lambda: accepted.append(server.accept_link(engine.engine_id, timeout_s=15.0))
    )
    waiter.start()
    link = engine.connect(server.address, transport=transport)
    waiter.join()
    assert [type(one).__name__ for one in accepted] == ["Link"]
    link.close()
    assert threading.active_count() <= threads + 2 + 2  # copiers and the progress threads at most


def test_a_half_open_link_does_not_outlive_the_engine() -> None:
    """A client that greets, or opens the control channel, and then nothing."""
    threads, num_fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    engine = TransferEngine(name="server")
    socks = [dial(engine.address, "tcp"), dial(engine.address, "cma")]
    socks.append(dial(engine.address, "tcp"))
    handshake.connect(
        socks[-1],
        engine.address,
        introduction("tcp", link_id="half", num_rails=2),
        lambda _: "",
    )
    engine.close()
    for sock in socks:
        sock.settimeout(15.0)
        assert sock.recv(1) == b""
        sock.close()
    # Threads of earlier tests may end meanwhile.
    assert not set(threading.enumerate()) - threads
    assert len(os.listdir("/proc/self/fd")) <= num_fds


def test_an_engine_without_descriptors_does_not_spin_and_recovers(
    engine: TransferEngine, start_peer: Callable[..., Peer], transport: str
) -> None:
    peer = start_peer(name="poor")
    peer.call("limit_descriptors", True)
    with pytest.raises((PeerLost, TransportUnavailable)):
        engine.connect(peer.address, transport=transport, timeout_s=0.3)
    assert peer.call("busy", 0.5) < 0.25  # of a core, while the client waits in the backlog
    peer.call("limit_descriptors", False)
    link = engine.connect(peer.address, transport=transport)
    link.signal(0).wait(15.0)
    link.close()


def test_an_engine_that_cannot_start_leaves_nothing_behind() -> None:
    threads, num_fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(TransportUnavailable, match="cannot listen on"):
            TransferEngine(host="256.256.256.256")
    # Threads of earlier tests may end meanwhile.
    assert not set(threading.enumerate()) - threads
    assert len(os.listdir("/proc/self/fd")) <= num_fds


def test_engines_come_and_go_without_a_trace(
    start_peer: Callable[..., Peer], transport: str
) -> None:
    peer = start_peer()
    array = np.zeros(1 << 20, np.uint8)
    leaks = LeakCheck()
    for _ in range(5):
        with TransferEngine() as engine:
            link = engine.connect(peer.address, transport=transport)
            peer.call("accept", engine.engine_id)
            theirs = peer.call("pool", 1 << 20, 1)
            region = engine.register(array)
            link.write(region, 0, theirs, 0, 1 << 20).wait(15.0)
            peer.call("deregister", theirs.region_id)
        peer.call("link_down", engine.engine_id)
        leaks.take()
        peer.call("leaks")


def test_a_closed_engine_may_not_be_joined(server: TransferEngine) -> None:
    with TransferEngine(name="gone") as gone:
        address = gone.address
    with pytest.raises(EngineError):
        server.connect(address)
    with pytest.raises(LinkClosed, match="engine is closed"):
        gone.connect(server.address)


def test_a_callback_may_close_the_link_and_the_engine(peer: Peer, transport: str) -> None:
    """On whatever thread it runs."""
    engine = TransferEngine(name="hasty")
    link = engine.connect(peer.address, transport=transport)
    peer.call("accept", engine.engine_id)
    ended = threading.Event()

    def end(_: object) -> None:
        link.close(timeout_s=0.0)
        engine.close(timeout_s=0.0)
        ended.set()

    link.signal(0).add_done_callback(end)
    assert ended.wait(15.0)
    assert isinstance(peer.call("link_down", engine.engine_id), PeerLost)

    async def refused() -> None:
        with pytest.raises(LinkClosed):
            await engine.expect(5, nbytes=1)

    asyncio.run(refused())


@pytest.mark.parametrize("queues", [0, 17])
def test_a_rail_has_a_bounded_number_of_queue_pairs(queues: int) -> None:
    with pytest.raises(TransportUnavailable, match=f"queues is {queues}.*1 to 16"):
        TransferEngine(queues=queues)


def test_names_that_are_one_text_are_told_apart_from_lists() -> None:
    text: Any = "tcp"
    with pytest.raises(TransportUnavailable, match=r"transports='tcp' is one text.*\['tcp'\]"):
        TransferEngine(transports=text)
    with pytest.raises(TransportUnavailable, match="nics='mlx5_0' names 'mlx5_0': give a list"):
        TransferEngine(nics="mlx5_0")


def test_a_nic_that_is_not_there_is_refused_unless_verbs_is_not_asked_for() -> None:
    with pytest.raises(TransportUnavailable, match=r"names 'mlx5_99'.* there are: "):
        TransferEngine(nics=["mlx5_99"])
    with TransferEngine(transports=["tcp"], nics=["mlx5_99"]) as engine:
        assert engine.transports == ("tcp",)

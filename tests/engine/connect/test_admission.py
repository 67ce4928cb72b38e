"""One-time tokens: without the right one nobody gets a link, and with it only one, once."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest

from kvferry.engine.connect.handshake import token_id
from kvferry.engine.errors import DeadlineExceeded, OutOfRange, TransportUnavailable
from kvferry.engine.transfer_engine import TransferEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = secrets.token_bytes(32)


@pytest.fixture
def guarded(transport: str) -> Iterator[TransferEngine]:
    with TransferEngine(name="guarded", transports=(transport,), require_tokens=True) as engine:
        yield engine


@pytest.fixture
def client(transport: str) -> Iterator[TransferEngine]:
    with TransferEngine(name="client", transports=(transport,)) as engine:
        yield engine


def test_a_token_opens_one_link(guarded: TransferEngine, client: TransferEngine) -> None:
    guarded.admit(TOKEN, client.engine_id)
    link = client.connect(guarded.address, token=TOKEN)
    assert guarded.accept_link(client.engine_id).peer.name == "client"
    with pytest.raises(TransportUnavailable, match="used"):
        client.connect(guarded.address, token=TOKEN)
    assert not link.closed


def test_of_several_links_a_token_finds_the_one_that_it_opened(
    guarded: TransferEngine, client: TransferEngine
) -> None:
    tokens = [secrets.token_bytes(32) for _ in range(3)]
    dialled = []
    for token in tokens:
        guarded.admit(token, client.engine_id)
        dialled.append(client.connect(guarded.address, token=token))
    accepted = [guarded.accept_link(client.engine_id, token=token) for token in tokens]
    assert len(set(accepted)) == 3
    accepted[1].close()
    dialled[1].quiesced.wait(10)
    assert [link.closed for link in dialled] == [False, True, False]
    assert guarded.accept_link(client.engine_id, token=tokens[2]) is accepted[2]
    with pytest.raises(DeadlineExceeded):
        guarded.accept_link(client.engine_id, 0.0, token=tokens[1])


def test_the_address_alone_admits_nobody(guarded: TransferEngine, client: TransferEngine) -> None:
    guarded.admit(TOKEN, client.engine_id)
    with pytest.raises(TransportUnavailable, match="one-time token only"):
        client.connect(guarded.address)
    with pytest.raises(TransportUnavailable, match="used, late or another engine's"):
        client.connect(guarded.address, token=secrets.token_bytes(32))
    assert guarded.links == ()


def test_a_token_serves_the_engine_that_it_was_made_for(
    guarded: TransferEngine, client: TransferEngine
) -> None:
    guarded.admit(TOKEN, "another engine")
    with pytest.raises(TransportUnavailable, match="another engine's"):
        client.connect(guarded.address, token=TOKEN)


def test_a_token_is_proven_not_shown(
    guarded: TransferEngine, client: TransferEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who saw a token's name on the wire, and has the address, lacks the token still."""
    guarded.admit(TOKEN, client.engine_id)
    name = token_id(TOKEN)
    monkeypatch.setattr("kvferry.engine.connect.dialer.token_id", lambda token: name)
    with pytest.raises(TransportUnavailable, match="does not know its own secret"):
        client.connect(guarded.address, token=bytes(32))
    monkeypatch.undo()
    client.connect(guarded.address, token=TOKEN)  # it is still good


def test_a_late_token_is_refused(guarded: TransferEngine, client: TransferEngine) -> None:
    guarded.admit(TOKEN, client.engine_id, timeout_s=-1.0)
    with pytest.raises(TransportUnavailable, match="late"):
        client.connect(guarded.address, token=TOKEN)


def test_a_token_has_32_bytes(guarded: TransferEngine) -> None:
    with pytest.raises(OutOfRange, match="32 bytes, not 3"):
        guarded.admit(b"abc", "x")

"""The processes of benchmarks: what they answer, and how their end is told."""

from __future__ import annotations

import io

import pytest

from kvferry.tools.bench.peers import Peer, PeerEnded


def test_methods_are_called_there_and_generators_answer_often() -> None:
    with Peer(io.StringIO, "one\ntwo\n") as peer:
        assert peer.call("getvalue") == "one\ntwo\n"
        assert peer.call("__iter__") == "one\n"
        assert peer.answer(60) == "two\n"
        peer.tell("seek", 0)  # nobody reads what it answers
    assert peer.process.exitcode == 0
    peer.close()


def test_silence_is_told() -> None:
    with Peer(io.StringIO) as peer, pytest.raises(PeerEnded, match=r"did not answer in 0\.01 s"):
        peer.answer(0.01)


def test_an_end_is_told_with_its_status() -> None:
    peer = Peer(io.StringIO)
    with pytest.raises(PeerEnded, match="ended with status 1"):
        peer.call("no such method")
    with pytest.raises(PeerEnded, match="ended with status 1"):
        peer.call("getvalue")
    peer.kill()

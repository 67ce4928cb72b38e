"""A word that a peer tries to read: it proves that memory is reached, and whose memory it is."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import numpy as np

from ..transports.cma import path as cma
from ..transports.selection import LOCAL
from . import handshake

if TYPE_CHECKING:
    import socket


class ProcessProbe:
    """This process's word, and a look at those of others.

    Attributes:
        address: of the word, in this process.
        word: its content.
    """

    def __init__(self) -> None:
        self._array = np.frombuffer(bytearray(secrets.token_bytes(16)), np.uint64)
        self.address = int(self._array.ctypes.data)
        self.word = self._array.tobytes()

    def refusal(self, sock: socket.socket, transport: str, peer: Any) -> str:
        """Tries to read the word of whoever is at the other end; a reason to refuse it, or "".

        Args:
            peer: what it has sent (`Hello` or `Challenge`): who it is, and where its word lies.
        """
        if transport not in LOCAL:
            return ""
        pid = handshake.peer_pid(sock)
        if transport == "cuda_ipc" and peer.identity.pid == pid:
            return ""  # no need to reach its host memory
        try:
            if peer.identity.pid == pid and cma.read_word(pid, peer.probe) == peer.probe_word:
                return ""
        except OSError as error:
            return cma.refusal(error)
        return "the engine at the other end of the socket is not the process that it seems to be"

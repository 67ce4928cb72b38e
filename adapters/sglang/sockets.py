"""SGLang's ZeroMQ sockets, which carry the messages of the two sides."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.common.conn import CommonKVReceiver

from ...engine.errors import ProtocolError
from .messages import Target, frames, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .messages import ToPrefill

LISTEN_MS = 200  # how often a listener looks whether it shall end

log = logging.getLogger("kvferry.sglang")


def target_of(bootstrap_info: Any) -> Target:
    """Name the prefill rank that an entry of SGLang's bootstrap server is about."""
    return Target(str(bootstrap_info["rank_ip"]), int(bootstrap_info["rank_port"]))


def send_to_prefill(target: Target, message: ToPrefill) -> None:
    """Send over the sockets that all of SGLang's receivers share.

    Raises:
        zmq.ZMQError: it cannot be sent.
    """
    info = {"rank_ip": target.host, "rank_port": target.port}
    sock, lock = CommonKVReceiver._connect_to_bootstrap_server(info)
    with lock:
        sock.send_multipart(frames(message))


class Listener:
    """Hand every message that comes to its handler, on a thread of its own.

    Args:
        sock: a ZeroMQ socket that nobody else reads.
        handlers: by type of message; others are ignored.
    """

    def __init__(self, sock: Any, handlers: Mapping[type, Callable[[Any], None]]) -> None:
        self._sock = sock
        self._handlers = handlers
        self._closed = False
        self._thread = threading.Thread(
            target=self._listen, name="kvferry-sglang-listen", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the thread; the socket's owner closes it afterwards."""
        self._closed = True
        self._thread.join(5.0)

    def _listen(self) -> None:
        while not self._closed:
            if not self._sock.poll(LISTEN_MS):
                continue
            try:
                message = parse(self._sock.recv_multipart())
                handler = self._handlers.get(type(message))
                if handler is not None:
                    handler(message)
            except ProtocolError as error:
                log.warning("kvferry: %s", error)
            except Exception:  # one message must not end the thread that serves all
                log.exception("kvferry: a message of the SGLang backend was not handled")

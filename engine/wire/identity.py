"""Who is at the end of a link, and where that engine is reached."""

from __future__ import annotations

import msgspec

from ..errors import ProtocolError
from ..memory.fields import DECODE_ERRORS, Pid, Port, Uint32


class Identity(msgspec.Struct, frozen=True):
    """Who an engine is.

    Attributes:
        engine_id: random for each `TransferEngine`, so a restarted engine is another one.
        host_id: equal for processes that share a kernel and a process namespace.
    """

    engine_id: str
    name: str
    host_id: str
    pid: Pid


class EngineAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where and how an engine can be reached. Whoever holds it may connect: treat it as a secret."""

    identity: Identity
    secret: bytes
    tcp_host: str
    tcp_port: Port
    unix_name: str
    nics: Uint32 = 0  # RDMA devices that a verbs link may use; none: the engine offers no verbs

    def __repr__(self) -> str:
        return f"<EngineAddress of {self.identity.name}>"  # logs must not hold the secret

    @property
    def engine_id(self) -> str:
        """The engine's id, which is also its generation."""
        return self.identity.engine_id

    def encode(self) -> bytes:
        """MessagePack bytes, for the control plane."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> EngineAddress:
        """Read what `encode` wrote.

        Raises:
            ProtocolError: it is not an engine address.
        """
        try:
            return _address_decoder.decode(data)
        except DECODE_ERRORS as error:
            raise ProtocolError(f"not an engine address: {error}", operation="connect") from error


_address_decoder = msgspec.msgpack.Decoder(EngineAddress)

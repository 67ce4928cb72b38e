"""What each message of the peer's does to a link. On the progress thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PeerAborted, ProtocolError
from ..wire import messages as wire

if TYPE_CHECKING:
    from ..wire.messages import LinkMessage
    from .link import Link
    from .revocation import Revocation
    from .submit import Submitter
    from .teardown import Teardown


class LinkMessages:
    """Hands each message of one link to the part that it concerns, and the path's to the path."""

    def __init__(
        self, link: Link, submitter: Submitter, revocation: Revocation, teardown: Teardown
    ) -> None:
        self._link = link
        self._path = submitter.path
        self._table = submitter.table
        self._grants = submitter.grants
        self._submitter = submitter
        self._revocation = revocation
        self._teardown = teardown

    def handle(self, message: LinkMessage) -> None:
        """Handles one message; one that has no place here takes the link down."""
        link = self._link
        if isinstance(message, wire.Heartbeat) or self._path.handle(message):
            return
        if isinstance(message, wire.Arrived) and (
            self._path.peer_reaches_memory or not message.nbytes
        ):  # bytes that pass through this process are counted where they are placed
            link.count(
                message.imm, message.nbytes, message.writes, write_nbytes=message.write_nbytes
            )
        elif isinstance(message, wire.Refuse):
            self._refused(message)
        elif isinstance(message, wire.Abort):
            self._aborted(message)
        elif isinstance(message, wire.Claim) and self._path.asks_leave:
            link.grant(message, lambda _: ())
        elif isinstance(message, wire.Granted):
            for transfer in self._grants.answered(message, self._table.revoked):
                self._submitter.begin(transfer)
        elif isinstance(message, wire.Revoke):
            self._revocation.obey(message.region)
        elif isinstance(message, wire.Revoked):
            self._revocation.answered(message.region)
        elif isinstance(message, wire.Bye):
            self._teardown.said_bye(message)
        elif isinstance(message, wire.ByeToo) and self._table.error is not None:
            self._teardown.answered_bye()
        else:
            link.fail(
                ProtocolError(
                    f"{type(message).__name__} is no message of transport {link.transport}",
                    operation="receive",
                )
            )

    def _refused(self, message: wire.Refuse) -> None:
        transfer = self._table.get(message.transfer)
        if transfer is not None:
            transfer.stop(self._link.refusal(transfer, message.error, message.reason))
            transfer.end(0)

    def _aborted(self, message: wire.Abort) -> None:
        peer = self._link.peer
        self._link.core.counters.fail(
            message.imm,
            PeerAborted(
                f"the peer gave up: {message.reason}",
                operation="expect",
                peer=peer.name,
                imm=message.imm,
            ),
            remember=True,
            origin=peer.engine_id,
        )

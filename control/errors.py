"""Every error of the control wing.

    ControlError
    ├── ProtocolError          bytes of a peer that are no message of ours; `fault` says how
    ├── HelloError             two agents could not agree to work together
    │   ├── VersionMismatch
    │   ├── LayoutMismatch     the layouts, or the memory behind them, cannot be reconciled
    │   ├── RoleMismatch       two prefills, or two decodes
    │   ├── HelloTimeout       (also a TimeoutError) nobody answered
    │   └── HelloRefused       any other reason the peer gave
    ├── HandoffError           one handoff failed; the agents may go on
    │   ├── HandoffTimeout     (also a TimeoutError)
    │   ├── HandoffCancelled   this side, or the peer, cancelled it
    │   ├── BlocksMismatch     the two sides named different numbers of blocks
    │   ├── TransferFailed     moving the bytes failed here; the engine's error is the cause
    │   ├── PeerFailed         the peer says that it failed there
    │   ├── LinkLost           the link to the peer went down, or the peer restarted
    │   └── SendFailed         a message could not be queued for the peer
    ├── DaemonError            the daemon could not, or would not
    │   ├── DaemonTimeout      (also a TimeoutError) it did not answer
    │   ├── DaemonDenied       it said no, and why
    │   └── PlacementError     no pair of agents, or no policy, fits a request
    ├── ConfigError            a setting that cannot be
    │   └── InsecureAddress    (also a ValueError) an address beyond this machine, without keys
    ├── ForkedProcess          a child of fork() used what its parent has made
    ├── NotConnected           no peer of that name
    ├── AgentDraining          the agent takes nothing new until it is restored
    └── AgentClosed            the agent was closed

`retryable` says whether another attempt (with a new imm) can succeed.
"""

from __future__ import annotations


class ControlError(Exception):
    """A conversation between agents failed.

    Attributes:
        handoff: which handoff, as `request#attempt`, or "" where none is concerned.
        peer: the peer agent's name, or "" where none is known.
        operation: what was being done.
        retryable: whether another attempt can succeed.
    """

    retryable = False

    def __init__(
        self,
        message: str,
        *,
        handoff: str = "",
        peer: str = "",
        operation: str = "",
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.handoff = handoff
        self.peer = peer
        self.operation = operation
        if retryable is not None:
            self.retryable = retryable

    def __str__(self) -> str:
        where = [
            f"{name}={value}"
            for name, value in (
                ("operation", self.operation),
                ("handoff", self.handoff),
                ("peer", self.peer),
            )
            if value
        ]
        return f"{self.message} [{', '.join(where)}]" if where else self.message


class ProtocolError(ControlError):
    """Bytes that are no message of ours.

    Attributes:
        fault: `truncated`, `oversized`, `deep`, `malformed`, `wrong type` or `unknown message`.
    """

    def __init__(self, message: str, *, fault: str = "malformed", peer: str = "") -> None:
        super().__init__(message, peer=peer, operation="decode")
        self.fault = fault


class HelloError(ControlError):
    """Two agents could not agree to work together."""


class VersionMismatch(HelloError):
    """The peer speaks another version of the messages."""


class LayoutMismatch(HelloError):
    """The peer's layout, or the memory behind it, cannot be reconciled with ours."""


class RoleMismatch(HelloError):
    """Neither side could hand anything to the other: two prefills, or two decodes."""


class HelloTimeout(HelloError, TimeoutError):
    """Nobody answered in time."""

    retryable = True


class HelloRefused(HelloError):
    """The peer refused, for a reason of its own."""

    retryable = True


class HandoffError(ControlError):
    """One handoff failed."""


class HandoffTimeout(HandoffError, TimeoutError):
    """The handoff did not finish in time."""

    retryable = True


class HandoffCancelled(HandoffError):
    """This side, or the peer, cancelled the handoff."""


class BlocksMismatch(HandoffError):
    """The two sides named different numbers of blocks for one request."""


class TransferFailed(HandoffError):
    """Moving the bytes failed on this side; the engine's error is the `__cause__`."""


class PeerFailed(HandoffError):
    """The peer says that the handoff failed there, in a way that has no error of its own here."""


class LinkLost(HandoffError, ConnectionError):
    """The link to the peer went down while the handoff was under way."""

    retryable = True


class SendFailed(HandoffError):
    """A message could not be queued: the peer does not read, or is not there."""

    retryable = True


class DaemonError(ControlError):
    """The daemon could not do what was asked, or would not."""


class DaemonTimeout(DaemonError, TimeoutError):
    """The daemon did not answer in time."""

    retryable = True


class DaemonDenied(DaemonError):
    """The daemon denied a request; the message says why."""


class PlacementError(DaemonError):
    """No pair of agents, or no policy, fits a request."""


class ConfigError(ControlError):
    """A setting that cannot be: names it, where it came from, and what may stand there."""


class InsecureAddress(ConfigError, ValueError):
    """An address that others than this machine can reach, without keys."""


class AgentDraining(ControlError):
    """The agent is being drained, or is about to change its role: it takes nothing new."""

    retryable = True


class ForkedProcess(ControlError):
    """A child of fork() used what its parent has made: it works in the parent alone."""


class NotConnected(ControlError):
    """No peer of that name is connected."""


class AgentClosed(ControlError):
    """The agent was closed."""

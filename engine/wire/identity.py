"""Who is at the end of a link."""

from __future__ import annotations

import msgspec

from ..memory.fields import Pid  # noqa: TC001 - msgspec reads it


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

"""What users set for the SGLang backend: environment variables, since SGLang's options are its own."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...engine.transports.selection import TRANSPORTS


@dataclass(frozen=True)
class Settings:
    """One server's settings.

    Attributes:
        transports: which to offer, `$KVFERRY_TRANSPORTS` (`cma,tcp`); all that work here by default.
        host: the address that this rank's engine listens on and publishes, `$KVFERRY_HOST`; the one that
            SGLang publishes by default.
        verify: compare a checksum of everything moved, `$KVFERRY_VERIFY`.
    """

    transports: tuple[str, ...] = TRANSPORTS
    host: str = ""
    verify: bool = False

    @classmethod
    def read(cls) -> Settings:
        """Read the environment.

        Raises:
            ValueError: a variable makes no sense; names it.
        """
        named = os.environ.get("KVFERRY_TRANSPORTS", "")
        transports = tuple(name.strip() for name in named.split(",") if name.strip()) or TRANSPORTS
        if not set(transports) <= set(TRANSPORTS):
            raise ValueError(
                f"KVFERRY_TRANSPORTS is {named!r}: give a list out of {','.join(TRANSPORTS)}"
            )
        return cls(
            transports=transports,
            host=os.environ.get("KVFERRY_HOST", ""),
            verify=os.environ.get("KVFERRY_VERIFY", "") not in ("", "0"),
        )

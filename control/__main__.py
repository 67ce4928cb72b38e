"""`python -m kvferry.control`, and `kvferry daemon`: the daemon as a process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from .daemon.daemon import Daemon
from .daemon.settings import load_keys, read_settings
from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a daemon until SIGTERM or SIGINT; return the exit status."""
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s kvferry daemon: %(message)s",
            stream=sys.stderr,
        )
        keys = load_keys(settings)
        daemon = Daemon(settings, keys)
    except ConfigError as error:
        print(f"kvferry daemon: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop())
    print(
        f"kvferry daemon: listening on {daemon.endpoint}, changes on {daemon.publisher}, "
        f"{'http on ' + daemon.http.address + ', ' if daemon.http is not None else ''}"
        f"{'keys required' if keys is not None else 'this machine only'}",
        flush=True,
    )
    daemon.run()
    daemon.close()
    print("kvferry daemon: drained and stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

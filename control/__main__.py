"""`python -m kvferry.control`, and `kvferry daemon`: the daemon as a process."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING

from .cluster.messages import MAX_MEMBERS
from .daemon.daemon import Daemon
from .daemon.settings import load_keys, read_settings
from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


log = logging.getLogger("kvferry.daemon")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a daemon until SIGTERM or SIGINT; return the exit status."""
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s kvferry daemon: %(message)s",
            stream=sys.stderr,
        )
        _raise_descriptors()
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


def _raise_descriptors() -> None:
    """Allow as many descriptors as the limit may be raised to: an agent takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < 2 * MAX_MEMBERS:
        log.warning(
            "this process may have %d open files, which is enough for %d agents: raise its hard "
            "limit (`LimitNOFILE`, `ulimit -Hn`) for more",
            hard,
            hard // 2,
        )


if __name__ == "__main__":
    sys.exit(main())

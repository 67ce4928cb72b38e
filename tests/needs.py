"""Programs that some tests need: a skip that says which package has it, or a failure.

`KVFERRY_REQUIRE_TOOLS=1`, as continuous integration sets it, makes it a failure. Run as a program it
prints the Debian packages that are missing here; `make tools` installs them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
CHROMIUM = "chromium-headless-shell"
# Programs, or files, and the Debian packages that have them; what the virtual machine with RDMA
# devices needs is in `tools/rdma_vm/missing.py`.
PACKAGES = {
    "etcd": "etcd-server",  # members that daemons share
    FAKETIME: "libfaketime",  # clocks that jump
    "gcc": "gcc libc6-dev",  # a CUDA driver that only writes down
    "ip": "iproute2",  # networks that are cut
    "unshare": "util-linux",
    CHROMIUM: "chromium-headless-shell fonts-dejavu-core",  # the daemon's page
}
INSTEAD = {CHROMIUM: ("chromium", "chromium-browser", "google-chrome")}


def find(program: str) -> str | None:
    """Find a program, or another that does as well, or a file with this path."""
    if program.startswith("/"):
        return program if Path(program).exists() else None
    names = (program, *INSTEAD.get(program, ()))
    paths = (shutil.which(name) or shutil.which(name, path=SYSTEM_PATH) for name in names)
    return next(filter(None, paths), None)


def need(program: str) -> str:
    """Find one of `PACKAGES`; without it the test is skipped, or fails."""
    found = find(program)
    if found is None:
        lack(f"needs {Path(program).name}: apt-get install {PACKAGES[program]}")
    return found


def need_network_namespaces() -> None:
    """Look for what it takes to make another host of a network and a process namespace."""
    for program in ("ip", "unshare"):
        need(program)
    if os.geteuid() != 0:
        lack("network namespaces need root")


def lack(reason: str) -> NoReturn:
    """Skip this test, or fail it where nothing may be missing."""
    if os.environ.get("KVFERRY_REQUIRE_TOOLS"):
        pytest.fail(reason)
    pytest.skip(reason)


def missing_packages() -> list[str]:
    """Name the Debian packages that would let more tests run here."""
    from kvferry.tools.rdma_vm import missing  # late: most tests need nothing of it

    packages = {
        each
        for program, names in PACKAGES.items()
        if find(program) is None
        for each in names.split()
    }
    return sorted(packages | missing.packages())


if __name__ == "__main__":
    print(*missing_packages())
